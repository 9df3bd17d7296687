"""Exact meta-attribution by brute force, 2 N masked passes an image: what TVE predicts (arXiv 2312.15359, Eq. 6)."""

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
    removal: str = "zero",
    chunk_size: int | None = None,
    **inputs: Tensor,
) -> Tensor:
    """Scores (B, rows, cols), in the units of the rule; or (B, K, rows, cols) for class_idx (B, K).

    Args:
        hops, removal, chunk_size, inputs: as for `exact_meta_attribution`.
        rule: as for `transfer`.
    """
    kept, removed = exact_meta_attribution(
        classifier, pixel_values, grid_size, hops, None, removal, chunk_size, **inputs
    )
    return transfer(kept, removed, classifier, class_idx, rule, grid_size, hops).unflatten(-1, grid_size)
