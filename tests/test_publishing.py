"""Uploads, with a stand-in for the Hub."""

import json

import datasets
import pytest
from accelerate.state import AcceleratorState
from huggingface_hub.errors import LocalTokenNotFoundError
from tiny import GRID, HOPS, noise_image, save_classifier

from tve_hf import publishing
from tve_hf.pretrain import PretrainArguments, pretrain


class Hub:
    """Takes the place of HfApi and remembers what it is asked; `failures` uploads fail before one succeeds."""

    def __init__(self, token=True, may_write=True, failures=0):
        self.token, self.may_write, self.failures = token, may_write, failures
        self.repositories, self.uploads = {}, []

    def __call__(self):
        return self

    def whoami(self):
        if not self.token:
            raise LocalTokenNotFoundError("Token is required")
        return {"name": "ada"}

    def create_repo(self, repo_id, private, exist_ok):
        if not self.may_write:
            raise OSError("403 Forbidden")
        assert exist_ok
        self.repositories[repo_id] = private

    def upload_folder(self, folder_path, repo_id, ignore_patterns, commit_message):
        if self.failures:
            self.failures -= 1
            raise OSError("502 Bad Gateway")
        files = {path.relative_to(folder_path) for path in folder_path.rglob("*") if path.is_file()}
        kept = {str(path) for path in files if not any(path.match(p) for p in ignore_patterns)}
        self.uploads.append((repo_id, {path for path in kept if "checkpoint-" not in path}))


@pytest.fixture
def hub(monkeypatch):
    def install(**settings):
        hub = Hub(**settings)
        monkeypatch.setattr(publishing, "HfApi", hub)
        monkeypatch.setattr(publishing.time, "sleep", lambda seconds: None)
        return hub

    return install


def test_repository_is_made_at_the_start(hub):
    there = hub()
    assert publishing.prepare_repository("mine", True) == "ada/mine"
    assert publishing.prepare_repository("org/mine", False) == "org/mine"
    assert there.repositories == {"ada/mine": True, "org/mine": False}


def test_no_token_and_no_permission_are_named(hub):
    hub(token=False)
    with pytest.raises(ValueError, match="needs the Hub and a token .*; run `hf auth login` or set HF_TOKEN"):
        publishing.prepare_repository("mine", True)
    hub(may_write=False)
    with pytest.raises(ValueError, match="ada may not write to org/mine .*403.*hub_model_id"):
        publishing.prepare_repository("org/mine", True)


def test_a_failing_upload_is_tried_again(hub, tmp_path):
    there = hub(failures=publishing.ATTEMPTS - 1)
    publishing.upload(tmp_path, "ada/mine")
    assert len(there.uploads) == 1
    hub(failures=publishing.ATTEMPTS)
    with pytest.raises(OSError, match="is complete, but could not be uploaded.*502.*run `hf upload ada/mine"):
        publishing.upload(tmp_path, "ada/mine")


def test_a_run_is_uploaded_with_its_card(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(True)
    classifier = save_classifier(tmp_path / "classifier")
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [noise_image(seed) for seed in range(4)]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    settings = {"classifier": str(classifier), "train_files": [str(tmp_path / "rows.parquet")], "batch_size": 2}
    settings |= {"grid_size": GRID, "hops": HOPS, "hidden_size": 16, "num_attention_heads": 2, "num_epochs": 1}
    settings |= {"validation_files": settings["train_files"], "mixed_precision": "no"}
    settings |= {"output_dir": str(tmp_path / "tve-tiny"), "push_to_hub": True, "hub_private_repo": True}
    there = hub(token=False)
    with pytest.raises(ValueError, match="hf auth login"):
        pretrain(PretrainArguments(**settings))
    assert not list((tmp_path / "tve-tiny").iterdir())  # found before anything was trained
    there = hub()
    AcceleratorState._reset_state(True)
    pretrain(PretrainArguments(**settings))
    assert there.repositories == {"ada/tve-tiny": True}
    ((repository, files),) = there.uploads
    assert repository == "ada/tve-tiny"
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "training.json"}
    assert files == names | {"validation-2.png"}
    (row,) = json.loads((tmp_path / "tve-tiny" / "training.json").read_text())["log"]
    card = (tmp_path / "tve-tiny" / "README.md").read_text()
    assert f"| median Spearman with exact | {row['spearman']:.3f} |" in card
    assert f"| relative error of kept | {row['kept_error']:.3f} |" in card
    assert "license" not in card.split("---")[1]
    AcceleratorState._reset_state(True)
