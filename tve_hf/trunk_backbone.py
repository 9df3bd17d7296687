"""The explainer's trunk that reads what the backbone has computed already, and the additive form; not the paper's.

Shapes: B images, N = rows * cols patches (row-major), D = embedding_dim.
"""

import torch
from torch import nn
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from .configuration_tve import BackboneReaderConfig, TVEConfig

# How far a step of the optimiser moves what tells patches apart. On a CNN 0.01 taught the explainer nothing of it, 0.1
# less than 0.3, and 1 no more.
_CONTRAST = 0.25


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
        if hidden.shape[1:3] != self.grid_shape:
            maps = hidden.permute(0, 3, 1, 2)
            maps = nn.functional.interpolate(maps, size=self.grid_shape, mode="bilinear", align_corners=False)
            hidden = maps.permute(0, 2, 3, 1)
        return hidden.flatten(1, 2)  # (B, N, hidden)


class TVEDifferenceHead(nn.Linear):
    """Linear layer that starts at zero; a class of its own so that `_init_weights` can tell it from the others."""


class TVELayer(ViTLayer):
    """A transformer layer that looks at all patches and returns those asked for.

    In training few of many have labels, and what follows the attention is most of a layer.
    """

    def forward(self, hidden_states: torch.Tensor, patch_idx: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states of the patches (B, k), (B, k, hidden), from those of all, (B, N, hidden)."""
        hidden = hidden_states + self.attention(self.layernorm_before(hidden_states))[0]
        if patch_idx is not None:
            hidden = hidden.take_along_dim(patch_idx[..., None], dim=1)
        return hidden + self.mlp(self.layernorm_after(hidden))


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
        layers = [TVELayer(vit_config) for _ in range(config.num_hidden_layers)]
        # `set_attn_implementation` does not reach the config made above, so the layers follow the explainer's.
        for layer in layers:
            layer.attention.config = config
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(hidden, eps=eps)

    def read(
        self,
        pixel_values: torch.Tensor,
        features: tuple[torch.Tensor, ...] | None,
        embeddings: torch.Tensor | None,
        patch_idx: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states of the patches (B, k), (B, k, hidden), and the embeddings as given, (B, D)."""
        features, embeddings = self._check_backbone_outputs(features, embeddings)
        # The backbone may run in another precision than the explainer, and so may the pixels.
        dtype = self.position_embeddings.dtype
        hidden = self.patch_embedding(pixel_values.to(dtype)).flatten(2).transpose(1, 2)  # (B, N, hidden)
        hidden = hidden + self.position_embeddings
        hidden = hidden + self.embedding_reader(embeddings.to(dtype))[:, None]
        for reader, feature_map in zip(self.feature_readers, features, strict=True):
            hidden = hidden + reader(feature_map.to(dtype))
        for number, layer in enumerate(self.layers, 1):
            hidden = layer(hidden, patch_idx if number == len(self.layers) else None)
        if patch_idx is not None and not self.layers:
            hidden = hidden.take_along_dim(patch_idx[..., None], dim=1)
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

    For random backgrounds it predicts, of the mean over the patches, how much all of them add together, N times the
    mean phi_z, and how far base is from what it would be if the embedding changed evenly from G(empty image) to G(x);
    and of each patch, how far its phi_z is from that mean. All start at zero too. They are apart because the sum is
    hundreds of times as large as what tells patches apart: in one output a step of the optimiser that suits one drowns
    the other. Where G(x) is the mean of a feature map A, phi_z is predicted as a difference from what the positions in
    z add to it, each dimension of (A_z - G(empty image)) / N scaled by itself.
    """

    def __init__(self, config: TVEConfig) -> None:
        super().__init__(config)
        self.empty_embedding: torch.Tensor
        self.keep_prob = config.distribution.keep_prob
        # Modules whose outputs mean something else for other backgrounds.
        self.heads: tuple[str, ...] = ("differences",)
        self.means: TVEDifferenceHead | None = None
        if config.backgrounds == "random":
            self.heads = "differences", "means"
            self.differences = TVEDifferenceHead(config.hidden_size, config.embedding_dim, bias=False)
            self.means = TVEDifferenceHead(config.hidden_size, 2 * config.embedding_dim)
        else:
            self.differences = TVEDifferenceHead(config.hidden_size, 2 * config.embedding_dim)
        self.register_buffer("empty_embedding", torch.zeros(config.embedding_dim))
        self.pooled: int | None = None
        if config.backgrounds == "random" and config.pooled_feature is not None:
            self.pooled = config.feature_names.index(config.pooled_feature)
            self.share_change = nn.Parameter(torch.zeros(config.embedding_dim))

    def last_layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (m, D, hidden) and biases (m, D) of what is predicted of hidden states, float32.

        Of each patch's kept and removed change, m = 2; for random backgrounds phi of each patch's, and phi and the
        change of base of their mean, m = 3.
        """
        dim, num_patches = len(self.empty_embedding), self.position_embeddings.shape[1]
        if self.means is None:
            return self.differences.weight.float().unflatten(0, (2, dim)), self.differences.bias.float().view(2, dim)
        phi = _CONTRAST * self.differences.weight.float()
        total, change = self.means.weight.float().split(dim)
        bias, change_bias = self.means.bias.float().split(dim)
        weights = torch.stack([phi, total / num_patches - phi, change])
        return weights, torch.stack([torch.zeros_like(bias), bias / num_patches, change_bias])

    def starting_at_zero(self) -> list[torch.Tensor]:
        """Weights and buffers that are zero before training, besides those of the heads."""
        return [self.empty_embedding, *([] if self.pooled is None else [self.share_change])]

    def forward(
        self,
        pixel_values: torch.Tensor,
        features: tuple[torch.Tensor, ...] | None,
        embeddings: torch.Tensor | None,
        patch_idx: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kept and removed of the patches (B, k), (B, k, D), in the precision of `embeddings` or better.

        For random backgrounds phi (B, k, D) and base (B, D), which is a mean over the patches asked for.
        """
        hidden, embeddings = self.read(pixel_values, features, embeddings, patch_idx)
        if self.means is not None:
            mean = hidden.mean(1, keepdim=True)
            total, base_change = self.means(mean).chunk(2, dim=-1)  # 2 x (B, 1, D)
            phi = _CONTRAST * self.differences(hidden - mean) + total / self.position_embeddings.shape[1]  # (B, k, D)
            if self.pooled is not None and features is not None:
                phi = phi + self.shares(features[self.pooled])
            evenly = torch.lerp(self.empty_embedding, embeddings.to(self.empty_embedding.dtype), self.keep_prob)
            return phi, evenly + base_change.squeeze(1)
        kept_change, removed_change = self.differences(hidden).chunk(2, dim=-1)  # 2 x (B, k, D)
        # Added to the embeddings as given: rounding them to bfloat16 weights would cost more than the differences.
        return self.empty_embedding.to(embeddings.dtype) + kept_change, embeddings[:, None] + removed_change

    def shares(self, feature_map: torch.Tensor) -> torch.Tensor:
        """What the positions in each patch add to the mean of a feature map (B, D, h, w), scaled, (B, N, D)."""
        resized = nn.functional.interpolate(
            feature_map.to(self.empty_embedding.dtype),
            size=self.config.grid_shape,
            mode="bilinear",
            align_corners=False,
        )
        added = resized.flatten(2).transpose(1, 2) - self.empty_embedding
        return (1 + self.share_change) * added / added.shape[1]


def kept_and_removed(phi: torch.Tensor, base: torch.Tensor, prob: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return kept and removed, (B, N, D) each, float32 since phi, (B, N, D), is small beside base, (B, D)."""
    phi, base = phi.float(), base.float().unsqueeze(1)
    return torch.add(base, phi, alpha=1 - prob), torch.sub(base, phi, alpha=prob)


def phi_and_base(kept: torch.Tensor, removed: torch.Tensor, prob: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return phi (B, N, D) and base (B, D), float32, of kept and removed: the inverse of `kept_and_removed`."""
    kept, removed = kept.float(), removed.float()
    return kept - removed, (prob * kept + (1 - prob) * removed).mean(1)


def embedding_of(coalitions: torch.Tensor, phi: torch.Tensor, base: torch.Tensor, prob: float) -> torch.Tensor:
    """Predict G(S) of coalitions (B, K, N), boolean, from phi (B, N, D) and base (B, D): (B, K, D), float32."""
    with torch.autocast(phi.device.type, enabled=False):
        return base.float().unsqueeze(1) + (coalitions.float() - prob) @ phi.float()


def efficient(
    phi: torch.Tensor, empty: torch.Tensor, full: torch.Tensor, prob: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let patches share out all of G(x) - G(empty image): sum over z of phi_z, as Shapley values do.

    What is missing goes to all patches alike; then S = nothing and S = everything are exact.

    Args:
        phi: (B, N, D).
        empty: G of the empty image, (D,) or (B, D).
        full: G(x), (B, D).

    Returns:
        phi (B, N, D) and base (B, D), float32.
    """
    phi, total = phi.float(), full.float() - empty.float()
    phi = phi + ((total - phi.sum(1)) / phi.shape[1]).unsqueeze(1)
    return phi, empty.float() + prob * total
