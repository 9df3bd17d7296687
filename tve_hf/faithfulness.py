"""How much of what masking does to a class a map accounts for: predicted against true change on fresh coalitions.

The faithfulness correlation of Bhatt, Weller & Moura (IJCAI 2020, arXiv 2005.00631), and the share of variance that
goes with it. It serves every map whose scores are meant to add up.

Shapes: B images, K classes of each, n coalitions, N patches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attribution import RULES, evidence_of
from .classifiers import SplitClassifier
from .coalitions import Coalitions, check_number
from .patches import GridSize, grid_of
from .verification import pearson

RESAMPLES = 1000  # of the coalitions, for the interval


@dataclass
class Faithfulness:
    """Predicted against true change of the logit of one class of one image, from coalition to coalition.

    Args:
        num_coalitions: how many were compared.
        r2: share of the variance over the coalitions that the scores account for; 1 at best, below 0 for scores that
            are worse than none. For scores in units of the logit.
        r2_interval: 95 % percentile bootstrap interval of it, over the coalitions.
        pearson: correlation of the two, whatever the unit of the scores; NaN when either is constant.
    """

    num_coalitions: int
    r2: float
    r2_interval: tuple[float, float]
    pearson: float


@torch.no_grad()
def faithfulness(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    scores: Tensor,
    class_idx: Tensor,
    num_coalitions: int = 64,
    coalitions: Coalitions | str = "smooth",
    grid_size: GridSize | None = None,
    removal: str = "zero",
    chunk_size: int | None = None,
    rule: str = "logit",
    **inputs: Tensor,
) -> list[list[Faithfulness]]:
    """Compare, over n fresh coalitions S, the sum of the scores in S with the class's logit when S alone is visible.

    All images get the same coalitions, in every call, and all classes share the passes.

    Args:
        classifier: f, whose logits are asked.
        pixel_values: (B, 3, H, W).
        scores: maps of K classes of each image, (B, K, N).
        class_idx: these classes, (B, K) int64.
        num_coalitions: n, one masked pass each for an image; at least 8, even.
        coalitions: their distribution: a `Coalitions`, or the name of one with its usual settings.
        grid_size: grid of the N patches; a square one if None.
        removal: what replaces removed pixels, a key of `patches.REMOVALS`.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        rule: whose evidence the scores add up to, a key of `attribution.RULES`.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Returns:
        For each image a `Faithfulness` of each class.

    Raises:
        ValueError: If there are fewer than 8 coalitions or an odd number, or they do not fit the grid.
    """
    grid = grid_of(scores.shape[-1], grid_size)
    keep, true = true_evidence(
        classifier, pixel_values, class_idx, num_coalitions, coalitions, grid, removal, chunk_size, rule, **inputs
    )
    foretold = scores.double() @ keep.T.double()
    drawn = torch.randint(num_coalitions, (RESAMPLES, num_coalitions), generator=torch.Generator().manual_seed(0))
    resampled = r_squared(foretold[..., drawn.to(true.device)], true[..., drawn.to(true.device)])  # (B, K, RESAMPLES)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975]).to(resampled), dim=-1)
    r2, correlation = r_squared(foretold, true), pearson(foretold, true)
    return [
        [
            Faithfulness(
                num_coalitions,
                r2[i, k].item(),
                (low[i, k].item(), high[i, k].item()),
                correlation[i, k].item(),
            )
            for k in range(class_idx.shape[1])
        ]
        for i in range(len(pixel_values))
    ]


@torch.no_grad()
def true_evidence(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    num_coalitions: int,
    coalitions: Coalitions | str,
    grid: tuple[int, int],
    removal: str = "zero",
    chunk_size: int | None = None,
    rule: str = "logit",
    **inputs: Tensor,
) -> tuple[Tensor, Tensor]:
    """What maps are compared with by `faithfulness`, whose arguments these are: coalitions, and evidence of classes.

    Returns:
        boolean (n, N), the same for all images, and (B, K, n) float64.
    """
    check_coalitions(num_coalitions)
    how = Coalitions(coalitions) if isinstance(coalitions, str) else coalitions
    keep = how.draw(1, num_coalitions, grid, torch.Generator().manual_seed(1))[0].to(pixel_values.device)
    masks = keep.expand(len(pixel_values), -1, -1)
    embeddings = classifier.embed_masked(pixel_values, masks, grid, removal, chunk_size, **inputs)
    return keep, evidence_of(RULES[rule], embeddings, classifier, class_idx).double()


def r_squared(foretold: Tensor, true: Tensor) -> Tensor:
    """1 - variance of (true - foretold) / variance of true, over the last dimension, (..., n) -> (...)."""
    return 1 - (true - foretold).var(-1) / true.var(-1).clamp(min=1e-12)


def check_coalitions(number: int) -> None:
    """Raise ValueError unless so many coalitions make pairs, and enough of them for a correlation."""
    if number < 8:
        raise ValueError(f"verify is {number}; a correlation needs 8 coalitions at least, better 64.")
    check_number(number, "verify")
