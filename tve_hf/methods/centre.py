"""A Gaussian at the image's centre, where objects are: what a method has to beat to have looked at the image."""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier


def explain(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """exp(-d^2 / 2), (B, rows, cols), d the distance from the centre in quarters of the image's side."""
    rows, columns = (
        ((torch.arange(n, device=pixel_values.device) + 0.5) / n - 0.5) * 4 for n in grid_size
    )  # in [-2, 2]
    squared = rows.square().unsqueeze(1) + columns.square()
    return torch.exp(-squared / 2).repeat(len(pixel_values), 1, 1)
