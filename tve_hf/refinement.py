"""Correct a predicted map by some masked passes of the classifier: ridge regression towards the prediction.

An explainer of random backgrounds foretells G(S) of every coalition S, and so the evidence v(S) of a class that a head
finds in it. Of n coalitions the true v(S) is computed, and what the prediction misses, r = v - v_hat, is shared out
over the patches: the correction of the scores is the delta of

    minimise over delta, b:   |r - b - X delta|^2 / strength + |delta|^2 + b^2 / (N / 4),        X = 1[z in S] - p.

This is the mean of a Gaussian posterior. The errors of all scores are equally uncertain, a pass is `strength` times as
noisy as one of them, and the error b that all coalitions share is as uncertain as a sum over the patches of one.
Without passes the map stays as it is; with many the prediction no longer counts, and the scores are those of least
squares.

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


class Refinement:
    """The masked passes of some images, made once, which correct their maps under every rule, class and head.

    All images get the same coalitions, in every call, so that an answer depends on nothing but its image.

    Args:
        classifier: whose backbone the explainer was trained for.
        pixel_values: (B, 3, H, W), on the classifier's device.
        kept, removed: what the explainer predicts, (B, N, D) each.
        config: of the explainer, with backgrounds="random".
        num_samples: n, masked passes for each image.
        removal: what replaces removed pixels, a key of `patches.REMOVALS`.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Raises:
        ValueError: If the explainer has antithetical backgrounds, or n is below 1.
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
        self.design = torch.cat(
            [torch.ones(num_samples, 1), keep.float() - how.keep_prob], dim=1
        ).double()  # (n, 1 + N)

    @torch.no_grad()
    def correction(
        self, classifier: SplitClassifier, class_idx: Tensor, rule: str, strength: float | None = None
    ) -> Tensor:
        """What the passes add to the scores that `transfer` gives, (B, K, N); or (B, N) for one class of each image.

        Args:
            classifier: whose head is asked, on the same backbone.
            class_idx: classes, (B, K) or (B,) int64.
            rule: key of `attribution.RULES`.
            strength: how noisy a pass is, in units of the uncertainty of a score; that of the config if None.

        Raises:
            ValueError: If the rule scales its maps, or reads removed alone.
        """
        how = rule_named(rule)
        if how.standardized or not how.kept:
            raise ValueError(
                f"refine corrects differences of evidence, which the rule {rule!r} is not; choose prob or logit."
            )
        classes = class_idx if class_idx.ndim == 2 else class_idx.unsqueeze(1)
        true, foretold = (evidence_of(how, e, classifier, classes) for e in (self.embeddings, self.predicted))
        share = self._share(strength or self.config.refine_strength)
        added = (true - foretold) @ share.to(true)  # (B, K, N)
        if how.averaged:
            added = average_over_neighborhoods(added, self.config.grid_shape, self.config.hops)
        return added if class_idx.ndim == 2 else added.squeeze(1)

    def _share(self, strength: float) -> Tensor:
        """What each pass's residual adds to each score, (n, N)."""
        precision = torch.ones(self.design.shape[1], dtype=torch.float64)
        precision[0] = 4 / (self.design.shape[1] - 1)
        normal = self.design.T @ self.design / strength + precision.diag()
        return torch.linalg.solve(normal, self.design.T / strength)[1:].T


def check_refinement(config: TVEConfig, num_samples: int) -> None:
    """Refuse what cannot be refined.

    Raises:
        ValueError: If the explainer does not foretell coalitions, or no pass is asked for; with what to do instead.
    """
    if config.backgrounds != "random":
        raise ValueError(
            "refine needs an explainer of random backgrounds, which foretells any coalition, and this one has "
            f"backgrounds={config.backgrounds!r}; train one with `tve-hf pretrain --backgrounds random`, or leave "
            "refine out."
        )
    if num_samples < 1:
        raise ValueError(f"refine is {num_samples}; give the number of masked passes, for example 25.")


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
