"""Correct a predicted map by some masked passes of the classifier: what these say that the map does not.

An explainer of random backgrounds foretells G(S) of every coalition S, and so the evidence v(S) of a class that a head
finds in it. Of n coalitions the true v(S) is computed, and what the prediction misses, r = v - v_hat, is shared out
over the patches:

    r(S) = b + a sum_z x_z phi_z + sum_z x_z delta_z + noise,    x_z = 1[z in S] - p,    delta_z ~ N(0, tau^2).

The mean of delta given r is added to the scores. How much of r is delta and how much noise (what no map of single
patches can account for) differs from head to head and from image to image, so it is read from r itself: the mean is
one over noise / tau^2 too, each as likely as the restricted likelihood (Patterson & Thompson, Biometrika 1971) finds
it. Where r is all noise, the map stays as it is. Of b, a shift of all coalitions, and a, a map that is too flat or too
steep as a whole, nothing is added: of few passes a is so uncertain that it turns maps over.

Shapes: B images, n coalitions, N patches, K classes of each image, D = embedding_dim.
"""

import torch
from torch import Tensor

from .attribution import check_rule, evidence_of, rule_named
from .classifiers import SplitClassifier
from .coalitions import Coalitions
from .configuration_tve import TVEConfig
from .faithfulness import check_coalitions
from .patches import average_over_neighborhoods
from .trunk_backbone import embedding_of, phi_and_base

LEAST_PASSES = 3  # two are spent on b and a
NOISES = torch.logspace(-1, 4, 11, dtype=torch.float64)  # noise / tau^2: from next to none to nothing but noise


class Refinement:
    """The masked passes of some images, made once, which correct their maps under every rule, class and head.

    All images get the same coalitions, in every call, so that an answer depends on nothing but its image.

    Args:
        classifier: whose backbone the explainer was trained for.
        pixel_values: (B, 3, H, W), on the classifier's device.
        kept, removed: what the explainer predicts, (B, N, D) each.
        config: of the explainer, with backgrounds="random".
        num_samples: n, masked passes for each image; `LEAST_PASSES` at least.
        removal: what replaces removed pixels, a key of `patches.REMOVALS`.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Raises:
        ValueError: If the explainer has antithetical backgrounds, or n is below `LEAST_PASSES`.
    """

    @torch.no_grad()
    def __init__(
        self,
        classifier: SplitClassifier,
        pixel_values: Tensor,
        kept: Tensor,
        removed: Tensor,
        config: TVEConfig,
        num_samples: int,
        removal: str = "zero",
        chunk_size: int | None = None,
        **inputs: Tensor,
    ):
        check_refinement(config, num_samples)
        self.config = config
        how = Coalitions(config.refine_coalitions, scale=config.coalition_scale)
        pairs = num_samples + num_samples % 2
        keep = how.draw(1, pairs, config.grid_shape, torch.Generator().manual_seed(0))[0, :num_samples]  # (n, N)
        masks = keep.to(pixel_values.device).expand(len(pixel_values), -1, -1)
        self.embeddings = classifier.embed_masked(
            pixel_values, masks, config.grid_shape, removal, chunk_size, **inputs
        )  # (B, n, D)
        phi, base = phi_and_base(kept, removed, config.distribution.keep_prob)
        self.predicted = embedding_of(masks, phi, base, how.keep_prob)  # (B, n, D)
        self.kept, self.removed = kept, removed
        self.design = (keep.float() - how.keep_prob).double()  # x, (n, N)

    @torch.no_grad()
    def correction(self, classifier: SplitClassifier, class_idx: Tensor, rule: str) -> Tensor:
        """What the passes add to the scores that `transfer` gives, (B, K, N); or (B, N) for one class of each image.

        Args:
            classifier: whose head is asked, on the same backbone.
            class_idx: classes, (B, K) or (B,) int64.
            rule: key of `attribution.RULES`.

        Raises:
            ValueError: If the rule scales its maps, or reads removed alone.
        """
        how = rule_named(rule)
        if how.standardized or not how.kept:
            raise ValueError(
                f"refine corrects differences of evidence, which the rule {rule!r} is not; choose prob or logit."
            )
        classes = class_idx if class_idx.ndim == 2 else class_idx.unsqueeze(1)
        given = self.embeddings, self.predicted, self.kept, self.removed
        true, foretold, kept, removed = (evidence_of(how, e, classifier, classes).cpu().double() for e in given)
        added = missed_by(how.subtract(kept, removed), true - foretold, self.design)  # (B, K, N)
        added = added.to(class_idx.device, torch.float32)
        if how.averaged:
            added = average_over_neighborhoods(added, self.config.grid_shape, self.config.hops)
        return added if class_idx.ndim == 2 else added.squeeze(1)


