"""Fidelity+ and Fidelity- of an explanation, their curves over sparsity and the areas under them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .classifiers import SplitClassifier
from .patches import GridSize
from .ranking import area, check_scores, even_shares, most_important, prob_kept


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

    @classmethod
    def from_probabilities(cls, full: Tensor, kept: Tensor, removed: Tensor) -> "Fidelity":
        """Compute fidelity from f(Z; y), (B,), f(S*; y) and f(Z \\ S*; y), (B, K), at evenly spaced sparsities.

        The area is the mean over sparsity in [0, 1] by the trapezoidal rule.
        """
        sparsity = torch.linspace(0, 1, kept.shape[1], dtype=torch.float32)
        plus, minus = full.unsqueeze(1) - removed, full.unsqueeze(1) - kept
        return cls(sparsity, plus, minus, area(plus, sparsity), area(minus, sparsity))


@torch.no_grad()
def fidelity(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    scores: Tensor,
    class_idx: Tensor,
    num_levels: int = 14,
    grid_size: GridSize | None = None,
    removal: str = "zero",
    chunk_size: int | None = None,
    **inputs: Tensor,
) -> Fidelity:
    """Remove, and keep alone, the most important patches S* at evenly spaced sparsities.

        Fidelity+ = f(Z; y) - f(Z \\ S*; y)        Fidelity- = f(Z; y) - f(S*; y)

    At sparsity s, S* holds the round((1 - s) N) patches of the highest scores; ties go to the lower patch number.
    2 num_levels - 2 passes an image: at the ends S* is everything or nothing for every map, so these are asked once.

    Args:
        classifier: f, whose probability of the class is read.
        pixel_values: (B, 3, H, W).
        scores: (B, rows, cols), or (B, N) on the grid `grid_size` (a square one if None).
        class_idx: y, (B,).
        num_levels: points on each curve, both ends included.
        removal: how patches are removed: a key of `patches.REMOVALS`, or "token_drop".
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Raises:
        ValueError: If the scores are not finite or do not fit the images, or there are more levels than patches + 1.
    """
    scores, grid = check_scores(classifier, pixel_values, scores, class_idx, grid_size)
    sizes = even_shares(num_levels, scores.shape[1])[::-1]  # of S*, falling from all patches to none
    important = most_important(scores, sizes)  # (B, K, N)
    inner = important[:, 1:-1]
    keep = torch.cat([important[:, :1], important[:, -1:], inner, ~inner], dim=1)  # Z, empty, K - 2 and K - 2 masks
    probabilities = prob_kept(classifier, pixel_values, class_idx, keep, grid, removal, chunk_size, **inputs)
    full, empty, alone, without = probabilities.split([1, 1, num_levels - 2, num_levels - 2], dim=1)
    kept = torch.cat([full, alone, empty], dim=1)
    removed = torch.cat([empty, without, full], dim=1)
    return Fidelity.from_probabilities(full.squeeze(1), kept, removed)
