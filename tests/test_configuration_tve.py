"""TVEConfig: what it accepts, what it refuses, and that it survives a file."""

import json
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ViTMAEConfig

from tve_hf.configuration_tve import TVEConfig

MAE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}


def test_defaults_are_the_grid_of_the_paper() -> None:
    config = TVEConfig()
    assert config.grid_shape == (14, 14)
    assert config.image_shape == (224, 224)
    assert config.patch_size == (16, 16)
    assert config.num_patches == 196
    assert config.mae_config is None


def test_rectangles_are_height_first() -> None:
    config = TVEConfig(image_size=[12, 40], grid_size=(3, 5))
    assert config.image_shape == (12, 40)
    assert config.grid_shape == (3, 5)
    assert config.patch_size == (4, 8)
    assert config.num_patches == 15


def test_coalitions_have_a_scale_of_their_own_which_the_file_names(tmp_path) -> None:
    config = TVEConfig(image_size=[12, 40], grid_size=(3, 5), backgrounds="random")
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["coalition_scale"]
    assert stored == config.distribution.scale == pytest.approx(0.3)
    assert TVEConfig(coalition_scale=0.7).distribution.scale == 0.7


def test_mutable_defaults_are_not_shared() -> None:
    config = TVEConfig()
    config.feature_dims.append(3)
    assert TVEConfig().feature_dims == []


def test_every_field_survives_a_file(tmp_path) -> None:
    values = {
        "image_size": [12, 40],
        "grid_size": [3, 5],
        "hops": 1,
        "embedding_dim": 7,
        "num_channels": 1,
        "image_mean": [0.5],
        "image_std": [0.25],
        "feature_dims": [4, 6],
        "feature_names": ["blocks.2", "norm"],
        "hidden_size": 24,
        "num_hidden_layers": 0,
        "num_attention_heads": 3,
        "intermediate_size": 5,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.1,
        "num_head_layers": 2,
        "shared_trunk": False,
        "backbone_name": "org/name",
        "backbone_fingerprint": "abc",
        "quality": {"num_images": 32, "logit_r2": 0.5, "fidelity_gap": -1.0},
    }
    assert values.keys() <= {field.name for field in fields(TVEConfig)}
    TVEConfig(**values).save_pretrained(tmp_path)
    loaded = TVEConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in values} == values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None])
def test_what_was_not_measured_is_no_quality(value) -> None:
    with pytest.raises(StrictDataclassError, match="quality"):
        TVEConfig(quality={"num_images": 32, "spearman": value})
    with pytest.raises(StrictDataclassError, match="of how many images"):
        TVEConfig(quality={"spearman": 0.5})


def test_properties_are_not_serialised(tmp_path) -> None:
    TVEConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not written.keys() & {"image_shape", "grid_shape", "patch_size", "num_patches"}
    assert written["model_type"] == "tve"


@pytest.mark.parametrize("mae_config", [MAE, ViTMAEConfig(**MAE)], ids=["dict", "object"])
def test_mae_config_survives_a_file(tmp_path, mae_config) -> None:
    config = TVEConfig(trunk="vit_mae", image_size=16, grid_size=4, mae_config=mae_config)
    config.save_pretrained(tmp_path)
    loaded = TVEConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.mae_config, ViTMAEConfig)
    assert {name: getattr(loaded.mae_config, name) for name in MAE} == MAE
    assert loaded.mae_config.mask_ratio == 0.0
    assert loaded.to_dict() == config.to_dict()


def test_mae_config_of_the_caller_is_left_alone() -> None:
    mae_config = ViTMAEConfig(**MAE)
    config = TVEConfig(trunk="vit_mae", image_size=16, grid_size=4, mae_config=mae_config)
    assert config.mae_config.mask_ratio == 0.0
    assert mae_config.mask_ratio == 0.75


def test_mae_config_defaults_to_vit_mae_base() -> None:
    mae_config = TVEConfig(trunk="vit_mae").mae_config
    assert mae_config.to_dict() == ViTMAEConfig(mask_ratio=0.0).to_dict()


def test_backbone_trunk_writes_no_mae_weights_into_its_config(tmp_path) -> None:
    TVEConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mae_config"] is None
    assert TVEConfig.from_pretrained(tmp_path).mae_config is None


def test_auto_config_finds_it(tmp_path) -> None:
    AutoConfig.register("tve", TVEConfig, exist_ok=True)
    TVEConfig(embedding_dim=5).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TVEConfig)
    assert loaded.embedding_dim == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid_size": 13}, "image_size=224 cannot be cut into grid_size=13"),
        ({"image_size": [224, 220]}, "cannot be cut"),
        ({"grid_size": [2, 7, 7]}, "has 3 entries"),
        ({"grid_size": 0}, "grid_size is 0"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"num_head_layers": 0}, "num_head_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hops": -1}, "hops is -1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"feature_dims": [4, 0], "feature_names": ["a", "b"]}, r"feature_dims\[1\] is 0"),
        ({"feature_dims": [4]}, "give one name per feature map"),
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        (
            {"backgrounds": "random", "pooled_feature": "norm"},
            "pooled_feature='norm' has no channels and an embedding",
        ),
        (
            {"backgrounds": "random", "pooled_feature": "a", "feature_dims": [4], "feature_names": ["a"]},
            "has 4 channels and an embedding 768",
        ),
        ({"image_mean": [0.5]}, "image_mean has 1 entries"),
        ({"image_std": [1.0, 1.0]}, "image_std has 2 entries"),
        ({"mae_config": MAE}, 'not used by trunk="backbone"'),
        ({"trunk": "pixels"}, "pixels"),
        ({"embedding_dim": "768"}, "expected int"),
        ({"trunk": "vit_mae", "mae_config": MAE}, "14 x 14 grid on 224 x 224 pixels, set its image_size=224"),
        ({"trunk": "vit_mae", "grid_size": 7}, "set its image_size=224 and patch_size=32"),
        ({"trunk": "vit_mae", "grid_size": [14, 7]}, "square image and grid"),
        ({"trunk": "vit_mae", "image_size": [224, 448]}, "square image and grid"),
        ({"trunk": "vit_mae", "mae_config": {"patch_size": [16, 16]}}, "must be one int, for example 16"),
        ({"trunk": "vit_mae", "mae_config": {"num_channels": 1}}, "num_channels is 1"),
    ],
)
def test_nonsense_is_refused(values, message) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        TVEConfig(**values)


def test_derived_sizes_cannot_be_passed() -> None:
    with pytest.raises(AttributeError):
        TVEConfig(num_patches=100)
