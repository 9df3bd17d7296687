"""ShapleyConfig: what it shares with TVEConfig, what it adds, and that it survives a file."""

import json
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

import tve_hf
from tve_hf import ShapleyConfig, TVEConfig


def test_it_survives_a_file_and_auto_config_finds_it(tmp_path) -> None:
    values = {
        "image_size": [12, 40],
        "grid_size": [3, 5],
        "embedding_dim": 7,
        "feature_dims": [4, 6],
        "feature_names": ["blocks.2", "norm"],
        "hidden_size": 24,
        "num_attention_heads": 3,
        "id2label": {0: "cat", 1: "dog", 2: "crane"},
        "backbone_name": "org/name",
        "backbone_fingerprint": "abc",
        "head_fingerprint": [0.25, -1.5],
    }
    ShapleyConfig(**values).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ShapleyConfig
    assert {name: getattr(loaded, name) for name in values} == values
    assert (loaded.num_patches, loaded.patch_size, loaded.num_labels) == (15, (4, 8), 3)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit_shapley"


def test_what_it_shares_with_tve_has_the_same_defaults() -> None:
    own, theirs = ShapleyConfig(), TVEConfig()
    shared = {field.name for field in fields(ShapleyConfig)} & {field.name for field in fields(TVEConfig)}
    assert {"grid_size", "hidden_size", "feature_names", "backbone_fingerprint"} <= shared
    assert {name: getattr(own, name) for name in shared} == {name: getattr(theirs, name) for name in shared}
    assert not {"hops", "trunk", "mae_config"} & {field.name for field in fields(ShapleyConfig)}
    assert tve_hf.ShapleyExplainer.config_class is ShapleyConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid_size": 13}, "image_size=224 cannot be cut into grid_size=13"),
        ({"grid_size": 1}, "single patch"),
        ({"id2label": {1: "cat", 2: "dog"}}, "number the classes from 0"),
        ({"id2label": {}}, "number the classes from 0"),
        ({"feature_dims": [4]}, "give one name per feature map"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, it must be at most 1000"),
    ],
)
def test_nonsense_is_refused(values, message) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        ShapleyConfig(**values)
