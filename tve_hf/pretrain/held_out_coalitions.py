"""Watch an explainer of random backgrounds while it learns: how well it foretells held-out images' embeddings."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..attribution import RANDOM_CHOICES, of_class, rule_of
from ..classifiers import SplitClassifier
from ..configuration_tve import CoalitionName, TVEConfig
from ..refinement import Refinement
from ..sampling import sampled_meta_attribution
from ..trunk_backbone import embedding_of, phi_and_base
from ..verification import pearson, spearman
from .held_out import HeldOut
from .labels import embed_coalitions

NUM_COALITIONS = 64  # of each image, to foretell
NUM_SAMPLES = 256  # of the maps to compare with
NUM_REFINED = 25  # masked passes, when the coalitions of refinement are chosen


class HeldOutCoalitions(HeldOut):
    """Held-out images with embeddings of fresh coalitions and sampled meta-attributions, which are computed once.

    Args:
        classifier, pixel_values, config: as for `HeldOut`.
    """

    reference = "sampled"
    measures = ("embedding_r2", "logit_r2", "logit_pearson", "spearman", "fidelity_gap", "sampled_fidelity_gap")

    @torch.no_grad()
    def __init__(self, classifier: SplitClassifier, pixel_values: Tensor, config: TVEConfig):
        self.classifier, self.pixel_values, self.config = classifier, pixel_values, config
        self.seen = classifier(pixel_values)
        self.class_idx = self.seen.logits.argmax(-1)
        how, grid = config.distribution, config.grid_shape
        drawn = how.draw(len(pixel_values), NUM_COALITIONS, grid, torch.Generator().manual_seed(1))
        self.coalitions = drawn.to(pixel_values.device)
        self.embeddings = embed_coalitions(classifier, pixel_values, self.coalitions, config)
        sampled = sampled_meta_attribution(classifier, pixel_values, grid, NUM_SAMPLES, how, config.label_removals[0])
        self.exact = sampled.kept, sampled.removed
        self._read_exact()

    def _read_exact(self) -> None:
        self.exact_scores = self._scores(self.exact)
        self.exact_gap = self._gap(self.exact_scores)

    @torch.no_grad()
    def compare(self, explainer: Callable[..., Any]) -> tuple[dict[str, float], Image.Image]:
        """Compare predicted embeddings of coalitions with true ones, and maps with those of sampling.

        Returns:
            Medians of `embedding_r2`, the share of an image's variance over coalitions that the prediction accounts
            for, `logit_r2` and `logit_pearson`, of the predicted class's logit, and `spearman` with sampled maps;
            means of `fidelity_gap` and `sampled_fidelity_gap`; and a picture of some images beside both maps.
        """
        output = explainer(
            pixel_values=self.pixel_values, features=self.seen.features, embeddings=self.seen.embeddings
        )
        prob = self.config.distribution.keep_prob
        predicted = embedding_of(self.coalitions, *phi_and_base(output.kept, output.removed, prob), prob)
        logits, true_logits = (self._logits(values) for values in (predicted, self.embeddings))  # (B, K) each
        scores = self._scores((output.kept, output.removed))
        row = {
            "embedding_r2": r_squared(predicted, self.embeddings).median().item(),
            "logit_r2": r_squared(logits[..., None], true_logits[..., None]).median().item(),
            "logit_pearson": pearson(logits, true_logits).nanmedian().item(),
            "spearman": spearman(scores, self.exact_scores).nanmedian().item(),
            "fidelity_gap": self._gap(scores),
            "sampled_fidelity_gap": self.exact_gap,
        }
        return row, self._picture(scores)

    @torch.no_grad()
    def fit_rule(self, explainer: Callable[..., Any]) -> str:
        """Put the rule that makes the most faithful maps of these images into the config, and return it.

        From then on sampled maps are read by it too.
        """
        output = explainer(
            pixel_values=self.pixel_values, features=self.seen.features, embeddings=self.seen.embeddings
        )
        gaps = {}
        for rule in RANDOM_CHOICES:
            self.config.rule = rule
            gaps[rule] = self._gap(self._scores((output.kept, output.removed)))
        self.config.rule = max(gaps, key=lambda rule: gaps[rule])
        self._read_exact()
        return self.config.rule

    @torch.no_grad()
    def fit_refinement(self, explainer: Callable[..., Any]) -> CoalitionName:
        """Put the coalitions by which `refine` makes the most faithful maps of these images into the config.

        Returns:
            A key of `coalitions.COALITIONS`.
        """
        output = explainer(
            pixel_values=self.pixel_values, features=self.seen.features, embeddings=self.seen.embeddings
        )
        pair, rule = (output.kept, output.removed), rule_of(self.config)
        scores = self._scores(pair)
        gaps: dict[CoalitionName, float] = {}
        names: list[CoalitionName] = ["independent", self.config.coalitions]
        for name in dict.fromkeys(names):
            self.config.refine_coalitions = name
            refinement = Refinement(self.classifier, self.pixel_values, *pair, self.config, NUM_REFINED)
            gaps[name] = self._gap(scores + refinement.correction(self.classifier, self.class_idx, rule))
        self.config.refine_coalitions = max(gaps, key=lambda name: gaps[name])
        return self.config.refine_coalitions

    def _logits(self, embeddings: Tensor) -> Tensor:
        return of_class(self.classifier.head(embeddings.to(self.classifier.dtype)).float(), self.class_idx)


def r_squared(predicted: Tensor, true: Tensor) -> Tensor:
    """1 - sum |predicted - true|^2 / sum |true - its mean over coalitions|^2, (B, K, D) -> (B,)."""
    predicted, true = predicted.float(), true.float()
    spread = (true - true.mean(1, keepdim=True)).square().sum((1, 2))
    return 1 - (predicted - true).square().sum((1, 2)) / spread.clamp(min=1e-12)