def missed_by(scores: Tensor, residuals: Tensor, design: Tensor) -> Tensor:
    """The posterior mean of delta, what the scores miss of each patch; see above.

    Args:
        scores: phi, (..., N) float64.
        residuals: r of each coalition, (..., n) float64, n at least `LEAST_PASSES`.
        design: x, (n, N) float64.

    Returns:
        delta, (..., N).
    """
    ones = torch.ones_like(residuals)
    fixed = torch.stack([ones, scores @ design.T], dim=-1)  # (..., n, 2)
    basis, _, _ = torch.linalg.svd(fixed, full_matrices=False)

    def without_fixed(values: Tensor) -> Tensor:
        return values - basis @ (basis.mT @ values)

    left, singular, right = torch.linalg.svd(without_fixed(design), full_matrices=False)
    missed = without_fixed(residuals.unsqueeze(-1))
    along = (left.mT @ missed).squeeze(-1)  # (..., k), k = min(n, N)
    beyond = (missed.square().sum((-2, -1)) - along.square().sum(-1)).clamp(min=0)  # of no map, (...)

    spread = singular.square().unsqueeze(-2) + NOISES.unsqueeze(-1)  # variances over tau^2, (..., noises, k)
    squares = (along.square().unsqueeze(-2) / spread).sum(-1) + beyond.unsqueeze(-1) / NOISES
    # n - 2 of them in all, without b and a: those of `spread` and others, or fewer, that are nothing but noise.
    free = len(design) - 2
    determinant = spread.log().sum(-1) + (free - spread.shape[-1]) * NOISES.log()
    likelihood = -(free * squares.clamp(min=1e-300).log() + determinant) / 2  # log, tau^2 being the likeliest
    weights = likelihood.softmax(-1).unsqueeze(-1)  # (..., noises, 1)
    shrunk = (weights / spread).sum(-2) * singular * along
    return (right.mT @ shrunk.unsqueeze(-1)).squeeze(-1)


def check_refinement(config: TVEConfig, num_samples: int) -> None:
    """Refuse what cannot be refined.

    Raises:
        ValueError: If the explainer does not foretell coalitions, or too few passes are asked for; with the remedy.
    """
    if config.backgrounds != "random":
        raise ValueError(
            "refine needs an explainer of random backgrounds, which foretells any coalition, and this one has "
            f"backgrounds={config.backgrounds!r}; train one with `tve-hf pretrain --backgrounds random`, or leave "
            "refine out."
        )
    if num_samples < LEAST_PASSES:
        raise ValueError(
            f"refine is {num_samples}; of fewer than {LEAST_PASSES} masked passes nothing is left for single patches, "
            "give for example 25."
        )


def check_asked(
    config: TVEConfig, method_kwargs: dict | None, rule: str | None, verify: int | None, refine: int | None
) -> None:
    """Refuse what an explainer of this config cannot give; arguments as for a call of the pipeline.

    Raises:
        ValueError: With what to do instead.
    """
    if method_kwargs:
        raise ValueError("method_kwargs are of another method; pass method=, or rule= and refine= for an explainer.")
    if rule is not None:
        check_rule(config, rule)
    if verify is not None and config.backgrounds == "random":
        check_coalitions(verify)
    if refine is not None:
        check_refinement(config, refine)
