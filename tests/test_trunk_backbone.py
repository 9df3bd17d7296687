"""The trunk that reads the backbone: what it starts from, what it reads where, and what it refuses."""

import pytest
import torch
from transformers.models.vit.modeling_vit import ViTLayer
from trunks import BATCH, COLS, DIM, ROWS, backbone_config, build, inputs_for

from tve_hf.modeling_tve import TVEExplainer


def test_backbone_trunk_starts_at_no_difference() -> None:
    explainer, inputs = build(backbone_config(), spread=False), inputs_for(backbone_config())
    explainer.empty_embedding.copy_(torch.randn(DIM))
    out = explainer(**inputs)
    assert torch.equal(out.kept, explainer.empty_embedding.expand(BATCH, ROWS * COLS, DIM))
    assert torch.equal(out.removed, inputs["embeddings"][:, None].expand(BATCH, ROWS * COLS, DIM))


def test_without_training_maps_over_a_pooled_map_are_class_activation_maps() -> None:
    """CAM (Zhou et al. 2016) less that of the empty image: w_y . (A_z - G(empty)) / N, whatever S is."""
    config = backbone_config(backgrounds="random", feature_dims=[4, DIM], pooled_feature="norm")
    explainer, inputs = build(config, spread=False), inputs_for(config)
    feature_map = torch.randn(BATCH, DIM, ROWS, COLS)
    inputs["features"] = (inputs["features"][0], feature_map)
    inputs["embeddings"] = feature_map.mean((2, 3))
    explainer.empty_embedding.copy_(torch.randn(DIM))
    out = explainer(**inputs)
    head = torch.randn(DIM)
    for image in range(BATCH):
        for patch in range(ROWS * COLS):
            activation = feature_map[image, :, patch // COLS, patch % COLS]
            expected = head @ (activation - explainer.empty_embedding) / (ROWS * COLS)
            found = head @ (out.kept - out.removed)[image, patch]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    total = (out.kept - out.removed).sum(1)
    torch.testing.assert_close(total, inputs["embeddings"] - explainer.empty_embedding, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        explainer.trunk.share_change[2] = -1.0  # a dimension of which a position's share says nothing
    again = explainer(**inputs)
    assert torch.equal((again.kept - again.removed)[..., 2], torch.zeros(BATCH, ROWS * COLS))


def test_random_backgrounds_teach_what_all_patches_add_and_what_tells_them_apart() -> None:
    """In a game whose phi is known, and whose sum over the patches is far larger than any difference between them."""
    torch.manual_seed(0)
    side, generator = 10, torch.Generator().manual_seed(1)
    sizes = {
        "image_size": side,
        "grid_size": side,
        "embedding_dim": 4,
        "feature_dims": [8],
        "feature_names": ["stage"],
    }
    explainer = TVEExplainer(backbone_config(backgrounds="random", num_hidden_layers=0, **sizes))
    to_phi = torch.randn(8, 4, generator=generator) * 0.03 / 8**0.5
    optimizer = torch.optim.AdamW(explainer.parameters(), lr=1e-3)

    def game() -> tuple[torch.Tensor, dict]:
        feature_map = torch.randn(16, 8, side, side, generator=generator)
        rest = {"pixel_values": torch.zeros(16, 3, side, side), "embeddings": torch.zeros(16, 4)}
        return feature_map.flatten(2).mT @ to_phi + 1 / side**2, rest | {"features": (feature_map,)}

    for _ in range(150):
        phi, inputs = game()
        coalitions = explainer.config.distribution.draw(16, 8, (side, side), generator)
        labels = (coalitions.float() - 0.5) @ phi
        explainer(**inputs, coalitions=coalitions, coalition_labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    phi, inputs = game()
    with torch.no_grad():
        out = explainer(**inputs)
    found = out.kept - out.removed
    assert (found.sum(1) / phi.sum(1)).mean().item() == pytest.approx(1, abs=0.05)
    apart, wanted = (values - values.mean(1, keepdim=True) for values in (found, phi))
    assert (apart - wanted).norm() < 0.65 * wanted.norm()  # 1: nothing of it


def test_a_share_missing_from_a_checkpoint_starts_at_one(tmp_path) -> None:
    config = backbone_config(backgrounds="random", feature_dims=[4, DIM], pooled_feature="norm")
    state = (explainer := build(config)).state_dict()
    rest = {name: value for name, value in state.items() if name != "trunk.share_change"}
    explainer.save_pretrained(tmp_path, state_dict=rest)
    loaded = TVEExplainer.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(loaded.trunk.share_change, torch.zeros(DIM))


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


def test_layers_are_those_of_vit() -> None:
    layer = build(backbone_config()).trunk.layers[0]
    hidden = torch.randn(BATCH, 15, layer.layernorm_before.normalized_shape[0])
    torch.testing.assert_close(layer(hidden), ViTLayer.forward(layer, hidden))


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
        ({"removed_labels": torch.zeros(BATCH, 15, DIM)}, "both needed"),
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
