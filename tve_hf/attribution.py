"""Meta-attribution (Definition 1), attribution transfer (Definition 2), and the comparison of exact with predicted.

Equation numbers are those of "Learning Meta-attribution for Transferable Vision Explainer", arXiv 2312.15359.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .classifiers import SplitClassifier
from .patches import GridSize, average_over_neighborhoods, grid_of, neighborhoods, sample_patches

# Evidence of a class in an embedding: (classifier, embeddings (..., D)) -> (..., C), in float32.
Evidence = Callable[[SplitClassifier, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """How (kept, removed) become scores, without training: phi = part(kept) - part(removed).

    Args:
        evidence: what is read from an embedding: a log-probability (nats), a logit or a probability.
        standardized: scale each part over the map to mean 0 and deviation 1, so that neither drowns the other.
        averaged: average the map over each patch's neighbourhood, since every patch belongs to all those windows.
        kept: whether the kept part counts; otherwise phi = -part(removed).
    """

    evidence: Evidence
    standardized: bool = False
    averaged: bool = False
    kept: bool = True

    @property
    def signed(self) -> bool:
        """Whether scores have a unit, and those above 0 support the class: so it is with neither scaling nor half."""
        return self.kept and not self.standardized


def _log_prob(classifier: SplitClassifier, embeddings: Tensor) -> Tensor:
    return classifier.log_prob(embeddings)


def _logit(classifier: SplitClassifier, embeddings: Tensor) -> Tensor:
    return classifier.head(embeddings).float()


def _prob(classifier: SplitClassifier, embeddings: Tensor) -> Tensor:
    return classifier.log_prob(embeddings).exp()


RULES: dict[str, Rule] = {
    "log_prob": Rule(_log_prob),  # Eq. 7
    "log_prob_averaged": Rule(_log_prob, averaged=True),
    "logit": Rule(_logit),
    "logit_averaged": Rule(_logit, averaged=True),
    "removed_averaged": Rule(_log_prob, averaged=True, kept=False),
    "standardized_logit": Rule(_logit, standardized=True),
    "standardized_logit_averaged": Rule(_logit, standardized=True, averaged=True),
    "standardized_prob_averaged": Rule(_prob, standardized=True, averaged=True),
}

# Of the rules that keep sign and units, the one that holds up best: examples/study_rules.py.
DEFAULT_RULE = "logit_averaged"


def rule_named(name: str) -> Rule:
    """Look a rule up; raises ValueError for an unknown one."""
    if name not in RULES:
        raise ValueError(f"Unknown rule {name!r}; choose one of {', '.join(RULES)}.")
    return RULES[name]


@torch.no_grad()
def exact_meta_attribution(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    grid_size: GridSize | None = None,
    hops: int = 2,
    patch_idx: Tensor | None = None,
    removal: str = "zero",
    chunk_size: int | None = None,
    **inputs: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute g_z = G(N(z); x) and h_z = G(Z \\ N(z); x) by brute force (Eq. 6), two masked passes a patch.

    Args:
        classifier: its backbone is G.
        pixel_values: (B, 3, H, W), on the classifier's device.
        grid_size: P, or (rows, cols); it divides the image. `classifier.default_grid` if None.
        hops: radius of the neighbourhood N(z).
        patch_idx: patches to compute, (B, k) int64; all N if None.
        removal: what replaces removed pixels, a key of `patches.REMOVALS`.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Returns:
        kept g and removed h, (B, k or N, D) each, in the backbone's dtype.

    Raises:
        ValueError: If the batch is empty, the grid does not divide the image, or an index is out of range.
    """
    batch = pixel_values.shape[0]
    if batch == 0:
        raise ValueError("pixel_values holds no image; pass a batch of at least one.")
    if grid_size is None:
        grid_size = classifier.default_grid(pixel_values, **inputs)
    near = neighborhoods(grid_size, hops, pixel_values.device)
    num_patches = near.shape[0]
    if patch_idx is None:
        patch_idx = torch.arange(num_patches, device=pixel_values.device).expand(batch, -1)
    if patch_idx.ndim != 2 or patch_idx.shape[0] != batch or patch_idx.shape[1] == 0:
        raise ValueError(f"patch_idx has shape {tuple(patch_idx.shape)}; pass (B, k) with B = {batch} images.")
    if patch_idx.min() < 0 or patch_idx.max() >= num_patches:
        raise ValueError(f"patch_idx must hold patches between 0 and {num_patches - 1}; got {patch_idx.tolist()}.")
    keep = near[patch_idx.to(near.device)]  # (B, k, N)
    keep = torch.cat([keep, ~keep], dim=1)  # (B, 2k, N)
    embeddings = classifier.embed_masked(pixel_values, keep, grid_size, removal, chunk_size, **inputs)
    kept, removed = embeddings.chunk(2, dim=1)
    return kept, removed


