"""Judge maps beyond fidelity: perturbation, localisation, sanity checks, statistics, and the report of them all.

`perturbation` and `localization` are functions here, as in docs/judge.md, and modules for what they hold besides:
`from tve_hf.evaluation.perturbation import Perturbation`.
"""

from .localization import Localization, PointIoU, localization, point_iou
from .perturbation import (
    InsertionDeletion,
    Perturbation,
    SingleDeletion,
    insertion_deletion,
    perturbation,
    single_deletion,
)
from .sanity import class_sensitivity, randomization, sensitivity_max
from .watching import WatchedImages

__all__ = [
    "InsertionDeletion",
    "Localization",
    "Perturbation",
    "PointIoU",
    "SingleDeletion",
    "WatchedImages",
    "class_sensitivity",
    "insertion_deletion",
    "localization",
    "perturbation",
    "point_iou",
    "randomization",
    "sensitivity_max",
    "single_deletion",
]
