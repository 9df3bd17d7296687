"""The converter against a functional forward written from the research code's weights and conventions."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scripts import load_example
from torch import Tensor

from tve_hf import TVEExplainer

GRID, PATCH, WIDTH, DECODER, DIM, LAYERS = 3, 4, 16, 12, 10, 4
TOKENS = GRID**2 + 1
MAE = {
    "image_size": GRID * PATCH,
    "patch_size": PATCH,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_hidden_size": DECODER,
    "decoder_intermediate_size": 20,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3,
    "layer_norm_eps": 1e-12,
    "mask_ratio": 0,
}
CONFIG = {
    "backbone_config": MAE,
    "heatmap_size": GRID,
    "perturb_radius": 1,
    "target_hidden_size": DIM,
    "explainerhead_layernum": LAYERS,
}


@pytest.fixture(scope="module")
def example():
    return load_example("convert_research_checkpoint")


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the research code's weights, in the layout of its ViT-MAE."""

    def linear(name: str, into: int, out: int) -> dict:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name: str, dim: int) -> dict:
        return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}

    def block(name: str, dim: int, inner: int) -> dict:
        found = norm(f"{name}.layernorm_before", dim) | norm(f"{name}.layernorm_after", dim)
        for part in ("query", "key", "value"):
            found |= linear(f"{name}.attention.attention.{part}", dim, dim)
        found |= linear(f"{name}.attention.output.dense", dim, dim)
        return found | linear(f"{name}.intermediate.dense", dim, inner) | linear(f"{name}.output.dense", inner, dim)

    found: dict = {}
    for branch in ("pos", "neg"):
        root = f"backbone_{branch}"
        found |= {
            f"{root}.vit.embeddings.cls_token": (1, 1, WIDTH),
            f"{root}.vit.embeddings.position_embeddings": (1, TOKENS, WIDTH),
            f"{root}.vit.embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
            f"{root}.vit.embeddings.patch_embeddings.projection.bias": (WIDTH,),
            f"{root}.decoder.mask_token": (1, 1, DECODER),
            f"{root}.decoder.decoder_pos_embed": (1, TOKENS, DECODER),
        }
        for i in range(MAE["num_hidden_layers"]):
            found |= block(f"{root}.vit.encoder.layer.{i}", WIDTH, MAE["intermediate_size"])
        found |= norm(f"{root}.vit.layernorm", WIDTH) | linear(f"{root}.decoder.decoder_embed", WIDTH, DECODER)
        found |= block(f"{root}.decoder.decoder_layers.0", DECODER, MAE["decoder_intermediate_size"])
        found |= norm(f"{root}.decoder.decoder_norm", DECODER)
        found |= linear(f"{root}.decoder.decoder_pred", DECODER, 3 * PATCH**2)
        for i in range(LAYERS):
            title = {0: "Input Layer", LAYERS - 1: "Output Layer"}.get(i, f"Intermedia Layer {i}")
            name, dim = f"explainer_head_{branch}.net.{title}", DECODER if i == 0 else DIM
            found |= norm(f"{name}.layernorm", dim) | linear(f"{name}.dense1", dim, DIM)
            found |= linear(f"{name}.dense2", TOKENS, TOKENS)
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes().items()
    }


def forward(weights: dict[str, Tensor], x: Tensor, branch: str) -> Tensor:
    """Embeddings (B, N, D) in the order of the research code."""

    def linear(name: str, hidden: Tensor) -> Tensor:
        return hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-12)

    def block(name: str, hidden: Tensor, heads: int) -> Tensor:
        normed = norm(f"{name}.layernorm_before", hidden)
        query, key, value = (
            linear(f"{name}.attention.attention.{part}", normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        attention = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        hidden = hidden + linear(f"{name}.attention.output.dense", (attention @ value).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{name}.intermediate.dense", norm(f"{name}.layernorm_after", hidden)))
        return hidden + linear(f"{name}.output.dense", inner)

    root = f"backbone_{branch}"
    embeddings = f"{root}.vit.embeddings"
    projection = f"{embeddings}.patch_embeddings.projection"
    patches = F.conv2d(x, weights[f"{projection}.weight"], weights[f"{projection}.bias"], stride=PATCH)
    positions = weights[f"{embeddings}.position_embeddings"]
    hidden = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
    first = (weights[f"{embeddings}.cls_token"] + positions[:, :1]).expand(len(x), -1, -1)
    hidden = torch.cat([first, hidden], 1)
    for i in range(MAE["num_hidden_layers"]):
        hidden = block(f"{root}.vit.encoder.layer.{i}", hidden, MAE["num_attention_heads"])
    hidden = linear(f"{root}.decoder.decoder_embed", norm(f"{root}.vit.layernorm", hidden))
    hidden = hidden + weights[f"{root}.decoder.decoder_pos_embed"]
    hidden = block(f"{root}.decoder.decoder_layers.0", hidden, MAE["decoder_num_attention_heads"])
    hidden = norm(f"{root}.decoder.decoder_norm", hidden)
    for i in range(LAYERS):
        title = {0: "Input Layer", LAYERS - 1: "Output Layer"}.get(i, f"Intermedia Layer {i}")
        name, middle = f"explainer_head_{branch}.net.{title}", 0 < i < LAYERS - 1
        mixed = linear(f"{name}.dense1", norm(f"{name}.layernorm", hidden))
        mixed = F.gelu(mixed) if middle else mixed
        mixed = linear(f"{name}.dense2", mixed.transpose(1, 2))
        mixed = (F.gelu(mixed) if middle else mixed).transpose(1, 2)
        hidden = hidden + mixed if middle else mixed
    return hidden[:, :-1]


@pytest.fixture
def folder(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize(("branch", "name"), [("pos", "kept"), ("neg", "removed")])
def test_converted_explainer_predicts_the_same_tensors(example, weights, folder, images, branch, name):
    example.convert(folder, folder / "ours", "google/vit-base-patch16-224")
    explainer = TVEExplainer.from_pretrained(folder / "ours")
    x = images(2, GRID * PATCH)
    theirs = forward(weights, x, branch)  # (B, N, D), patch (row, col) at col * P + row
    ours = getattr(explainer(pixel_values=x), name).unflatten(1, (GRID, GRID))
    for row in range(GRID):
        for col in range(GRID):
            assert torch.allclose(ours[:, row, col], theirs[:, col * GRID + row], rtol=1e-4, atol=1e-5)
    assert explainer.config.backbone_name == "google/vit-base-patch16-224"
    assert explainer.config.hops == 1


def test_pickle_is_refused(example, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert its weights to safetensors"):
        example.convert(folder, folder / "ours")
    assert not (folder / "ours").exists()


@pytest.mark.parametrize(
    "lost", ["explainer_head_neg.net.Output Layer.dense2.bias", "backbone_pos.vit.layernorm.bias"]
)
def test_missing_weight_is_named(example, weights, folder, lost):
    save_file({name: weight for name, weight in weights.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=lost.split(".", 1)[1] if lost.startswith("backbone") else lost):
        example.convert(folder, folder / "ours")
    assert not (folder / "ours").exists()