def transfer(
    kept: Tensor,
    removed: Tensor,
    classifier: SplitClassifier,
    class_idx: Tensor,
    rule: str = DEFAULT_RULE,
    grid_size: GridSize | None = None,
    hops: int = 2,
) -> Tensor:
    """Turn meta-attributions into scores of a class with the classifier's head alone (Definition 2).

        phi_z = log H_t(g_z)[y] - log H_t(h_z)[y]        (Eq. 7; `rule="log_prob"`)

    Args:
        kept: g or its prediction, (B, N, D).
        removed: h or its prediction, (B, N, D).
        classifier: its head is H_t.
        class_idx: y, (B,) int64; or (B, K) for K classes of each image at once.
        rule: a key of `RULES`.
        grid_size: grid of the N patches, for the rules that average over neighbourhoods; square if None.
        hops: radius of those neighbourhoods.

    Returns:
        scores (B, N), or (B, K, N); positive supports the class. Nats under "log_prob".

    Raises:
        ValueError: If D, the batch or the class does not fit the head, or a value is not finite.
    """
    how = rule_named(rule)
    if kept.shape != removed.shape or kept.ndim != 3:
        raise ValueError(f"kept {tuple(kept.shape)} and removed {tuple(removed.shape)} must both be (B, N, D).")
    if kept.shape[0] == 0:
        raise ValueError("kept and removed hold no image; pass a batch of at least one.")
    if kept.shape[-1] != classifier.embedding_dim:
        raise ValueError(
            f"The meta-attributions have D = {kept.shape[-1]}, but the classifier's head reads "
            f"{classifier.embedding_dim}; use an explainer pre-trained for this backbone."
        )
    classifier.check_classes(class_idx, kept.shape[0], several=True)
    classes = class_idx if class_idx.ndim == 2 else class_idx.unsqueeze(1)

    scores = _apply(how, kept, removed, classifier, classes)
    if not torch.isfinite(scores).all():
        raise ValueError(
            "The scores are not finite: the image, the classifier's or the explainer's weights hold NaN or infinity."
        )
    if how.averaged:
        scores = average_over_neighborhoods(scores, grid_of(scores.shape[-1], grid_size), hops)
    return scores if class_idx.ndim == 2 else scores.squeeze(1)


