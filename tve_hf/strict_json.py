"""JSON that every parser reads, although JSON has no NaN and no infinity."""

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """Write as JSON; NaN and infinities become the strings "nan", "inf" and "-inf", which `float` reads."""

    def strict(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: strict(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [strict(entry) for entry in item]
        return str(item) if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(strict(value), indent=indent, allow_nan=False)
