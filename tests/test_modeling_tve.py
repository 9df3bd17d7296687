"""TVEExplainer against hand-written loops, transformers' own ViTMAE, and itself after a round trip."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from tve_hf.configuration_tve import TVEConfig
from tve_hf.modeling_tve import TRUNKS, TVEExplainer, TVEExplainerOutput, TVEMixerLayer

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


def counted(function: Callable, calls: list[int]) -> Callable:
    def wrapper(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return wrapper


@pytest.fixture(params=CONFIGS, ids=str)
def config(request) -> TVEConfig:
    return CONFIGS[request.param]()


# What both trunks promise


def test_every_trunk_name_has_a_class() -> None:
    assert set(TRUNKS) == {"backbone", "vit_mae"}


def test_shapes_and_determinism_in_training_mode(config) -> None:
    explainer, inputs = build(config).train(), inputs_for(config)
    first, second = explainer(**inputs), explainer(**inputs)
    assert isinstance(first, TVEExplainerOutput)
    assert first.kept.shape == first.removed.shape == (BATCH, config.num_patches, DIM)
    assert torch.equal(first.kept, second.kept)
    assert torch.equal(first.removed, second.removed)
    assert not torch.allclose(first.kept, first.removed)
    assert first.loss is None


def test_return_dict_false_gives_a_tuple(config) -> None:
    explainer, inputs = build(config), inputs_for(config)
    kept, removed = explainer(**inputs, return_dict=False)
    assert torch.equal(kept, explainer(**inputs).kept)
    assert torch.equal(removed, explainer(**inputs).removed)


def test_loss_is_equation_8_written_as_a_loop(config) -> None:
    explainer, inputs = build(config), inputs_for(config)
    patch_idx = torch.tensor([[0, 3, config.num_patches - 1], [2, 2, 7]])
    kept_labels, removed_labels = torch.randn(2, BATCH, 3, DIM, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = explainer(**inputs, patch_idx=patch_idx, kept_labels=kept_labels, removed_labels=removed_labels)
    kept_loss = removed_loss = 0.0
    for image in range(BATCH):
        for sample in range(3):
            patch = int(patch_idx[image, sample])
            for d in range(DIM):
                kept_loss += float(out.kept[image, patch, d] - kept_labels[image, sample, d]) ** 2 / (BATCH * 3)
                removed_loss += float(out.removed[image, patch, d] - removed_labels[image, sample, d]) ** 2 / (
                    BATCH * 3
                )
    assert out.kept_loss.item() == pytest.approx(kept_loss, rel=1e-5)
    assert out.removed_loss.item() == pytest.approx(removed_loss, rel=1e-5)
    assert out.loss.item() == pytest.approx(kept_loss + removed_loss, rel=1e-5)


def test_labels_without_indices_are_of_all_patches(config) -> None:
    explainer, inputs = build(config), inputs_for(config)
    labels = torch.zeros(BATCH, config.num_patches, DIM)
    every = torch.arange(config.num_patches).expand(BATCH, -1)
    implicit = explainer(**inputs, kept_labels=labels, removed_labels=labels)
    explicit = explainer(**inputs, kept_labels=labels, removed_labels=labels, patch_idx=every)
    assert torch.equal(implicit.loss, explicit.loss)


def test_every_weight_gets_a_gradient(config) -> None:
    explainer, inputs = build(config).train(), inputs_for(config)
    labels = torch.ones(BATCH, config.num_patches, DIM)
    explainer(**inputs, kept_labels=labels, removed_labels=labels).loss.backward()
    without = [name for name, p in explainer.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_round_trip_is_bit_identical(config, tmp_path) -> None:
    explainer, inputs = build(config), inputs_for(config)
    explainer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded, info = TVEExplainer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.state_dict().keys() == explainer.state_dict().keys()
    for name, value in explainer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(**inputs).kept, explainer(**inputs).kept)
    assert torch.equal(loaded(**inputs).removed, explainer(**inputs).removed)


def test_auto_model_round_trip(config, tmp_path) -> None:
    AutoConfig.register("tve", TVEConfig, exist_ok=True)
    AutoModel.register(TVEConfig, TVEExplainer, exist_ok=True)
    explainer, inputs = build(config), inputs_for(config)
    explainer.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, TVEExplainer)
    assert torch.equal(loaded(**inputs).kept, explainer(**inputs).kept)


def test_bfloat16_stays_near_float32(config, tmp_path) -> None:
    explainer, inputs = build(config), inputs_for(config)
    explainer.save_pretrained(tmp_path)
    half = TVEExplainer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    labels = torch.zeros(BATCH, config.num_patches, DIM)
    expected, out = explainer(**inputs), half(**inputs, kept_labels=labels, removed_labels=labels)
    assert out.loss.dtype == torch.float32
    for name in ("kept", "removed"):
        error = (out[name].float() - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(config, use_reentrant) -> None:
    plain, inputs = build(config).train(), inputs_for(config)
    frugal = copy.deepcopy(plain)
    frugal.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls: list[int] = []
    for module in frugal.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = counted(module._gradient_checkpointing_func, calls)
    labels = torch.ones(BATCH, config.num_patches, DIM)
    for explainer in (plain, frugal):
        explainer(**inputs, kept_labels=labels, removed_labels=labels).loss.backward()
    assert calls
    for (name, expected), actual in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(actual.grad, expected.grad, msg=name)


def test_attention_implementation_reaches_every_layer(config, monkeypatch) -> None:
    explainer, inputs = build(config), inputs_for(config)
    assert explainer.config._attn_implementation == "sdpa"
    calls: list[int] = []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted(fused, calls))
    sdpa = explainer(**inputs)
    num_layers = sum(hasattr(module, "attention") for module in explainer.modules())
    assert len(calls) == num_layers
    explainer.set_attn_implementation("eager")
    eager = explainer(**inputs)
    assert len(calls) == num_layers
    torch.testing.assert_close(eager.kept, sdpa.kept, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eager.removed, sdpa.removed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_in_one_graph(config) -> None:
    explainer, inputs = build(config), inputs_for(config)
    labels = torch.ones(BATCH, config.num_patches, DIM)
    inputs |= {"kept_labels": labels, "removed_labels": labels}
    with torch.no_grad():
        expected = explainer(**inputs)
        actual = torch.compile(explainer, fullgraph=True)(**inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_batch_size(config, strict) -> None:
    explainer, inputs = build(config), inputs_for(config)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {
        name: tuple({0: batch} for _ in value) if isinstance(value, tuple) else {0: batch}
        for name, value in inputs.items()
    }
    with torch.no_grad():
        exported = torch.export.export(explainer, (), inputs, dynamic_shapes=shapes, strict=strict).module()
        larger = {
            name: tuple(torch.cat([v, v]) for v in value) if isinstance(value, tuple) else torch.cat([value, value])
            for name, value in inputs.items()
        }
        for trial in (inputs, larger):
            expected, actual = explainer(**trial), exported(**trial)
            torch.testing.assert_close(actual["kept"], expected.kept, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(actual["removed"], expected.removed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_loads_as_remote_code_where_the_package_is_not_installed(config, tmp_path, monkeypatch) -> None:
    for auto_class, cls in (("AutoConfig", TVEConfig), ("AutoModel", TVEExplainer)):
        monkeypatch.setattr(cls, "_auto_class", auto_class)
    explainer, inputs = build(config), inputs_for(config)
    explainer.save_pretrained(tmp_path / "model")
    torch.save({"inputs": inputs, "kept": explainer(**inputs).kept.detach()}, tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["tve_hf"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True)
expected = torch.load("expected.pt")
assert torch.equal(model(**expected["inputs"]).kept, expected["kept"])
assert type(model).__module__.startswith("transformers_modules.")
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert {path.name for path in Path(tmp_path / "model").glob("*.py")} == {
        "configuration_tve.py",
        "modeling_tve.py",
        "weights.py",
    }


# Backbone trunk


def test_backbone_trunk_starts_at_no_difference() -> None:
    explainer, inputs = build(backbone_config(), spread=False), inputs_for(backbone_config())
    explainer.empty_embedding.copy_(torch.randn(DIM))
    out = explainer(**inputs)
    assert torch.equal(out.kept, explainer.empty_embedding.expand(BATCH, ROWS * COLS, DIM))
    assert torch.equal(out.removed, inputs["embeddings"][:, None].expand(BATCH, ROWS * COLS, DIM))


def test_weights_missing_from_a_checkpoint_start_like_new_ones(tmp_path) -> None:
    explainer = build(backbone_config())
    missing = {"trunk.differences.weight", "trunk.differences.bias", "trunk.empty_embedding"}
    state = explainer.state_dict()
    explainer.save_pretrained(tmp_path, state_dict={name: state[name] for name in state.keys() - missing})
    loaded, info = TVEExplainer.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, torch.zeros_like(value) if name in missing else state[name]), name


def test_another_embedding_size_starts_at_no_difference(tmp_path) -> None:
    build(backbone_config()).save_pretrained(tmp_path)
    config = backbone_config(embedding_dim=DIM + 2)
    explainer = TVEExplainer.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    inputs = inputs_for(config)
    out = explainer(**inputs)
    assert torch.equal(out.removed, inputs["embeddings"][:, None].expand_as(out.removed))
    assert torch.equal(out.kept, torch.zeros_like(out.kept))


def test_differences_are_added_in_the_precision_of_the_embeddings() -> None:
    config = backbone_config()
    explainer, inputs = build(config, spread=False).to(torch.bfloat16), inputs_for(config)
    out = explainer(**inputs)
    assert torch.equal(out.removed, inputs["embeddings"][:, None].expand_as(out.removed))
    assert out.kept.dtype == out.removed.dtype == torch.float32


@pytest.mark.parametrize(("row", "col"), [(0, 0), (0, 4), (2, 0), (1, 3)])
@pytest.mark.parametrize("source", ["feature", "pixels"])
def test_patches_are_row_major(row, col, source) -> None:
    config = backbone_config(num_hidden_layers=0)
    explainer, inputs = build(config), inputs_for(config)
    height, width = config.patch_size
    changed = dict(inputs)
    if source == "pixels":
        changed["pixel_values"] = inputs["pixel_values"].clone()
        changed["pixel_values"][:, :, row * height : (row + 1) * height, col * width : (col + 1) * width] += 1.0
    else:
        feature_map = torch.zeros(BATCH, 4, ROWS * 3, COLS * 3)
        inputs["features"] = (feature_map, inputs["features"][1])
        bump = feature_map.clone()
        bump[:, 1, row * 3 + 1, col * 3 + 1] = 1.0
        changed["features"] = (bump, inputs["features"][1])
    before, after = explainer(**inputs), explainer(**changed)
    for name in ("kept", "removed"):
        moved = (after[name] - before[name]).norm(dim=-1)  # (B, N)
        assert (moved.argmax(1) == row * COLS + col).all()
        assert (moved > 1e-6).sum() == BATCH


def test_a_map_of_the_grids_size_is_read_as_it_is() -> None:
    reader = build(backbone_config()).trunk.feature_readers[0]
    feature_map = torch.randn(BATCH, 4, ROWS, COLS)
    tokens = reader(feature_map)
    for row in range(ROWS):
        for col in range(COLS):
            expected = reader.projection(reader.norm(feature_map[:, :, row, col]))
            torch.testing.assert_close(tokens[:, row * COLS + col], expected)


def test_layers_mix_positions() -> None:
    config = backbone_config()
    explainer, inputs = build(config), inputs_for(config)
    changed = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][:, :, :4, :8] += 1.0
    moved = (explainer(**changed).kept - explainer(**inputs).kept).norm(dim=-1)
    assert (moved > 1e-6).all()


def test_without_feature_maps_it_reads_pixels_and_embedding() -> None:
    config = backbone_config(feature_dims=[], feature_names=[])
    inputs = inputs_for(config)
    inputs.pop("features")
    assert build(config)(**inputs).kept.shape == (BATCH, ROWS * COLS, DIM)


# Mask-AutoEncoder trunk


def test_autoencoder_equals_vit_mae_however_that_shuffles() -> None:
    config = mae_config()
    explainer, inputs = build(config), inputs_for(config)
    autoencoder = explainer.trunk.autoencoders[0]
    reference = ViTMAEForPreTraining(ViTMAEConfig(**MAE, mask_ratio=0.0)).eval()
    reference.vit.load_state_dict(autoencoder.encoder.state_dict())
    incompatible = reference.decoder.load_state_dict(autoencoder.decoder.state_dict(), strict=False)
    assert set(incompatible.missing_keys) == {"mask_token", "decoder_pred.weight", "decoder_pred.bias"}
    reference.decoder.decoder_pred = nn.Identity()
    # transformers shuffles the patches and restores their order, so this holds only if ours never lost it.
    encoded = reference.vit(inputs["pixel_values"], noise=torch.rand(BATCH, 16))
    tokens = reference.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
    torch.testing.assert_close(autoencoder(inputs["pixel_values"])[:, 1:], tokens, rtol=1e-4, atol=1e-5)


def test_encoder_equals_vit_mae_with_increasing_noise() -> None:
    config = mae_config()
    encoder, inputs = build(config).trunk.autoencoders[0].encoder, inputs_for(config)
    reference = ViTMAEModel(ViTMAEConfig(**MAE, mask_ratio=0.0)).eval()
    reference.load_state_dict(encoder.state_dict())
    noise = torch.linspace(0, 1, 16).expand(BATCH, -1)
    out = reference(inputs["pixel_values"], noise=noise)
    assert torch.equal(out.ids_restore, torch.arange(16).expand(BATCH, -1))
    assert torch.equal(encoder(inputs["pixel_values"], noise=noise).last_hidden_state, out.last_hidden_state)


@pytest.mark.parametrize("where", ["encoder.embeddings.position_embeddings", "decoder.decoder_pos_embed"])
def test_fresh_positions_are_sines_and_cosines(where) -> None:
    positions = build(mae_config(), spread=False).trunk.autoencoders[0].get_parameter(where)
    _, num_tokens, dim = positions.shape
    assert not positions.requires_grad
    assert num_tokens == 17
    assert torch.equal(positions[0, 0], torch.zeros(dim))
    for patch in range(16):
        for i in range(dim // 4):
            omega = 10000.0 ** (-i / (dim // 4))
            row, col = torch.tensor(omega * (patch // 4)), torch.tensor(omega * (patch % 4))
            expected = torch.stack([col.sin(), col.cos(), row.sin(), row.cos()])
            torch.testing.assert_close(positions[0, 1 + patch, i :: dim // 4], expected)


def test_mixer_layer_equals_a_loop() -> None:
    torch.manual_seed(0)
    layer = TVEMixerLayer(in_dim=6, out_dim=6, num_tokens=5, activation=nn.GELU(), eps=1e-6, skip=True)
    hidden = torch.randn(BATCH, 5, 6)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (hidden.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    channels = torch.einsum("btc,dc->btd", normed, layer.channels.weight) + layer.channels.bias
    channels = nn.functional.gelu(channels)
    expected = torch.empty_like(hidden)
    for token in range(5):
        mixed = torch.einsum("btd,t->bd", channels, layer.tokens.weight[token]) + layer.tokens.bias[token]
        expected[:, token] = hidden[:, token] + nn.functional.gelu(mixed)
    torch.testing.assert_close(layer(hidden), expected)


def test_head_has_no_skip_at_its_ends_and_no_activation_in_its_last_layer() -> None:
    layers = build(mae_config(num_head_layers=4)).trunk.kept_head.layers
    assert [layer.skip for layer in layers] == [False, True, True, False]
    assert [isinstance(layer.activation, nn.Identity) for layer in layers] == [False, False, False, True]
    assert [layer.channels.in_features for layer in layers] == [8, DIM, DIM, DIM]


def test_trunk_drops_the_class_token_last() -> None:
    config = mae_config()
    explainer, inputs = build(config), inputs_for(config)
    hidden = explainer.trunk.autoencoders[0](inputs["pixel_values"])
    assert hidden.shape == (BATCH, 17, 8)
    for layer in explainer.trunk.kept_head.layers:
        hidden = layer(hidden)
    assert torch.equal(explainer(**inputs).kept, hidden[:, 1:])


def test_two_autoencoders_serve_one_head_each() -> None:
    config = mae_config(shared_trunk=False)
    explainer, inputs = build(config), inputs_for(config)
    before = explainer(**inputs)
    with torch.no_grad():
        explainer.trunk.autoencoders[1].encoder.embeddings.cls_token.add_(1.0)
    after = explainer(**inputs)
    assert torch.equal(after.kept, before.kept)
    assert not torch.equal(after.removed, before.removed)


def test_pixel_trunk_ignores_the_backbones_outputs() -> None:
    config = mae_config()
    explainer, inputs = build(config), inputs_for(config)
    out = explainer(**inputs, features=(torch.randn(BATCH, 1, 1, 1),), embeddings=torch.randn(BATCH, DIM))
    assert torch.equal(out.kept, explainer(**inputs).kept)
    assert explainer.empty_embedding is None


@pytest.mark.parametrize("shared", [True, False])
def test_from_vit_mae_copies_encoder_and_decoder(tmp_path, shared) -> None:
    torch.manual_seed(0)
    checkpoint = ViTMAEForPreTraining(ViTMAEConfig(**MAE))
    with torch.no_grad():
        for parameter in checkpoint.parameters():
            parameter.add_(torch.randn_like(parameter))
    checkpoint.save_pretrained(tmp_path)
    explainer = TVEExplainer.from_vit_mae(str(tmp_path), mae_config(shared_trunk=shared))
    assert len(explainer.trunk.autoencoders) == (1 if shared else 2)
    for autoencoder in explainer.trunk.autoencoders:
        for name, value in autoencoder.encoder.state_dict().items():
            assert torch.equal(value, checkpoint.vit.state_dict()[name]), name
        for name, value in autoencoder.decoder.state_dict().items():
            assert torch.equal(value, checkpoint.decoder.state_dict()[name]), name


def test_from_vit_mae_refuses_what_does_not_fit(tmp_path) -> None:
    ViTMAEForPreTraining(ViTMAEConfig(**MAE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no Mask-AutoEncoder"):
        TVEExplainer.from_vit_mae(str(tmp_path), backbone_config())
    for change in ({"hidden_size": 32}, {"num_hidden_layers": 1}, {"decoder_num_hidden_layers": 3}):
        with pytest.raises(ValueError, match="does not fit config.mae_config at .*set mae_config="):
            TVEExplainer.from_vit_mae(str(tmp_path), mae_config(mae_config=MAE | change))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, "pixel_values are missing"),
        ({"pixel_values": torch.zeros(BATCH, 3, 12, 12)}, r"\(2, 3, 12, 12\), expected \(B, 3, 12, 40\)"),
        ({"pixel_values": torch.zeros(3, 12, 40)}, "expected"),
        ({"embeddings": None}, "needs embeddings"),
        ({"embeddings": torch.zeros(BATCH, DIM + 1)}, r"expected \(B, 7\)"),
        ({"features": None}, "has 0 maps, expected 2"),
        ({"features": (torch.zeros(BATCH, 4, 2, 2),)}, "has 1 maps, expected 2"),
        (
            {"features": (torch.zeros(BATCH, 4, 2, 2), torch.zeros(BATCH, 2, 2, 6))},
            r"features\[1\] has shape \(2, 2, 2, 6\), expected \(B, 6, h, w\); pass the output of 'norm'",
        ),
        ({"features": (torch.zeros(BATCH, 4, 2, 2), torch.zeros(BATCH, 6, 4))}, r"features\[1\]"),
        ({"kept_labels": torch.zeros(BATCH, 15, DIM)}, "both needed"),
        ({"patch_idx": torch.zeros(BATCH, 1, dtype=torch.int64)}, "both needed"),
        (
            {"kept_labels": torch.zeros(BATCH, 1, DIM), "removed_labels": torch.zeros(BATCH, 1, DIM)},
            r"\(2, 1, 7\), expected \(2, 15, 7\)",
        ),
    ],
)
def test_wrong_inputs_are_refused(changes, message) -> None:
    config = backbone_config()
    with pytest.raises(ValueError, match=message):
        build(config)(**(inputs_for(config) | changes))


def test_pixel_trunk_refuses_wrong_images() -> None:
    explainer = build(mae_config())
    with pytest.raises(ValueError, match="pixel_values are missing"):
        explainer(embeddings=torch.zeros(BATCH, DIM))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\)"):
        explainer(torch.zeros(BATCH, 3, 32, 32))
