"""How far predicted meta-attributions are from the exact ones, and what Theorem 1 makes of that.

Equation numbers are those of "Learning Meta-attribution for Transferable Vision Explainer", arXiv 2312.15359.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .attribution import DEFAULT_RULE, apply_rule, exact_meta_attribution, of_class, rule_named
from .classifiers import SplitClassifier
from .patches import GridSize, grid_of, sample_patches


@dataclass
class Verification:
    """Predicted against exact meta-attribution of one image, on some of its patches.

    Args:
        num_patches: how many patches were compared.
        rule: the rule whose scores were compared, patch by patch: before any standardising or averaging over the map.
        pearson, spearman: correlations of the scores over the patches; NaN when either is constant.
        kept_error, removed_error: relative squared errors, sum |predicted - exact|^2 / sum |exact - centre|^2, where
            the centre is what the explainer starts from: G of the empty image for kept, G(x) for removed; 1 means
            that the prediction is no better than that.
        epsilon: largest |ratio - 1| of Theorem 1's ratios H_t(g^)/H_t(g) and H_t(h)/H_t(h^) of the class.
        bound: -2 log(1 - epsilon), at least the mean error of Eq. 7 in nats; infinite if epsilon >= 1.
        error: that mean error, mean |phi^ - phi| under Eq. 7.
    """

    num_patches: int
    rule: str
    pearson: float
    spearman: float
    kept_error: float
    removed_error: float
    epsilon: float
    bound: float
    error: float


def relative_error(predicted: Tensor, exact: Tensor, centre: Tensor) -> Tensor:
    """sum |predicted - exact|^2 / sum |exact - centre|^2 over patches and dimensions, (B, k, D) -> (B,)."""
    difference = (predicted.float() - exact.float()).square().sum((-2, -1))
    return difference / (exact.float() - centre.float()).square().sum((-2, -1)).clamp(min=1e-12)


Pair = tuple[Tensor, Tensor]  # kept and removed, (B, k, D) each


@torch.no_grad()
def prediction_errors(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    predicted: Pair,
    exact: Pair,
    **inputs: Tensor,
) -> dict[str, Tensor]:
    """Measure how far predictions are from the exact meta-attributions of the same patches, in two passes an image.

    Args:
        classifier, pixel_values, inputs: as for `exact_meta_attribution`.
        class_idx: y, (B,); or (B, K) for K classes of each image at once.
        predicted, exact: kept and removed of the same k patches, (B, k, D) each.

    Returns:
        `kept_error` and `removed_error` of each image, (B,), and `epsilon`, `bound` and `error` of each of its
        classes, shaped as `class_idx`: as in `Verification`.
    """
    columns = class_idx.unbind(1) if class_idx.ndim == 2 else [class_idx]

    def log_prob(embeddings: Tensor) -> Tensor:
        values = classifier.log_prob(embeddings.to(classifier.dtype))
        chosen = torch.stack([of_class(values, column) for column in columns], dim=1)  # (B, K, k)
        return chosen if class_idx.ndim == 2 else chosen.squeeze(1)

    g_hat, h_hat, g, h = (log_prob(embeddings) for embeddings in (*predicted, *exact))
    epsilon = torch.maximum(((g_hat - g).exp() - 1).abs().amax(-1), ((h - h_hat).exp() - 1).abs().amax(-1))
    first = {name: value[:1] for name, value in inputs.items()}
    empty = classifier.embed(torch.zeros_like(pixel_values[:1]), **first).unsqueeze(1)
    full = classifier.embed(pixel_values, **inputs).unsqueeze(1)
    return {
        "kept_error": relative_error(predicted[0], exact[0], empty),
        "removed_error": relative_error(predicted[1], exact[1], full),
        "epsilon": epsilon,
        "bound": -2 * torch.log1p(-epsilon.clamp(max=1)),  # infinite from 1 on
        "error": ((g_hat - h_hat) - (g - h)).abs().mean(-1),
    }


@torch.no_grad()
def verify(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    kept: Tensor,
    removed: Tensor,
    class_idx: Tensor,
    num_patches: int = 16,
    rule: str = DEFAULT_RULE,
    grid_size: GridSize | None = None,
    hops: int = 2,
    generator: torch.Generator | None = None,
    **inputs: Any,
) -> list[Any]:
    """Compare predicted with exact scores on random patches of each image, at 2 * num_patches masked passes each.

    All classes share these passes, and all images the patches, so an image's answer is the same in every batch.

    Args:
        classifier, pixel_values, hops, inputs: as for `exact_meta_attribution`.
        grid_size: grid of the N patches; a square one if None.
        kept, removed: the predictions, (B, N, D).
        class_idx: y, (B,); or (B, K) for K classes of each image at once.
        num_patches: n; all patches if it is at least N.
        rule: compared patch by patch: its evidence, without standardising or averaging over the map.
        generator: chooses the patches; seeded with 0 if None, so that the same call gives the same answer.

    Returns:
        One `Verification` for each image; or, for classes (B, K), a list of K for each image.
    """
    grid_size = rows, columns = grid_of(kept.shape[1], grid_size)
    n = min(num_patches, rows * columns)
    generator = generator or torch.Generator().manual_seed(0)
    patch_idx = sample_patches(1, rows * columns, n, generator).to(pixel_values.device).expand(len(pixel_values), -1)
    exact = exact_meta_attribution(classifier, pixel_values, grid_size, hops, patch_idx, **inputs)
    index = patch_idx.unsqueeze(-1)
    predicted = kept.take_along_dim(index, dim=1), removed.take_along_dim(index, dim=1)

    classes = class_idx if class_idx.ndim == 2 else class_idx.unsqueeze(1)
    pointwise = replace(rule_named(rule), standardized=False, averaged=False)
    scores, exact_scores = (apply_rule(pointwise, *pair, classifier, classes) for pair in (predicted, exact))
    errors = prediction_errors(classifier, pixel_values, classes, predicted, exact, **inputs)
    measures = {"pearson": pearson(scores, exact_scores), "spearman": spearman(scores, exact_scores)} | {
        name: values if values.ndim == 2 else values.unsqueeze(1).expand(classes.shape)  # of all classes alike
        for name, values in errors.items()
    }
    verifications = [
        [
            Verification(num_patches=n, rule=rule, **{name: values[i, k].item() for name, values in measures.items()})
            for k in range(classes.shape[1])
        ]
        for i in range(len(pixel_values))
    ]
    return verifications if class_idx.ndim == 2 else [of_image for (of_image,) in verifications]


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Pearson correlation over the last dimension, (..., n) -> (...), float32; NaN where one side is constant."""
    return (_standardized(one) * _standardized(other)).sum(-1).float()


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Spearman rank correlation over the last dimension; as for `pearson`, and ties get their mean rank."""

    def ranks(x: Tensor) -> Tensor:
        below = (x.unsqueeze(-1) > x.unsqueeze(-2)).float().sum(-1)
        equal = (x.unsqueeze(-1) == x.unsqueeze(-2)).float().sum(-1)
        return (below + (equal - 1) / 2).masked_fill(_constant(x), 0)

    return pearson(ranks(one), ranks(other))


def _constant(x: Tensor) -> Tensor:
    """Whether values differ by no more than rounding, (..., n) -> (..., 1): it has no order that means anything.

    Judged before a mean is subtracted, since what rounding leaves of a constant then looks like any other map.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return high - low <= 4 * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs())


def _standardized(x: Tensor) -> Tensor:
    """Subtract the mean and divide by the norm, (..., n), in float32 or float64; NaN where x is constant."""
    constant = _constant(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x[..., :1]  # without rounding where values are close, so that the mean is that of the differences
    x = x - x.mean(-1, keepdim=True)
    x = x / x.abs().amax(-1, keepdim=True)  # squares of very small and very large values do not fit
    return (x / x.norm(dim=-1, keepdim=True)).masked_fill(constant, torch.nan)
