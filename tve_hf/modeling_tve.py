"""The TVE explainer: predicts the meta-attribution of all patches of an image in one pass.

"Learning Meta-attribution for Transferable Vision Explainer", arXiv 2312.15359. For a frozen backbone G and every
patch z with neighbourhood N(z), the explainer E approximates (Eq. 6)

    kept_z = G(N(z); x)        removed_z = G(Z \\ N(z); x)

Shapes: B images, N = rows * cols patches (row-major), D = embedding_dim, k sampled patches.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTMAEForPreTraining, ViTMAEModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEDecoder,
    ViTMAEEmbeddings,
    build_2d_sinusoidal_position_embedding,
)
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_tve import BackboneReaderConfig, TVEConfig
from .weights import checked


@dataclass
class TVEExplainerOutput(ModelOutput):
    """Output of [`TVEExplainer`].

    Args:
        loss: Eq. 8, scalar, float32, in squared units of the embedding; only when labels are given.
        kept_loss: its first term, the mean squared distance of kept from its labels.
        removed_loss: its second term, the same for removed.
        kept: predicted embedding with only the neighbourhood of each patch visible, (B, N, D).
        removed: predicted embedding with only the neighbourhood of each patch hidden, (B, N, D).
    """

    loss: torch.Tensor | None = None
    kept_loss: torch.Tensor | None = None
    removed_loss: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    removed: torch.Tensor | None = None


class TVEFeatureReader(nn.Module):
    """Bring one feature map of the backbone to the explainer's width and grid."""

    def __init__(self, config: BackboneReaderConfig, channels: int) -> None:
        super().__init__()
        self.grid_shape = config.grid_shape
        self.norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.projection = nn.Linear(channels, config.hidden_size)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Return tokens (B, N, hidden) of a map (B, C, h, w) of any height and width."""
        hidden = self.projection(self.norm(feature_map.permute(0, 2, 3, 1)))  # (B, h, w, hidden)
        hidden = nn.functional.interpolate(
            hidden.permute(0, 3, 1, 2), size=self.grid_shape, mode="bilinear", align_corners=False
        )  # (B, hidden, rows, cols)
        return hidden.flatten(2).transpose(1, 2)  # (B, N, hidden)


class TVEDifferenceHead(nn.Linear):
    """Linear layer that starts at zero; a class of its own so that `_init_weights` can tell it from the others."""


class TVEBackboneReader(nn.Module):
    """Read what the backbone has computed already: a few transformer layers on its pixels, features and embedding."""

    def __init__(self, config: BackboneReaderConfig) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.patch_embedding = nn.Conv2d(config.num_channels, hidden, config.patch_size, stride=config.patch_size)
        self.feature_readers = nn.ModuleList(TVEFeatureReader(config, channels) for channels in config.feature_dims)
        self.embedding_reader = nn.Sequential(
            nn.LayerNorm(config.embedding_dim, eps=eps), nn.Linear(config.embedding_dim, hidden)
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches, hidden))
        vit_config = ViTConfig(
            hidden_size=hidden,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            layer_norm_eps=eps,
        )
        self.layers = nn.ModuleList(ViTLayer(vit_config) for _ in range(config.num_hidden_layers))
        _read_attention_setting_from(config, self.layers)
        self.norm = nn.LayerNorm(hidden, eps=eps)

    def read(
        self,
        pixel_values: torch.Tensor | None,
        features: tuple[torch.Tensor, ...] | None,
        embeddings: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states of the patches, (B, N, hidden), and the embeddings as they were given, (B, D)."""
        pixel_values = _check_pixel_values(pixel_values, self.config)
        features, embeddings = self._check_backbone_outputs(features, embeddings)
        # The backbone may run in another precision than the explainer, and so may the pixels.
        dtype = self.position_embeddings.dtype
        hidden = self.patch_embedding(pixel_values.to(dtype)).flatten(2).transpose(1, 2)  # (B, N, hidden)
        hidden = hidden + self.position_embeddings
        hidden = hidden + self.embedding_reader(embeddings.to(dtype))[:, None]
        for reader, feature_map in zip(self.feature_readers, features, strict=True):
            hidden = hidden + reader(feature_map.to(dtype))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden), embeddings

    def _check_backbone_outputs(
        self, features: tuple[torch.Tensor, ...] | None, embeddings: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        dims = self.config.feature_dims
        if embeddings is None:
            raise ValueError('trunk="backbone" needs embeddings, G(x) of shape (B, D); pass those of the classifier.')
        if embeddings.ndim != 2 or embeddings.shape[1] != self.config.embedding_dim:
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}, expected (B, {self.config.embedding_dim}); "
                f"use the backbone that this explainer was trained on."
            )
        features = () if features is None else tuple(features)
        if len(features) != len(dims):
            raise ValueError(
                f"features has {len(features)} maps, expected {len(dims)}; "
                f"pass one per entry of config.feature_names={self.config.feature_names}."
            )
        for index, (feature_map, channels) in enumerate(zip(features, dims, strict=True)):
            if feature_map.ndim != 4 or feature_map.shape[1] != channels:
                raise ValueError(
                    f"features[{index}] has shape {tuple(feature_map.shape)}, expected (B, {channels}, h, w); "
                    f"pass the output of {self.config.feature_names[index]!r}, channels first."
                )
        return features, embeddings


