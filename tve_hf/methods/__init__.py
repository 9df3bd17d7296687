"""Explanation methods behind one function: `explain(name, classifier, pixel_values, class_idx, grid_size)`.

Each method is a function `explain` in a file of its own, imported when it is first asked for.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from ..classifiers import SplitClassifier
from ..patches import GridSize, as_pair

_METHODS = {
    "tve": ".tve",
    "exact": ".exact",
    "random": ".random",
    "rollout": ".rollout",
    "grad_cam": ".grad_cam",
}


def available() -> set[str]:
    """Return the names of all methods."""
    return set(_METHODS)


def load(name: str) -> Callable[..., Tensor]:
    """Return a method's own function; raises ValueError for an unknown name."""
    if name not in _METHODS:
        raise ValueError(f"Unknown method {name!r}; choose one of {', '.join(sorted(_METHODS))}.")
    return import_module(_METHODS[name], __name__).explain


def explain(
    name: str,
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: GridSize,
    **options: Any,
) -> Tensor:
    """Explain a batch with one method.

    Args:
        name: one of `available()`.
        classifier: the classifier to explain, in eval mode.
        pixel_values: (B, 3, H, W).
        class_idx: the class to explain in each image, (B,).
        grid_size: P, or (rows, cols), of the map.
        options: what the method's own `explain` takes besides.

    Returns:
        scores (B, rows, cols), float32, higher for patches that support the class more; units are the method's.

    Raises:
        ValueError: If there is no such method, or it cannot serve this classifier.
    """
    return load(name)(classifier, pixel_values, class_idx, as_pair(grid_size), **options)
