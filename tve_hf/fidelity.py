"""Fidelity+ and Fidelity- of an explanation, their curves over sparsity and the areas under them."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .attribution import of_class
from .classifiers import SplitClassifier
from .classifiers.given import ClassifierInput, ClassInput, class_tensor, split_and_pixels
from .inputs import whole_number
from .patches import GridSize, grid_of

logger = logging.get_logger(__name__)


@dataclass
class Fidelity:
    """Curves over sparsity, the share of patches that is not in S*, and the areas under them.

    Args:
        sparsity: (K,), from 0 to 1.
        plus: f(Z; y) - f(Z \\ S*; y), (B, K); higher is better.
        minus: f(Z; y) - f(S*; y), (B, K); lower is better.
    """

    sparsity: Tensor
    plus: Tensor
    minus: Tensor

    @property
    def plus_auc(self) -> Tensor:
        """Mean of Fidelity+ over sparsity, by the trapezoidal rule, (B,); higher is better."""
        return area(self.plus, self.sparsity)

    @property
    def minus_auc(self) -> Tensor:
        """Mean of Fidelity- over sparsity, (B,); lower is better."""
        return area(self.minus, self.sparsity)

    @property
    def gap(self) -> Tensor:
        """Fidelity+ AUC - Fidelity- AUC, (B,); higher is better."""
        return self.plus_auc - self.minus_auc

    @classmethod
    def from_probabilities(cls, full: Tensor, kept: Tensor, removed: Tensor) -> "Fidelity":
        """Compute fidelity from f(Z; y), (B,), f(S*; y) and f(Z \\ S*; y), (B, K), at evenly spaced sparsities."""
        sparsity = torch.linspace(0, 1, kept.shape[1], dtype=torch.float32)
        return cls(sparsity, plus=full.unsqueeze(1) - removed, minus=full.unsqueeze(1) - kept)


@torch.no_grad()
def fidelity(
    classifier: ClassifierInput,
    pixel_values: Any,
    scores: Tensor,
    class_idx: ClassInput,
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
        classifier: f, whose probability of the class is read; or a model or name, which is split first.
        pixel_values: (B, 3, H, W), or images, one or a list, which the classifier's image processor prepares.
        scores: (B, rows, cols), or (B, N) on the grid `grid_size` (a square one if None).
        class_idx: y, (B,); or a number, the class of all images.
        num_levels: points on each curve, both ends included.
        removal: how patches are removed: a key of `patches.REMOVALS`, or "token_drop".
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Raises:
        ValueError: If the scores are not finite or do not fit the images, or there are more levels than patches + 1.
    """
    split, pixel_values, inputs = split_and_pixels(fidelity, classifier, pixel_values, inputs)
    whole_number("num_levels", num_levels, None)
    classes = class_tensor(split, class_idx, len(pixel_values))
    scores, grid = check_scores(split, pixel_values, scores, classes, grid_size)
    sizes = even_shares(num_levels, scores.shape[1])[::-1]  # of S*, falling from all patches to none
    important = most_important(scores, sizes)  # (B, K, N)
    inner = important[:, 1:-1]
    keep = torch.cat([important[:, :1], important[:, -1:], inner, ~inner], dim=1)  # Z, empty, K - 2 and K - 2 masks
    probabilities = prob_kept(split, pixel_values, classes, keep, grid, removal, chunk_size, **inputs)
    full, empty, alone, without = probabilities.split([1, 1, num_levels - 2, num_levels - 2], dim=1)
    kept = torch.cat([full, alone, empty], dim=1)
    removed = torch.cat([empty, without, full], dim=1)
    return Fidelity.from_probabilities(full.squeeze(1), kept, removed)


def check_scores(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    scores: Tensor,
    class_idx: Tensor,
    grid_size: GridSize | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """Check what every metric of a map reads, arguments as for `fidelity`; warn of constant maps, which rank nothing.

    Returns:
        The scores, (B, N), and their grid (rows, cols).

    Raises:
        ValueError: If the scores are not finite or do not fit the images, there is no image, or no such class.
    """
    if not isinstance(scores, Tensor) or scores.ndim not in (2, 3):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores is {found}; pass a tensor of maps, (B, rows, cols) or (B, N).")
    if scores.ndim == 3:
        grid_size = tuple(scores.shape[1:])
    scores = scores.flatten(1)
    grid = grid_of(scores.shape[1], grid_size)
    if not torch.isfinite(scores).all():
        raise ValueError("The scores hold NaN or infinity, so patches cannot be ranked by them.")
    if len(scores) != len(pixel_values):
        raise ValueError(f"{len(scores)} maps were given for {len(pixel_values)} images; pass one map for each.")
    if len(pixel_values) == 0:
        raise ValueError("pixel_values holds no image; pass a batch of at least one.")
    classifier.check_classes(class_idx, len(scores))
    constant = (scores == scores[:, :1]).all(1)
    if constant.any():
        logger.warning(
            f"{int(constant.sum())} of {len(scores)} maps are constant and rank nothing: their patches are taken in "
            "the order of their numbers, so their results mean nothing."
        )
    return scores, grid


def even_shares(num_levels: int, num_patches: int, last: Fraction = Fraction(1)) -> list[Fraction]:
    """Return evenly spaced shares from 0 to `last`, exact so that no patch is gained or lost by rounding.

    Raises:
        ValueError: If there is one level only, or there are more levels than patches + 1.
    """
    if not 2 <= num_levels <= num_patches + 1:
        raise ValueError(
            f"num_levels = {num_levels} must lie between 2 and the number of patches + 1, {num_patches + 1}."
        )
    return [last * level / (num_levels - 1) for level in range(num_levels)]


def most_important(scores: Tensor, shares: list[Fraction]) -> Tensor:
    """Mark the patches S* of the highest scores, round(share * N) of them; ties go to the lower patch number.

    Returns:
        Boolean (B, K, N), for maps (B, N) and K shares.
    """
    num_patches = scores.shape[1]
    sizes = torch.tensor([round(share * num_patches) for share in shares], device=scores.device)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 is the most important patch
    return rank.unsqueeze(1) < sizes.view(1, -1, 1)


def log_prob_kept(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    keep: Tensor,
    grid_size: GridSize,
    removal: str,
    chunk_size: int | None,
    **inputs: Tensor,
) -> Tensor:
    """Return log f(S; .) of each image with each of its sets S of patches kept, boolean (B, K, N) -> (B, K, C)."""
    return classifier.log_prob(classifier.embed_masked(pixel_values, keep, grid_size, removal, chunk_size, **inputs))


def prob_kept(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    keep: Tensor,
    grid_size: GridSize,
    removal: str,
    chunk_size: int | None,
    **inputs: Tensor,
) -> Tensor:
    """Return f(S; y) for each image's class, (B, K); arguments as for `log_prob_kept`, and class_idx (B,)."""
    log_prob = log_prob_kept(classifier, pixel_values, keep, grid_size, removal, chunk_size, **inputs)
    return of_class(log_prob, class_idx).exp()


def area(curves: Tensor, shares: Tensor) -> Tensor:
    """Area under curves (B, K) over shares (K,), by the trapezoidal rule, (B,)."""
    return torch.trapezoid(curves, shares.to(curves), dim=1)