class TVEBackboneTrunk(TVEBackboneReader):
    """Predict differences from what the backbone has computed already.

    kept_z = G(empty image) + dg_z and removed_z = G(x) + dh_z: hiding one neighbourhood moves the embedding a little,
    showing only one leaves it near that of the empty image. Both differences start at zero. This trunk is not in the
    paper, whose explainer reads pixels only.
    """

    def __init__(self, config: TVEConfig) -> None:
        super().__init__(config)
        self.empty_embedding: torch.Tensor
        self.differences = TVEDifferenceHead(config.hidden_size, 2 * config.embedding_dim)
        self.register_buffer("empty_embedding", torch.zeros(config.embedding_dim))

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        features: tuple[torch.Tensor, ...] | None,
        embeddings: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kept and removed, (B, N, D), in the precision of `embeddings` or better."""
        hidden, embeddings = self.read(pixel_values, features, embeddings)
        kept_change, removed_change = self.differences(hidden).chunk(2, dim=-1)  # 2 x (B, N, D)
        # Added to the embeddings as given: rounding them to bfloat16 weights would cost more than the differences.
        return self.empty_embedding.to(embeddings.dtype) + kept_change, embeddings[:, None] + removed_change


class TVEMAEEncoder(ViTMAEModel):
    """`ViTMAEModel` whose position embeddings are set when it is built without a checkpoint."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers 5.23 skips this step, since the patch projection inside is marked as initialised before it, and
        # leaves the frozen position embeddings at zero: the encoder could not tell one place from another.
        if isinstance(module, ViTMAEEmbeddings):
            init.copy_(module.position_embeddings, _sincos_positions(module.position_embeddings))
            init.normal_(module.cls_token, std=self.config.initializer_range)


_UNUSED_MAE_WEIGHTS = {"decoder.mask_token", "decoder.decoder_pred.weight", "decoder.decoder_pred.bias"}


