"""Watch an explainer on held-out images while it learns: numbers beside the exact attribution, and pictures."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..attribution import exact_meta_attribution, rule_of, transfer
from ..classifiers import SplitClassifier
from ..configuration_tve import TVEConfig
from ..fidelity import fidelity
from ..verification import prediction_errors, spearman
from ..visualization import Photograph, color_limit, gallery

NUM_PICTURES = 4


class HeldOut:
    """Held-out images with their exact meta-attributions, which are computed once.

    Maps, predicted or not, are those of the explainer's own rule.

    Args:
        classifier: in full precision, reading the explainer's feature maps.
        pixel_values: the images, (B, 3, H, W).
        config: the explainer's.
    """

    reference = "exact"  # what the predicted maps are compared with
    measures = ("kept_error", "removed_error", "spearman", "epsilon", "fidelity_gap", "exact_fidelity_gap")

    @torch.no_grad()
    def __init__(self, classifier: SplitClassifier, pixel_values: Tensor, config: TVEConfig):
        self.classifier, self.pixel_values, self.config = classifier, pixel_values, config
        self.seen = classifier(pixel_values)
        self.class_idx = self.seen.logits.argmax(-1)
        self.exact = exact_meta_attribution(classifier, pixel_values, config.grid_size, config.hops)
        self.exact_scores = self._scores(self.exact)
        self.exact_gap = self._gap(self.exact_scores)

    def _scores(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        config = self.config
        return transfer(*pair, self.classifier, self.class_idx, rule_of(config), config.grid_size, config.hops)

    def _gap(self, scores: Tensor) -> float:
        """Mean Fidelity+ AUC - Fidelity- AUC."""
        levels, grid = min(14, self.config.num_patches + 1), self.config.grid_shape
        return fidelity(self.classifier, self.pixel_values, scores, self.class_idx, levels, grid).gap.mean().item()

    @torch.no_grad()
    def compare(self, explainer: Callable[..., Any]) -> tuple[dict[str, float], Image.Image]:
        """Compare predicted with exact, all patches.

        Returns:
            `kept_error` and `removed_error` (means), `spearman` of the maps and `epsilon` of Theorem 1 (medians),
            `fidelity_gap` and `exact_fidelity_gap` of the maps (means); and a picture of some images beside their
            exact and predicted maps.
        """
        output = explainer(
            pixel_values=self.pixel_values, features=self.seen.features, embeddings=self.seen.embeddings
        )
        predicted = output.kept, output.removed
        errors = prediction_errors(self.classifier, self.pixel_values, self.class_idx, predicted, self.exact)
        scores = self._scores(predicted)
        row = {
            "kept_error": errors["kept_error"].mean().item(),
            "removed_error": errors["removed_error"].mean().item(),
            "spearman": spearman(scores, self.exact_scores).nanmedian().item(),
            "epsilon": errors["epsilon"].median().item(),
            "fidelity_gap": self._gap(scores),
            "exact_fidelity_gap": self.exact_gap,
        }
        return row, self._picture(scores)

    def _picture(self, scores: Tensor) -> Image.Image:
        rows = []
        grid = self.config.grid_shape
        for image, *maps in zip(self.pixel_values[:NUM_PICTURES], self.exact_scores, scores, strict=False):
            photograph = Photograph(self._photo(image))
            exact, predicted = (values.float().unflatten(0, grid) for values in maps)
            limit = color_limit(exact)  # of both, so that one too weak looks so
            rows.append([photograph.image(), *(photograph.overlay(values, limit) for values in (exact, predicted))])
        return gallery(rows, ["image", self.reference, "predicted"])

    def _photo(self, pixel_values: Tensor) -> Image.Image:
        """What the classifier sees of an image, (3, H, W), in its own colours."""
        mean, std = self.config.image_mean or [0.5] * 3, self.config.image_std or [0.5] * 3
        values = pixel_values.float().cpu() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
        pixels = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        return Image.fromarray(pixels)
