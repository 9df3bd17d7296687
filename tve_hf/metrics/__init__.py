"""The metrics as `evaluate` modules, which compute from rows of numbers that were measured before.

Each is a folder that `evaluate.load` takes, offline. `tve_hf.fidelity` and the functions of `tve_hf.evaluation` need
no `evaluate`.
"""

from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent


def available() -> list[str]:
    """Return the names of the modules."""
    return sorted(path.parent.name for path in _ROOT.glob("*/README.md"))


def load(name: str) -> Any:
    """Return one as an `evaluate.EvaluationModule`.

    Raises:
        ValueError: If there is no such metric.
        ImportError: If `evaluate` is not installed.
    """
    if name not in available():
        raise ValueError(f"Unknown metric {name!r}; choose one of {', '.join(available())}.")
    try:
        import evaluate
    except ImportError:
        raise ImportError("Metric modules need evaluate; run `pip install tve_hf[metrics]`.") from None
    return evaluate.load(str(_ROOT / name))