class TVEMaskedAutoEncoder(nn.Module):
    """ViT-MAE encoder and decoder on all patches, in grid order, up to the decoder's last hidden states."""

    def __init__(self, config: TVEConfig) -> None:
        super().__init__()
        self.config = config
        mae_config: Any = config.mae_config
        self.encoder = TVEMAEEncoder(mae_config)
        self.decoder = ViTMAEDecoder(mae_config, config.num_patches)
        _read_attention_setting_from(mae_config, self.decoder.decoder_layers)
        # No patch is masked and no pixel predicted, so these would be weights that never get a gradient.
        del self.decoder.mask_token, self.decoder.decoder_pred

    def load_vit_mae(self, checkpoint: ViTMAEForPreTraining, name: str) -> None:
        """Take the weights of a ViT-MAE; raises ValueError if they do not fit."""
        weights = {f"encoder.{key}": weight for key, weight in checkpoint.vit.state_dict().items()}
        weights |= {f"decoder.{key}": weight for key, weight in checkpoint.decoder.state_dict().items()}
        own = self.state_dict()
        misfits = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
        surplus = weights.keys() - own.keys() - _UNUSED_MAE_WEIGHTS
        if misfits or surplus:
            raise ValueError(
                f"{name} does not fit config.mae_config at {(misfits or sorted(surplus))[0]}, "
                f"set mae_config=ViTMAEConfig.from_pretrained({name!r}) and matching image and grid sizes."
            )
        self.load_state_dict({key: weights[key] for key in own})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return decoder tokens (B, 1 + N, decoder width), class token first."""
        # Increasing noise sorts to the grid order. Left out, the encoder shuffles the patches at random. float32, for
        # bfloat16 cannot count beyond 256.
        noise = torch.arange(self.config.num_patches, device=pixel_values.device, dtype=torch.float32)
        noise = noise.expand(pixel_values.shape[0], -1)
        pixel_values = pixel_values.to(self.encoder.dtype)
        hidden = self.encoder(pixel_values, noise=noise).last_hidden_state  # (B, 1 + N, encoder width)
        # Not ViTMAEDecoder.forward: it drops the class token, which the heads mix in.
        hidden = self.decoder.decoder_embed(hidden) + self.decoder.decoder_pos_embed
        for layer in self.decoder.decoder_layers:
            hidden = layer(hidden)
        return self.decoder.decoder_norm(hidden)


class TVEMixerLayer(GradientCheckpointingLayer):
    """One head layer: mix channels, then tokens, then add the input where the shape allows."""

    def __init__(
        self, in_dim: int, out_dim: int, num_tokens: int, activation: nn.Module, eps: float, skip: bool
    ) -> None:
        super().__init__()
        self.skip = skip
        self.norm = nn.LayerNorm(in_dim, eps=eps)
        self.channels = nn.Linear(in_dim, out_dim)
        self.tokens = nn.Linear(num_tokens, num_tokens)
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (B, T, in_dim) to (B, T, out_dim)."""
        mixed = self.activation(self.channels(self.norm(hidden)))  # (B, T, out_dim)
        mixed = self.activation(self.tokens(mixed.transpose(1, 2))).transpose(1, 2)  # (B, T, out_dim)
        return hidden + mixed if self.skip else mixed


