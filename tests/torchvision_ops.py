"""Lets torchvision be imported where its compiled operators do not fit torch, as its CUDA build beside a CPU torch.

timm needs torchvision for its transforms alone, which are Python. Declaring the operators is enough for the import;
calling one still fails. Tests import this before transformers; it is no part of the package.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _declared() -> torch.library.Library | None:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(compiled)
            return None
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


LIBRARY = _declared()  # the declarations last as long as it does
