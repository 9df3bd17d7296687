"""Fidelity+ and Fidelity- of an explanation, their curves over sparsity and the areas under them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .classifiers import SplitClassifier
from .patches import GridSize, grid_of


@dataclass
class Fidelity:
    """Curves over sparsity, the share of patches that is not in S*, and the areas under them.

    Args:
        sparsity: (K,), from 0 to 1.
        plus: f(Z; y) - f(Z \\ S*; y), (B, K); higher is better.
        minus: f(Z; y) - f(S*; y), (B, K); lower is better.
        plus_auc, minus_auc: mean of each curve over sparsity, (B,).
    """

    sparsity: Tensor
    plus: Tensor
    minus: Tensor
    plus_auc: Tensor
    minus_auc: Tensor

    @property
    def gap(self) -> Tensor:
        """Fidelity+ AUC - Fidelity- AUC, (B,); higher is better."""
        return self.plus_auc - self.minus_auc


@torch.no_grad()
def fidelity(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    scores: Tensor,
    class_idx: Tensor,
    num_levels: int = 14,
    grid_size: GridSize | None = None,
    removal: str = "zero",
    chunk_size: int = 128,
    **inputs: Tensor,
) -> Fidelity:
    """Remove, and keep alone, the most important patches S* at evenly spaced sparsities (SPEC: fidelity-sparsity AUC).

        Fidelity+ = f(Z; y) - f(Z \\ S*; y)        Fidelity- = f(Z; y) - f(S*; y)

    At sparsity s, S* holds the round((1 - s) N) patches of the highest scores; ties go to the lower patch number. The
    area is the mean over sparsity in [0, 1] by the trapezoidal rule.

    Args:
        classifier: f, whose probability of the class is read.
        pixel_values: (B, 3, H, W).
        scores: (B, rows, cols), or (B, N) on the grid `grid_size` (a square one if None).
        class_idx: y, (B,).
        num_levels: points on each curve, both ends included; the ends need no ranking and cost one pass an image.
        removal: a key of `patches.REMOVALS`.
        chunk_size: masked images in one pass: the bound on memory.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Raises:
        ValueError: If the scores are not finite or do not fit the images, or there are more levels than patches + 1.
    """
    if scores.ndim == 3:
        grid_size = tuple(scores.shape[1:])
    scores = scores.flatten(1)
    num_patches = scores.shape[1]
    grid = grid_of(num_patches, grid_size)
    if not torch.isfinite(scores).all():
        raise ValueError("The scores hold NaN or infinity, so patches cannot be ranked by them.")
    if len(scores) != len(pixel_values):
        raise ValueError(f"{len(scores)} maps were given for {len(pixel_values)} images; pass one map for each.")
    if len(pixel_values) == 0:
        raise ValueError("pixel_values holds no image; pass a batch of at least one.")
    if not 2 <= num_levels <= num_patches + 1:
        raise ValueError(
            f"num_levels = {num_levels} must lie between 2 and the number of patches + 1, {num_patches + 1}."
        )
    num_labels = len(classifier.id2label)
    if class_idx.min() < 0 or class_idx.max() >= num_labels:
        raise ValueError(f"class_idx {class_idx.tolist()} must lie between 0 and {num_labels - 1}.")

    sparsity = torch.linspace(0, 1, num_levels, dtype=torch.float64)
    sizes = ((1 - sparsity) * num_patches).round().long().to(scores.device)  # |S*|, falling from N to 0
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # rank 0 is the most important patch
    important = rank.unsqueeze(1) < sizes.view(1, -1, 1)  # (B, K, N)
    # At the ends S* is everything or nothing for every map, so f(Z) and f(empty) are asked once.
    inner = important[:, 1:-1]
    keep = torch.cat([important[:, :1], important[:, -1:], ~inner, inner], dim=1)  # Z, empty, K - 2 and K - 2 masks
    log_prob = classifier.log_prob(
        classifier.embed_masked(pixel_values, keep, grid, removal, chunk_size, **inputs)
    )  # (B, 2K-2, C)
    probabilities = log_prob.gather(-1, class_idx.view(-1, 1, 1).expand(-1, log_prob.shape[1], 1)).squeeze(-1).exp()
    full, empty, without, alone = probabilities.split([1, 1, num_levels - 2, num_levels - 2], dim=1)
    plus = full - torch.cat([empty, without, full], dim=1)
    minus = full - torch.cat([full, alone, empty], dim=1)

    def area(curve: Tensor) -> Tensor:
        return torch.trapezoid(curve, sparsity.to(curve), dim=1)

    return Fidelity(sparsity.float(), plus, minus, area(plus), area(minus))
