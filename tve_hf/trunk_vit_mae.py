"""The explainer's trunk as in the paper: pixels, a Mask-AutoEncoder, and a head of mixer layers for each prediction.

Shapes: B images, N = rows * cols patches (row-major), D = embedding_dim.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import ViTMAEForPreTraining, ViTMAEModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEDecoder,
    ViTMAEEmbeddings,
    build_2d_sinusoidal_position_embedding,
)

from .configuration_tve import TVEConfig


class TVEMAEEncoder(ViTMAEModel):
    """`ViTMAEModel` whose position embeddings are set when it is built without a checkpoint."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers 5.23 skips this step, since the patch projection inside is marked as initialised before it, and
        # leaves the frozen position embeddings at zero: the encoder could not tell one place from another.
        if isinstance(module, ViTMAEEmbeddings):
            init.copy_(module.position_embeddings, sincos_positions(module.position_embeddings))
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
        # `set_attn_implementation` does not reach the decoder's copy of its config, so its layers follow the original.
        for layer in self.decoder.decoder_layers:
            layer.attention.config = mae_config
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

    heads = ("kept_head", "removed_head")  # modules whose outputs mean something else for other backgrounds

    def __init__(self, config: TVEConfig) -> None:
        super().__init__()
        self.config = config
        self.empty_embedding: torch.Tensor | None
        # It predicts embeddings, not differences from that of the empty image, which only Shapley values are bound to.
        self.register_buffer("empty_embedding", torch.zeros(config.embedding_dim) if config.is_efficient else None)
        self.autoencoders = nn.ModuleList(TVEMaskedAutoEncoder(config) for _ in range(1 if config.shared_trunk else 2))
        self.kept_head = TVEMixerHead(config)
        self.removed_head = TVEMixerHead(config)

    def forward(
        self,
        pixel_values: torch.Tensor,
        features: tuple[torch.Tensor, ...] | None,
        embeddings: torch.Tensor | None,
        patch_idx: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kept and removed of the patches (B, k), (B, k, D); only the pixels are read.

        For random backgrounds phi (B, N, D) and base (B, D), of all patches.
        """
        hidden = [autoencoder(pixel_values) for autoencoder in self.autoencoders]  # 1 or 2 x (B, 1 + N, width)
        kept, removed = self.kept_head(hidden[0]), self.removed_head(hidden[-1])  # 2 x (B, N, D)
        if self.config.is_efficient:  # what the base is then follows from phi
            return kept + removed, removed.mean(1)
        if self.config.backgrounds == "random":
            return kept, removed.mean(1)
        if patch_idx is None:
            return kept, removed
        # The heads mix the patches, so all of them are needed up to here.
        index = patch_idx[..., None]
        return kept.take_along_dim(index, dim=1), removed.take_along_dim(index, dim=1)


def sincos_positions(like: torch.Tensor) -> torch.Tensor:
    """Return the fixed sine-cosine position embeddings of ViT-MAE, (1, 1 + N, dim), zero for the class token."""
    _, num_tokens, dim = like.shape
    side = math.isqrt(num_tokens - 1)
    table = build_2d_sinusoidal_position_embedding(side, side, dim, cls_token=True)
    # The released ViT-MAE weights hold the columns' half before the rows'.
    return table.roll(dim // 2, dims=-1)[None]
