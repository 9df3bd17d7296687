"""Write files that are whole or absent."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Write beside the file and rename, so that no half-written file stays behind."""
    unfinished = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
