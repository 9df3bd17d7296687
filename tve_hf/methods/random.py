"""Noise: the floor that every method has to clear."""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normal scores (B, rows, cols).

    Args:
        generator: draws them, on the CPU; seeded with 0 if None, so that the same call gives the same answer.
    """
    generator = generator or torch.Generator().manual_seed(0)
    return torch.randn(len(pixel_values), *grid_size, generator=generator).to(pixel_values.device)
