"""Means over random backgrounds by sampling: what explainers of random backgrounds predict (arXiv 2312.15359, Eq. 3).

Departs from the paper in taking the mean of the embedding rather than of the class's log-probability, so that one set
of masked passes serves every class and head.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from ..attribution import DEFAULT_RULES, transfer
from ..classifiers import SplitClassifier
from ..coalitions import Coalitions
from ..sampling import NUM_SAMPLES, sampled_meta_attribution


@torch.no_grad()
def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    n_samples: int = NUM_SAMPLES,
    coalitions: Coalitions | str = "smooth",
    removal: str = "zero",
    rule: str = DEFAULT_RULES["random"],
    hops: int = 2,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
    **inputs: Any,
) -> Tensor:
    """Scores (B, rows, cols), in the units of the rule, from `n_samples` masked passes an image.

    They serve all classes of an image: (B, K, rows, cols) for class_idx (B, K).

    Args:
        n_samples, coalitions, removal, generator, chunk_size, progress, inputs: as for `sampled_meta_attribution`.
        rule, hops: as for `transfer`.
    """
    how: Any = (n_samples, coalitions, removal, generator, chunk_size, progress)
    kept, removed = sampled_meta_attribution(classifier, pixel_values, grid_size, *how, **inputs)
    return transfer(kept, removed, classifier, class_idx, rule, grid_size, hops).unflatten(-1, grid_size)
