"""Correct a predicted map by some masked passes of the classifier: ridge regression towards the prediction.

An explainer of random backgrounds foretells G(S) of every coalition S, and so the evidence v(S) of a class that a head
finds in it. Of n coalitions the true v(S) is computed, and what the prediction misses, r = v - v_hat, is shared out
over the patches:

    correction = X^T (X X^T + N / 4 + strength I)^-1 r,        X = 1[z in S] - p, (n, N).

This is the mean of a Gaussian posterior. The errors of all scores are equally uncertain, a pass is `strength` times as
noisy as one of them, and the error that all coalitions share is as uncertain as the sum over the patches of one (N / 4
is added to every entry). Without passes the map stays as it is; with many the prediction no longer counts, and the
scores are those of least squares.

Shapes: B images, n coalitions, N patches, K classes of each image, D = embedding_dim.
"""

import torch
from torch import Tensor

from .additive import embedding_of, phi_and_base
from .attribution import evidence_of, rule_named
from .classifiers import SplitClassifier
from .configuration_tve import TVEConfig
from .patches import average_over_neighborhoods


@torch.no_grad()
def correction(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    kept: Tensor,
    removed: Tensor,
    class_idx: Tensor,
    config: TVEConfig,
    num_samples: int,
    rule: str,
    removal: str = "zero",
    chunk_size: int | None = None,
    **inputs: Tensor,
) -> Tensor:
    """What `num_samples` masked passes an image add to its scores; the same passes serve all its classes and heads.

    All images get the same coalitions, always the same, so that an answer depends neither on the batch nor on the call.

    Args:
        classifier: whose backbone the explainer was trained for.
        pixel_values: (B, 3, H, W), on the classifier's device.
        kept, removed: what the explainer predicts, (B, N, D) each.
        class_idx: classes to explain, (B, K) int64.
        config: of the explainer, with backgrounds="random".
        num_samples: n, masked passes for each image.
        rule: key of `attribution.RULES` whose scores are to be corrected.
        removal: what replaces removed pixels, a key of `patches.REMOVALS`.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Returns:
        The correction, (B, K, N) float32, to be added to what `transfer` gives.

    Raises:
        ValueError: If the explainer has antithetical backgrounds, the rule scales its maps, or n is below 1.
    """
    check_refinement(config, num_samples, rule)
    how, distribution = rule_named(rule), config.refine_distribution
    grid, prob = config.grid_shape, distribution.keep_prob
    pairs = num_samples + num_samples % 2
    keep = distribution.draw(1, pairs, grid, torch.Generator().manual_seed(0))[0, :num_samples]  # (n, N)
    masks = keep.to(pixel_values.device).expand(len(pixel_values), -1, -1)
    embeddings = classifier.embed_masked(pixel_values, masks, grid, removal, chunk_size, **inputs)  # (B, n, D)
    predicted = embedding_of(masks, *phi_and_base(kept, removed, config.distribution.keep_prob), prob)
    true, foretold = (evidence_of(how, e, classifier, class_idx) for e in (embeddings, predicted))  # (B, K, n)
    design = keep.double() - prob
    kernel = design @ design.T + design.shape[1] / 4 + config.refine_strength * torch.eye(num_samples)
    share = torch.linalg.solve(kernel, design).to(true)  # (n, N)
    added = (true - foretold) @ share
    return average_over_neighborhoods(added, grid, config.hops) if how.averaged else added


def check_refinement(config: TVEConfig, num_samples: int, rule: str) -> None:
    """Refuse what cannot be refined.

    Raises:
        ValueError: Saying what to do instead.
    """
    if config.backgrounds != "random":
        raise ValueError(
            "refine needs an explainer of random backgrounds, which foretells any coalition, and this one has "
            f"backgrounds={config.backgrounds!r}; train one with `tve-hf pretrain --backgrounds random`, or leave "
            "refine out."
        )
    if num_samples < 1:
        raise ValueError(f"refine is {num_samples}; give the number of masked passes, for example 25.")
    if rule_named(rule).standardized or not rule_named(rule).kept:
        raise ValueError(
            f"refine corrects differences of evidence, but the rule {rule!r} is none; choose prob or logit."
        )
