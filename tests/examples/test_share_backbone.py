"""Classifiers that share the file of their backbone load as they did."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import load_example
from tiny import save_pair
from transformers import AutoModelForImageClassification

share = load_example("share_backbone")


@pytest.fixture
def folders(tmp_path):
    """A classifier, and another on its backbone."""
    first, _ = save_pair(tmp_path)
    other = shutil.copytree(first, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["classifier.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return first, other


def loaded(folder):
    return AutoModelForImageClassification.from_pretrained(folder).state_dict()


def test_weights_load_as_before_and_those_of_the_backbone_are_on_disk_once(folders):
    before = [loaded(folder) for folder in folders]
    share.main([str(folder) for folder in folders])
    for folder, weights in zip(folders, before, strict=True):
        after = loaded(folder)
        assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in after)
    heads = [set(load_file(folder / "head.safetensors")) for folder in folders]
    assert heads == [{"classifier.weight", "classifier.bias"}] * 2
    assert [sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders] == [
        ["backbone.safetensors", "head.safetensors"],
        ["head.safetensors"],
    ]


def test_another_backbone_is_refused_and_nothing_is_lost(folders):
    weights = load_file(folders[1] / "model.safetensors")
    name = next(name for name in weights if not name.startswith("classifier."))
    weights[name] += 1
    save_file(weights, folders[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="has another backbone than"):
        share.main([str(folder) for folder in folders])
    assert all([path.name for path in folder.glob("model*")] == ["model.safetensors"] for folder in folders)
