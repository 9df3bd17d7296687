"""The ViT-Shapley explainer: predicts Shapley values of all patches for all classes of one classifier, in one pass.

"Learning to Estimate Shapley Values with Vision Transformers", arXiv 2206.05282. In the game of an image and a class,
v(s) is the class's probability when only the patches in s are kept. The explainer learns from sampled coalitions s
what weighted least squares would find for each image by itself: values phi for which null + sum of phi over s is close
to v(s), where null = v(nothing).

The paper's explainer is a copy of the classifier, all of whose weights are tuned. This one reads the features of the
classifier's own pass, through the same layers as TVE's "backbone" trunk, so that the two compare like with like.

Shapes: B images, N = rows * cols patches (row-major), K coalitions, C classes.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from ..modeling_tve import TVEPreTrainedModel
from ..trunk_backbone import TVEBackboneReader, TVEDifferenceHead
from .configuration import ShapleyConfig


@dataclass
class ShapleyExplainerOutput(ModelOutput):
    """Output of [`ShapleyExplainer`].

    Args:
        loss: the weighted least squares objective, scalar, float32; only with coalitions.
        shapley_values: predicted Shapley value of each patch for each class, differences of probability, (B, N, C).
    """

    loss: torch.Tensor | None = None
    shapley_values: torch.Tensor | None = None


class ShapleyTrunk(TVEBackboneReader):
    """One value per patch and class, from what the backbone has computed already; 0 at first."""

    def __init__(self, config: ShapleyConfig) -> None:
        super().__init__(config)
        self.values = TVEDifferenceHead(config.hidden_size, len(config.id2label or {}))

    def forward(
        self,
        pixel_values: torch.Tensor,
        features: tuple[torch.Tensor, ...] | None,
        embeddings: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return values (B, N, C) that do not add up to anything yet."""
        hidden, _ = self.read(pixel_values, features, embeddings)
        return self.values(hidden)


class ShapleyExplainer(TVEPreTrainedModel):
    """Predict the Shapley values of all patches of an image for all classes of the classifier it was trained for."""

    config_class = ShapleyConfig
    config: ShapleyConfig
    null: torch.Tensor

    def __init__(self, config: ShapleyConfig) -> None:
        super().__init__(config)
        self.trunk = ShapleyTrunk(config)
        # Probabilities of the empty image, to be filled before training.
        self.register_buffer("null", torch.zeros(len(config.id2label or {})))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ShapleyExplainer):
            init.zeros_(module.null)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        features: tuple[torch.Tensor, ...] | None = None,
        embeddings: torch.Tensor | None = None,
        probabilities: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        coalition_values: torch.Tensor | None = None,
    ) -> ShapleyExplainerOutput:
        """Predict Shapley values; with coalitions, also the training loss.

        The values are efficient: phi += (grand - null - sum phi) / N, so that they add up to grand - null for each
        image and class (Ruiz et al., additive efficient normalisation). The loss is

        L = N * mean over images, coalitions and classes of (null + sum of phi over s - v(s))^2

        Args:
            pixel_values: normalised images, (B, channels, height, width).
            features: feature maps of the backbone, (B, C_i, h_i, w_i), in the order of `config.feature_names`.
            embeddings: G(x), (B, D).
            probabilities: grand = v(all patches), of each class of the whole image, (B, C).
            keep: coalitions s, boolean (B, K, N), drawn by the Shapley kernel.
            coalition_values: v(s), (B, K, C).

        Raises:
            ValueError: an input is missing or has the wrong shape.
        """
        pixel_values = self._check_pixel_values(pixel_values)
        values = self.trunk(pixel_values, features, embeddings).float()  # (B, N, C)
        batch, num_patches, num_labels = values.shape
        # N values share a probability of at most 1: left at the size of the layer's outputs, steps of a usual learning
        # rate would be larger than the values themselves.
        values = values / num_patches
        grand = _checked("probabilities", probabilities, (batch, num_labels))
        null = self.null.float()
        values = values + ((grand - null - values.sum(1)) / num_patches)[:, None]
        if keep is None and coalition_values is None:
            return ShapleyExplainerOutput(shapley_values=values)
        num_masks = keep.shape[1] if keep is not None and keep.ndim == 3 else 1
        present = _checked("keep", keep, (batch, num_masks, num_patches))
        worth = _checked("coalition_values", coalition_values, (batch, num_masks, num_labels))
        predicted = null + present @ values  # (B, K, C)
        loss = num_patches * (predicted - worth).square().mean()
        return ShapleyExplainerOutput(loss=loss, shapley_values=values)


def _checked(name: str, tensor: torch.Tensor | None, expected: tuple[int, ...]) -> torch.Tensor:
    """Return an input in float32; raises ValueError if it is missing or has another shape."""
    if tensor is None or tuple(tensor.shape) != expected:
        state = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {state}; pass shape {expected}, one row for each image.")
    return tensor.float()


__all__ = ["ShapleyExplainer", "ShapleyExplainerOutput"]
