"""A small explainer of each trunk, and its inputs, for the tests of the model and of the trunks."""

import torch

from tve_hf.configuration_tve import TVEConfig
from tve_hf.modeling_tve import TVEExplainer

ROWS, COLS, DIM, BATCH = 3, 5, 7, 2
MAE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}


def backbone_config(**changes) -> TVEConfig:
    values = {
        "image_size": [12, 40],
        "grid_size": [ROWS, COLS],
        "embedding_dim": DIM,
        "feature_dims": [4, 6],
        "feature_names": ["stage", "norm"],
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return TVEConfig(**(values | changes))


def mae_config(**changes) -> TVEConfig:
    values = {
        "trunk": "vit_mae",
        "image_size": 16,
        "grid_size": 4,
        "embedding_dim": DIM,
        "num_head_layers": 3,
        "mae_config": MAE,
    }
    return TVEConfig(**(values | changes))


CONFIGS = {
    "backbone": backbone_config,
    "vit_mae": mae_config,
    "vit_mae_twice": lambda **changes: mae_config(shared_trunk=False, **changes),
}


def build(config: TVEConfig, spread: bool = True) -> TVEExplainer:
    """An explainer in evaluation mode; `spread` draws every weight at random, so that none is neutral."""
    torch.manual_seed(0)
    explainer = TVEExplainer(config).eval()
    if spread:
        with torch.no_grad():
            for tensor in (*explainer.parameters(), *explainer.buffers()):
                tensor.add_(0.2 * torch.randn_like(tensor))
    return explainer


def inputs_for(config: TVEConfig, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {"pixel_values": draw(BATCH, 3, *config.image_shape)}
    if config.trunk == "backbone":
        inputs["features"] = tuple(draw(BATCH, c, 2 + i, 9) for i, c in enumerate(config.feature_dims))
        inputs["embeddings"] = draw(BATCH, config.embedding_dim)
    return inputs
