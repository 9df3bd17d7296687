"""The TVE explainer: predicts the meta-attribution of all patches of an image in one pass.

"Learning Meta-attribution for Transferable Vision Explainer", arXiv 2312.15359. For a frozen backbone G and every
patch z with neighbourhood N(z), the explainer E approximates (Eq. 6)

    kept_z = G(N(z); x)        removed_z = G(Z \\ N(z); x)

or, with `config.backgrounds="random"`, the means over random backgrounds (Eq. 3; the additive form in `coalitions.py`)

    kept_z = E[G(S; x) | z in S]        removed_z = E[G(S; x) | z not in S]

Shapes: B images, N = rows * cols patches (row-major), D = embedding_dim, k sampled patches, K coalitions of patches.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ViTMAEForPreTraining
from transformers import initialization as init
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_tve import BackboneReaderConfig, TVEConfig
from .trunk_backbone import (
    TVEBackboneReader,
    TVEBackboneTrunk,
    TVEDifferenceHead,
    efficient,
    embedding_of,
    kept_and_removed,
)
from .trunk_vit_mae import TVEMAETrunk, sincos_positions
from .weights import check_report, checked


@dataclass
class TVEExplainerOutput(ModelOutput):
    """Output of [`TVEExplainer`].

    Args:
        loss: Eq. 8, scalar, float32, in squared units of the embedding; only when labels are given. For random
            backgrounds the mean squared distance of the embeddings of coalitions from their labels.
        kept_loss: its first term, the mean squared distance of kept from its labels.
        removed_loss: its second term, the same for removed.
        kept: predicted embedding with only the neighbourhood of each patch visible, (B, N, D), or (B, k, D) of the
            patches asked for.
        removed: predicted embedding with only the neighbourhood of each patch hidden, likewise.
    """

    loss: torch.Tensor | None = None
    kept_loss: torch.Tensor | None = None
    removed_loss: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    removed: torch.Tensor | None = None


TRUNKS: dict[str, type[TVEBackboneTrunk] | type[TVEMAETrunk]] = {"backbone": TVEBackboneTrunk, "vit_mae": TVEMAETrunk}


class TVEPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving of the explainer."""

    config_class: type[BackboneReaderConfig] = TVEConfig
    config: BackboneReaderConfig
    base_model_prefix = "tve"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TVELayer", "ViTMAELayer", "ViTMAEEmbeddings", "TVEMixerLayer"]

    def __init__(self, config: BackboneReaderConfig) -> None:
        super().__init__(config)
        self.input_shape = (config.num_channels, *config.image_shape)  # of an image

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as any model of transformers, but only whole safetensors files that hold what the config describes.

        Raises:
            OSError: files are missing, damaged or out of reach.
            ValueError: another kind of model or format, or config and weights contradict each other, unless
                `ignore_mismatched_sizes` allows that.
        """
        if pretrained_model_name_or_path is not None:
            kwargs = checked(cls, pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    # transformers calls this when it has read the weights, before it takes memory for those that are missing: a
    # config that describes a model of terabytes is refused here.
    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        name = load_config.pretrained_model_name_or_path
        if name is not None and not load_config.ignore_mismatched_sizes:
            check_report(name, loading_info.to_dict())
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    # transformers calls this for freshly built weights and for those missing from a checkpoint; the functions of
    # `init` leave loaded ones alone.
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TVEDifferenceHead):
            init.zeros_(module.weight)
        elif isinstance(module, TVEBackboneReader):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            for tensor in module.starting_at_zero() if isinstance(module, TVEBackboneTrunk) else ():
                init.zeros_(tensor)
        elif isinstance(module, TVEMAETrunk) and module.empty_embedding is not None:
            init.zeros_(module.empty_embedding)
        elif isinstance(module, ViTMAEDecoder):
            init.copy_(module.decoder_pos_embed, sincos_positions(module.decoder_pos_embed))

    def get_input_embeddings(self) -> Any:
        """None: there is no table of tokens, as what shards models over processes asks for."""
        return None

    def _check_pixel_values(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        if pixel_values is None:
            raise ValueError("pixel_values are missing, pass normalised images of shape (B, channels, height, width).")
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, expected (B, {expected}); "
                f"resize with the processor of the explainer's checkpoint."
            )
        return pixel_values


class TVEExplainer(TVEPreTrainedModel):
    """Predict kept and removed for all patches of an image, [ĝ, ĥ] = E(x | θ).

    What is read besides the pixels, and what the prediction starts from, is the business of `config.trunk`.
    """

    config: TVEConfig

    def __init__(self, config: TVEConfig) -> None:
        super().__init__(config)
        self.trunk: TVEBackboneTrunk | TVEMAETrunk = TRUNKS[config.trunk](config)
        # Asked of the config once, not in each pass.
        self.grid_shape, self.is_efficient = config.grid_shape, config.is_efficient
        self.keep_prob = config.distribution.keep_prob
        self.post_init()

    @classmethod
    def from_vit_mae(cls, pretrained: str, config: TVEConfig) -> "TVEExplainer":
        """Build an explainer whose Mask-AutoEncoders start from a pre-trained one; its heads start fresh.

        Args:
            pretrained: name or path of a `ViTMAEForPreTraining` checkpoint.
            config: with `trunk="vit_mae"` and a `mae_config` of the checkpoint's shape.

        Raises:
            ValueError: the trunk is another one, or a weight of the checkpoint does not fit.
        """
        explainer = cls(config)
        if not isinstance(explainer.trunk, TVEMAETrunk):
            raise ValueError(f'trunk="{config.trunk}" has no Mask-AutoEncoder to initialise, set trunk="vit_mae".')
        checkpoint = ViTMAEForPreTraining.from_pretrained(pretrained)
        autoencoders: Iterable[Any] = explainer.trunk.autoencoders
        for autoencoder in autoencoders:
            autoencoder.load_vit_mae(checkpoint, pretrained)
        return explainer

    @property
    def empty_embedding(self) -> torch.Tensor | None:
        """Embedding of the empty image, (D,), a saved buffer to be filled before training; None if not used."""
        return self.trunk.empty_embedding

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        features: tuple[torch.Tensor, ...] | None = None,
        embeddings: torch.Tensor | None = None,
        patch_idx: torch.Tensor | None = None,
        kept_labels: torch.Tensor | None = None,
        removed_labels: torch.Tensor | None = None,
        label_weights: torch.Tensor | None = None,
        coalitions: torch.Tensor | None = None,
        coalition_labels: torch.Tensor | None = None,
    ) -> TVEExplainerOutput:
        """Predict kept and removed, of all patches or of those asked for; with labels, also the loss (Eq. 8).

        L = mean over images and sampled patches z of ||kept_z - kept_labels_z||^2 + ||removed_z - removed_labels_z||^2

        Args:
            pixel_values: normalised images, (B, channels, height, width).
            features: feature maps of the backbone, (B, C_i, h_i, w_i), in the order of `config.feature_names`. Like
                `embeddings`, needed by the `"backbone"` trunk and ignored by the other.
            embeddings: G(x), (B, D).
            patch_idx: row-major indices of the patches to predict, int64, (B, k); None means all N.
            kept_labels: exact G(N(z); x) of these patches, (B, k, D).
            removed_labels: exact G(Z \\ N(z); x) of these patches, (B, k, D).
            label_weights: of the squares in each dimension of kept and of removed, (2, D); 1 by default. For random
                backgrounds (D,).
            coalitions: random backgrounds: sets S of patches, boolean, (B, K, N).
            coalition_labels: G(S; x) of these, (B, K, D).

        Raises:
            ValueError: an input that the trunk needs is missing or has the wrong shape, or labels are incomplete.
        """
        pixel_values = self._check_pixel_values(pixel_values)
        if self.config.backgrounds == "random":
            if kept_labels is not None or removed_labels is not None:
                raise ValueError('backgrounds="random" learns from coalitions, pass coalition_labels.')
            read = features, embeddings, patch_idx
            return self._over_random_backgrounds(pixel_values, *read, coalitions, coalition_labels, label_weights)
        if coalition_labels is not None:
            raise ValueError('backgrounds="antithetical" learns from patches, pass kept_labels and removed_labels.')
        kept, removed = self.trunk(pixel_values, features, embeddings, patch_idx)  # (B, k, D) each
        if kept_labels is None and removed_labels is None:
            return TVEExplainerOutput(kept=kept, removed=removed)
        if kept_labels is None or removed_labels is None:
            raise ValueError("kept_labels and removed_labels are both needed for the loss, pass both or no labels.")
        of_kept, of_removed = (None, None) if label_weights is None else label_weights
        kept_loss = _mean_squared_distance(kept, kept_labels, of_kept)
        removed_loss = _mean_squared_distance(removed, removed_labels, of_removed)
        return TVEExplainerOutput(
            loss=kept_loss + removed_loss, kept_loss=kept_loss, removed_loss=removed_loss, kept=kept, removed=removed
        )

    def _over_random_backgrounds(
        self,
        pixel_values: torch.Tensor,
        features: tuple[torch.Tensor, ...] | None,
        embeddings: torch.Tensor | None,
        patch_idx: torch.Tensor | None,
        coalitions: torch.Tensor | None,
        labels: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> TVEExplainerOutput:
        """`forward` for `backgrounds="random"`."""
        phi, base = self.trunk(pixel_values, features, embeddings)  # (B, N, D) and (B, D)
        if self.is_efficient:
            if embeddings is None or self.empty_embedding is None:
                raise ValueError(
                    'coalitions="shapley" needs embeddings, G(x) of shape (B, D); pass the classifier\'s.'
                )
            phi, base = efficient(phi, self.empty_embedding, embeddings, self.keep_prob)
        asked = phi if patch_idx is None else phi.take_along_dim(patch_idx[..., None], dim=1)
        kept, removed = kept_and_removed(asked, base, self.keep_prob)
        if labels is None:
            return TVEExplainerOutput(kept=kept, removed=removed)
        if coalitions is None:
            raise ValueError("coalition_labels are of unknown coalitions, pass coalitions, boolean (B, K, N), too.")
        loss = _mean_squared_distance(embedding_of(coalitions, phi, base, self.keep_prob), labels, weights)
        return TVEExplainerOutput(loss=loss, kept=kept, removed=removed)


def _mean_squared_distance(
    predicted: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the mean over (B, k) of the squared distance, weighted (D,), of predicted and labels, (B, k, D)."""
    if predicted.shape != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected {tuple(predicted.shape)}; "
            f"pass patch_idx (B, k) to name the patches that they are of."
        )
    # float32 whatever the weights: a sum of D squares loses most of its digits in bfloat16.
    squares = (predicted.float() - labels.float()).square()
    return (squares if weights is None else squares * weights).sum(-1).mean()


__all__ = ["TVEExplainer", "TVEExplainerOutput", "TVEPreTrainedModel"]
