"""A run that pushes what it made to the Hub."""

import json

import pytest
from hub_server import User
from tiny import GRID, HOPS, save_classifier, save_noise

from tve_hf.hub import push as pushing
from tve_hf.pretrain import PretrainArguments, pretrain


@pytest.fixture
def settings(tmp_path, isolated):
    classifier = save_classifier(tmp_path / "classifier")
    files = [str(save_noise(tmp_path / "rows.parquet", 4))]
    return {
        "classifier": str(classifier),
        "train_files": files,
        "validation_files": files,
        "output_dir": str(tmp_path / "tve-tiny"),
        "batch_size": 2,
        "grid_size": GRID,
        "hops": HOPS,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_epochs": 1,
        "mixed_precision": "no",
        "push_to_hub": True,
    }


def test_a_run_is_pushed_with_code_and_its_own_card(hub, settings, tmp_path, monkeypatch):
    hub.users["hf_ada"] = User("ada")
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    pretrain(PretrainArguments(**settings))
    files = hub.files("ada/tve-tiny")
    folder = tmp_path / "tve-tiny"
    assert {"README.md", "config.json", "model.safetensors", "pipeline_tve.py", "training.json"} <= set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    (row,) = json.loads((folder / "training.json").read_text())["log"]
    card = files["README.md"].decode()
    assert f"| median Spearman with exact maps | {row['spearman']:.3f} |" in card
    assert "under the rule `logit_averaged`" in card and "On 4 held-out images the explainer" in card
    quality = json.loads(files["config.json"])["quality"]
    assert quality.pop("num_images") == 4 and quality == {name: row[name] for name in quality}
    assert {"spearman", "kept_error", "fidelity_gap", "exact_fidelity_gap"} <= quality.keys()
    assert 'model="ada/tve-tiny"' in card and "license" not in card.split("---")[1]


def test_no_token_is_found_before_anything_is_trained(hub, settings, tmp_path):
    with pytest.raises(OSError, match="There is no token; log in with `hf auth login`"):
        pretrain(PretrainArguments(**settings))
    assert not list((tmp_path / "tve-tiny").iterdir())


def test_a_failing_push_is_tried_again(tmp_path, monkeypatch):
    tried = []

    class Push:
        def send(self):
            tried.append(1)
            if len(tried) < fails_until:
                raise OSError("the Hub answered 502")

    monkeypatch.setattr(pushing, "prepare", lambda *args, **kwargs: Push())
    monkeypatch.setattr(pushing.time, "sleep", lambda seconds: None)
    fails_until = pushing.ATTEMPTS
    pushing.publish(tmp_path, "ada/mine", private=False)
    assert len(tried) == pushing.ATTEMPTS
    tried.clear()
    fails_until = pushing.ATTEMPTS + 1
    with pytest.raises(OSError, match="is complete, but could not be pushed.*502.*run `tve-hf push .* ada/mine"):
        pushing.publish(tmp_path, "ada/mine", private=False)