def _apply(how: Rule, kept: Tensor, removed: Tensor, classifier: SplitClassifier, classes: Tensor) -> Tensor:
    """Scores of a rule before averaging: (B, N, D) twice and classes (B, K) -> (B, K, N)."""

    def part(embeddings: Tensor) -> Tensor:
        evidence = how.evidence(classifier, embeddings.to(classifier.dtype))  # (B, N, C)
        index = classes.unsqueeze(1).expand(-1, evidence.shape[1], -1)
        chosen = evidence.gather(-1, index).transpose(1, 2)  # (B, K, N)
        if how.standardized:
            spread = chosen.std(-1, keepdim=True, correction=0)
            constant = spread <= 1e-5 * chosen.abs().amax(-1, keepdim=True)  # but for rounding, not to be blown up
            chosen = (chosen - chosen.mean(-1, keepdim=True)) / spread.clamp(min=1e-6)
            chosen = chosen.masked_fill(constant, 0)
        return chosen

    return part(kept) - part(removed) if how.kept else -part(removed)


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


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Pearson correlation over the last dimension, (..., n) -> (...); NaN where one side is constant."""
    one, other = (x.float() - x.float().mean(-1, keepdim=True) for x in (one, other))
    return (one * other).sum(-1) / (one.square().sum(-1) * other.square().sum(-1)).sqrt()


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Spearman rank correlation over the last dimension, (..., n) -> (...); ties get their mean rank."""

    def ranks(x: Tensor) -> Tensor:
        below = (x.unsqueeze(-1) > x.unsqueeze(-2)).float().sum(-1)
        equal = (x.unsqueeze(-1) == x.unsqueeze(-2)).float().sum(-1)
        return below + (equal - 1) / 2

    return pearson(ranks(one), ranks(other))


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
    """Measure how far predictions are from the exact meta-attributions of the same patches.

    Returns:
        `kept_error`, `removed_error`, `epsilon`, `bound` and `error` of each image, (B,), as in `Verification`.
    """

    def log_prob(embeddings: Tensor) -> Tensor:
        values = classifier.log_prob(embeddings.to(classifier.dtype))
        return values.gather(-1, class_idx.view(-1, 1, 1).expand(-1, values.shape[1], 1)).squeeze(-1)  # (B, k)

    g_hat, h_hat, g, h = (log_prob(embeddings) for embeddings in (*predicted, *exact))
    epsilon = torch.maximum(((g_hat - g).exp() - 1).abs().amax(1), ((h - h_hat).exp() - 1).abs().amax(1))
    first = {name: value[:1] for name, value in inputs.items()}
    empty = classifier.embed(torch.zeros_like(pixel_values[:1]), **first).unsqueeze(1)
    full = classifier.embed(pixel_values, **inputs).unsqueeze(1)
    return {
        "kept_error": relative_error(predicted[0], exact[0], empty),
        "removed_error": relative_error(predicted[1], exact[1], full),
        "epsilon": epsilon,
        "bound": -2 * torch.log1p(-epsilon.clamp(max=1)),  # infinite from 1 on
        "error": ((g_hat - h_hat) - (g - h)).abs().mean(1),
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
) -> list[Verification]:
    """Compare predicted with exact scores on random patches of each image, at 2 * num_patches masked passes each.

    Args:
        classifier, pixel_values, hops, inputs: as for `exact_meta_attribution`.
        grid_size: grid of the N patches; a square one if None.
        kept, removed: the predictions, (B, N, D).
        class_idx: y, (B,).
        num_patches: n; all patches if it is at least N.
        rule: compared patch by patch: its evidence, without standardising or averaging over the map.
        generator: chooses the patches; seeded with 0 if None, so that the same call gives the same answer.

    Returns:
        One `Verification` for each image.
    """
    grid_size = rows, columns = grid_of(kept.shape[1], grid_size)
    pointwise = replace(rule_named(rule), standardized=False, averaged=False)
    n = min(num_patches, rows * columns)
    generator = generator or torch.Generator().manual_seed(0)
    patch_idx = sample_patches(len(pixel_values), rows * columns, n, generator).to(pixel_values.device)
    exact = exact_meta_attribution(classifier, pixel_values, grid_size, hops, patch_idx, **inputs)
    index = patch_idx.unsqueeze(-1).expand(-1, -1, kept.shape[-1])
    predicted = kept.gather(1, index), removed.gather(1, index)
    scores, exact_scores = (
        _apply(pointwise, *pair, classifier, class_idx.unsqueeze(1)) for pair in (predicted, exact)
    )
    found = {
        "pearson": pearson(scores, exact_scores).squeeze(1),
        "spearman": spearman(scores, exact_scores).squeeze(1),
        **prediction_errors(classifier, pixel_values, class_idx, predicted, exact, **inputs),
    }
    return [
        Verification(num_patches=n, rule=rule, **{name: values[i].item() for name, values in found.items()})
        for i in range(len(pixel_values))
    ]
