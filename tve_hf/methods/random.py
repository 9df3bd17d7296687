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
    """Normal scores (B, rows, cols), drawn on the CPU from `generator`."""
    return torch.randn(len(pixel_values), *grid_size, generator=generator).to(pixel_values.device)