class TVEMixerHead(nn.Module):
    """`num_head_layers` mixer layers from decoder tokens to embeddings.

    As in the paper, no skip in the first layer, whose shape changes, and no activation in the last. The research code
    has no skip in the last one either; so do we.
    """

    def __init__(self, config: TVEConfig) -> None:
        super().__init__()
        mae_config: Any = config.mae_config
        last = config.num_head_layers - 1
        linear = {last} if config.activate_first_head_layer else {0, last}
        self.layers = nn.ModuleList(
            TVEMixerLayer(
                in_dim=mae_config.decoder_hidden_size if index == 0 else config.embedding_dim,
                out_dim=config.embedding_dim,
                num_tokens=config.num_patches + 1,
                activation=nn.Identity() if index in linear else ACT2FN[config.hidden_act],
                eps=config.layer_norm_eps,
                skip=0 < index < last,
            )
            for index in range(config.num_head_layers)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return embeddings (B, N, D) of decoder tokens (B, 1 + N, decoder width)."""
        for layer in self.layers:
            hidden = layer(hidden)
        # The class token comes first. The research code drops the last token, and patch 0 has the class token's place.
        return hidden[:, 1:]


class TVEMAETrunk(nn.Module):
    """The paper's trunk: pixels, Mask-AutoEncoder, one head for kept and one for removed."""

    empty_embedding = None  # predicts embeddings, not differences from that of the empty image

    def __init__(self, config: TVEConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoders = nn.ModuleList(TVEMaskedAutoEncoder(config) for _ in range(1 if config.shared_trunk else 2))
        self.kept_head = TVEMixerHead(config)
        self.removed_head = TVEMixerHead(config)

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        features: tuple[torch.Tensor, ...] | None,
        embeddings: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kept and removed, (B, N, D); only the pixels are read."""
        pixel_values = _check_pixel_values(pixel_values, self.config)
        hidden = [autoencoder(pixel_values) for autoencoder in self.autoencoders]  # 1 or 2 x (B, 1 + N, width)
        return self.kept_head(hidden[0]), self.removed_head(hidden[-1])


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
    _no_split_modules = ["ViTLayer", "ViTMAELayer", "ViTMAEEmbeddings", "TVEMixerLayer"]

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

    # transformers calls this for freshly built weights and for those missing from a checkpoint; the functions of
    # `init` leave loaded ones alone.
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TVEDifferenceHead):
            init.zeros_(module.weight)
        elif isinstance(module, TVEBackboneReader):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            if isinstance(module, TVEBackboneTrunk):
                init.zeros_(module.empty_embedding)
        elif isinstance(module, ViTMAEDecoder):
            init.copy_(module.decoder_pos_embed, _sincos_positions(module.decoder_pos_embed))


class TVEExplainer(TVEPreTrainedModel):
    """Predict kept and removed for all patches of an image, [ĝ, ĥ] = E(x | θ).

    What is read besides the pixels, and what the prediction starts from, is the business of `config.trunk`.
    """

    config: TVEConfig

    def __init__(self, config: TVEConfig) -> None:
        super().__init__(config)
        self.trunk: TVEBackboneTrunk | TVEMAETrunk = TRUNKS[config.trunk](config)
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
    ) -> TVEExplainerOutput:
        """Predict kept and removed; with labels, also the pre-training loss (Eq. 8).

        L = mean over images and sampled patches z of ||kept_z - kept_labels_z||^2 + ||removed_z - removed_labels_z||^2

        Args:
            pixel_values: normalised images, (B, channels, height, width).
            features: feature maps of the backbone, (B, C_i, h_i, w_i), in the order of `config.feature_names`. Like
                `embeddings`, needed by the `"backbone"` trunk and ignored by the other.
            embeddings: G(x), (B, D).
            patch_idx: row-major indices of the patches that the labels are of, int64, (B, k); None means all N.
            kept_labels: exact G(N(z); x) of these patches, (B, k, D).
            removed_labels: exact G(Z \\ N(z); x) of these patches, (B, k, D).

        Raises:
            ValueError: an input that the trunk needs is missing or has the wrong shape, or labels are incomplete.
        """
        kept, removed = self.trunk(pixel_values, features, embeddings)  # (B, N, D) each
        if kept_labels is None and removed_labels is None and patch_idx is None:
            return TVEExplainerOutput(kept=kept, removed=removed)
        if kept_labels is None or removed_labels is None:
            raise ValueError("kept_labels and removed_labels are both needed for the loss, pass both or no labels.")
        kept_loss = _mean_squared_distance(kept, kept_labels, patch_idx)
        removed_loss = _mean_squared_distance(removed, removed_labels, patch_idx)
        return TVEExplainerOutput(
            loss=kept_loss + removed_loss, kept_loss=kept_loss, removed_loss=removed_loss, kept=kept, removed=removed
        )


def _mean_squared_distance(
    predicted: torch.Tensor, labels: torch.Tensor, patch_idx: torch.Tensor | None
) -> torch.Tensor:
    """Return the mean over (B, k) of the squared distance between predicted[:, patch_idx] and labels, (B, k, D)."""
    if patch_idx is not None:
        predicted = predicted.gather(1, patch_idx[..., None].expand(-1, -1, predicted.shape[-1]))  # (B, k, D)
    if predicted.shape != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected {tuple(predicted.shape)}; "
            f"pass patch_idx (B, k) to name the patches that they are of."
        )
    # float32 whatever the weights: a sum of D squares loses most of its digits in bfloat16.
    return (predicted.float() - labels.float()).square().sum(-1).mean()


def _check_pixel_values(pixel_values: torch.Tensor | None, config: BackboneReaderConfig) -> torch.Tensor:
    if pixel_values is None:
        raise ValueError("pixel_values are missing, pass normalised images of shape (B, channels, height, width).")
    expected = (config.num_channels, *config.image_shape)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}, expected (B, {', '.join(map(str, expected))}); "
            f"resize with the processor of the explainer's checkpoint."
        )
    return pixel_values


def _read_attention_setting_from(config: Any, layers: Iterable[Any]) -> None:
    """Let layers built from a derived config follow `set_attn_implementation`, which only changes registered ones."""
    for layer in layers:
        layer.attention.config = config


def _sincos_positions(like: torch.Tensor) -> torch.Tensor:
    """Return the fixed sine-cosine position embeddings of ViT-MAE, (1, 1 + N, dim), zero for the class token."""
    _, num_tokens, dim = like.shape
    side = math.isqrt(num_tokens - 1)
    table = build_2d_sinusoidal_position_embedding(side, side, dim, cls_token=True)
    # The released ViT-MAE weights hold the columns' half before the rows'.
    return table.roll(dim // 2, dims=-1)[None]


__all__ = ["TVEExplainer", "TVEExplainerOutput", "TVEPreTrainedModel"]
