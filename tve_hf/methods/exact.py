"""Exact meta-attribution by brute force, 2 N masked passes an image: what TVE predicts (arXiv 2312.15359, Eq. 6)."""

from typing import Any

import torch
from torch import Tensor

from ..attribution import DEFAULT_RULE, exact_meta_attribution, transfer
from ..classifiers import SplitClassifier


@torch.no_grad()
def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    hops: int = 2,
    rule: str = DEFAULT_RULE,
    **inputs: Any,
) -> Tensor:
    """Scores (B, rows, cols), in the units of the rule; `inputs` are what the classifier reads besides pixels."""
    kept, removed = exact_meta_attribution(classifier, pixel_values, grid_size, hops, **inputs)
    return transfer(kept, removed, classifier, class_idx, rule, grid_size, hops).unflatten(1, grid_size)
