"""Pre-training on a parquet file of noise: Eq. 8 by hand, resuming, and what is left on disk."""

import json

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import GRID, HOPS, SIDE, noise_image, save_classifier
from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification, pipeline

import tve_hf
from tve_hf.cli import main
from tve_hf.pretrain import PretrainArguments, pretrain

NUM_IMAGES = 7


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "noise.parquet"
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    rows = {"image": [noise_image(seed) for seed in range(NUM_IMAGES)], "name": ["x"] * NUM_IMAGES}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture
def settings(classifier, parquet, tmp_path):
    return {
        "classifier": str(classifier),
        "train_files": [str(parquet)],
        "output_dir": str(tmp_path / "run"),
        "grid_size": GRID,
        "hops": HOPS,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patches_per_image": 3,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "save_steps": 2,
    }


def test_first_loss_is_equation_8(settings, classifier, tmp_path):
    """An untrained explainer predicts G(empty image) and G(x), so its loss needs no explainer to be computed."""
    options = {"batch_size": NUM_IMAGES, "patches_per_image": GRID * GRID, "num_epochs": 1, "flip": False}
    pretrain(PretrainArguments(**(settings | options)))
    (row,) = json.loads((tmp_path / "run" / "training.json").read_text())["log"]

    model = ViTForImageClassification.from_pretrained(classifier)
    processor = AutoImageProcessor.from_pretrained(classifier)
    pixel_values = processor([noise_image(seed) for seed in range(NUM_IMAGES)], return_tensors="pt")["pixel_values"]
    patch = SIDE // GRID

    @torch.no_grad()
    def embed(images):
        return model.vit(images).last_hidden_state[:, 0]

    kept_terms, removed_terms = [], []
    for row_of_patch in range(GRID):
        for column in range(GRID):
            near = torch.zeros(SIDE, SIDE)
            top, left = max(0, row_of_patch - HOPS) * patch, max(0, column - HOPS) * patch
            near[top : (row_of_patch + HOPS + 1) * patch, left : (column + HOPS + 1) * patch] = 1
            g, h = embed(pixel_values * near), embed(pixel_values * (1 - near))
            kept_terms.append((embed(torch.zeros(1, 3, SIDE, SIDE)) - g).square().sum(-1).mean())
            removed_terms.append((embed(pixel_values) - h).square().sum(-1).mean())
    assert row["step"] == 1
    assert row["kept_loss"] == pytest.approx(float(torch.stack(kept_terms).mean()), rel=1e-4)
    assert row["removed_loss"] == pytest.approx(float(torch.stack(removed_terms).mean()), rel=1e-4)


def test_two_epochs_leave_an_explainer_that_explains(settings, classifier, parquet, tmp_path):
    settings |= {"validation_files": [str(parquet)], "validation_images": 2}
    trained = pretrain(PretrainArguments(**settings))
    report = json.loads((tmp_path / "run" / "training.json").read_text())
    assert report["arguments"] == settings | report["arguments"]
    log = report["log"]
    assert [row["step"] for row in log] == [2, 4, 6]
    assert log[-1]["kept_loss"] < log[0]["kept_loss"]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in log)
    assert {"kept_error", "removed_error", "spearman"} < set(log[0])
    saved = AutoModel.from_pretrained(tmp_path / "run")
    assert saved.dtype == torch.float32 and not saved.training
    assert saved.config.backbone_fingerprint == tve_hf.split_classifier(classifier).fingerprint()
    for name, weight in trained.state_dict().items():  # rounded to half precision on disk
        assert torch.allclose(saved.state_dict()[name], weight, rtol=1e-3, atol=1e-6), name
    explain = pipeline("transferable-attribution", model=str(tmp_path / "run"), classifier=str(classifier))
    assert explain(noise_image(0))[0]["attribution"].shape == (GRID, GRID)


@pytest.mark.parametrize("killed_in_step", [3, 4, 6])
def test_resumed_run_equals_an_uninterrupted_one(settings, tmp_path, monkeypatch, killed_in_step):
    whole = pretrain(PretrainArguments(**settings)).state_dict()
    settings["output_dir"] = str(tmp_path / "killed")
    sample, steps = tve_hf.pretrain.sample_patches, []

    def kill(*arguments):
        steps.append(1)
        if len(steps) == killed_in_step:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(tve_hf.pretrain, "sample_patches", kill)
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainArguments(**settings))
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    torch.manual_seed(99)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    saved = (killed_in_step - 1) // 2 * 2
    assert len(steps) == killed_in_step + 6 - saved  # and not from the start again
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [json.loads((tmp_path / run / "training.json").read_text())["log"] for run in ("run", "killed")]
    for row in (*logs[0], *logs[1]):
        del row["images_per_second"]
    assert logs[0] == logs[1]
    again = pretrain(PretrainArguments(**settings)).state_dict()  # nothing is left to do
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_command_line(settings, tmp_path):
    arguments = []
    for name, value in settings.items():
        arguments += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert main(["pretrain", *arguments, "--num_epochs", "1"]) == 0
    assert isinstance(AutoModel.from_pretrained(tmp_path / "run"), tve_hf.TVEExplainer)


def test_grid_that_does_not_divide_the_image_ends_in_one_sentence(settings, capsys):
    arguments = ["--classifier", settings["classifier"], "--train_files", *settings["train_files"]]
    assert main(["pretrain", *arguments, "--output_dir", settings["output_dir"], "--grid_size", "5"]) == 1
    assert "tve-hf: " in capsys.readouterr().err.splitlines()[-1]


def test_mistakes_are_named(settings):
    with pytest.raises(ValueError, match="No column 'photo'.*choose image_column among image, name"):
        pretrain(PretrainArguments(**(settings | {"image_column": "photo"})))
    with pytest.raises(ValueError, match="fewer images than one batch of 64; lower batch_size"):
        pretrain(PretrainArguments(**(settings | {"batch_size": 64})))
