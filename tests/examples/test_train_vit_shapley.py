"""The training script of ViT-Shapley on a parquet file of noise: surrogate, resuming, and what it leaves on disk."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from scripts import load_example
from tiny import SIDE, same_weights, save_classifier, save_noise
from transformers import AutoImageProcessor, AutoModel

import tve_hf
from tve_hf import methods

GRID = 2


@pytest.fixture(scope="module")
def example():
    return load_example("train_vit_shapley")


pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    save_classifier(root / "classifier")
    save_noise(root / "noise.parquet", 7)
    return root


@pytest.fixture
def run(example, folder):
    def start(output, **changes):
        settings = {
            "classifier": folder / "classifier",
            "train_files": folder / "noise.parquet",
            "validation_files": folder / "noise.parquet",
            "output_dir": output,
            "grid_size": GRID,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "masks_per_image": 4,
            "mixed_precision": "no",
            "batch_size": 3,
            "surrogate_steps": 3,
            "surrogate_learning_rate": 1e-3,
            "steps": 5,
            "save_steps": 2,
        }
        return example.main([part for k, v in (settings | changes).items() for part in (f"--{k}", str(v))])

    return start


def test_both_stages_and_what_is_left_on_disk(run, folder, tmp_path) -> None:
    trained = run(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "training.json").read_text())
    assert [row["step"] for row in report["log"]["surrogate"]] == [2, 3]
    assert [row["step"] for row in report["log"]["explainer"]] == [2, 4, 5]
    assert all(row["loss"] >= 0 and row["validation_loss"] >= 0 for log in report["log"].values() for row in log)
    assert report["arguments"]["masks_per_image"] == 4
    assert [path.name for path in (tmp_path / "run" / "explainer").iterdir()] == ["checkpoint-5"]

    loaded = AutoModel.from_pretrained(tmp_path / "run")
    assert same_weights(loaded, trained.half().float())  # as it lies on disk
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").size["height"] == SIDE
    classifier = tve_hf.split_classifier(folder / "classifier")
    assert loaded.config.backbone_fingerprint == classifier.fingerprint()
    # The game is that of the surrogate, which is not the classifier any more.
    with torch.no_grad():
        own = classifier.log_prob(classifier.embed(torch.zeros_like(classifier.probe()))).exp()[0]
    assert loaded.null.sum().item() == pytest.approx(1, abs=1e-3)  # half precision
    assert 1e-6 < (loaded.null - own).abs().max() < 0.5
    scores = methods.explain(
        "vit_shapley", classifier, classifier.probe(), torch.tensor([0, 1]), shapley_explainer=loaded
    )
    assert scores.shape == (2, GRID, GRID)


def test_without_a_surrogate_the_classifier_is_asked(run, folder, tmp_path) -> None:
    trained = run(tmp_path / "run", surrogate_steps=0, steps=1)
    classifier = tve_hf.split_classifier(folder / "classifier")
    with torch.no_grad():
        expected = classifier.log_prob(classifier.embed(torch.zeros_like(classifier.probe()))).exp()[0]
    torch.testing.assert_close(trained.null, expected)
    assert not (tmp_path / "run" / "surrogate").exists()
    assert list(json.loads((tmp_path / "run" / "training.json").read_text())["log"]) == ["explainer"]


def test_a_run_interrupted_in_both_stages_ends_as_an_uninterrupted_one(run, example, tmp_path, monkeypatch) -> None:
    whole = run(tmp_path / "whole")
    save, stages = example.save_checkpoint, ["surrogate", "explainer"]

    def interrupted(accelerator, folder, done, *rest, **options):
        save(accelerator, folder, done, *rest, **options)
        if stages and folder.name == stages[0] and done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(example, "save_checkpoint", interrupted)
    while stages:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "part")
        AcceleratorState._reset_state(True)
        assert (tmp_path / "part" / stages.pop(0) / "checkpoint-2").exists()
        assert not (tmp_path / "part" / "model.safetensors").exists()
    assert same_weights(run(tmp_path / "part"), whole)
    logs = [json.loads((tmp_path / name / "training.json").read_text())["log"] for name in ("whole", "part")]
    assert logs[0] == logs[1]


def test_the_surrogate_learns_masked_images(example, folder) -> None:
    """Its divergence from the classifier falls, on images that it did not see masked like this before."""
    classifier = tve_hf.split_classifier(folder / "classifier")
    surrogate = example.copy.deepcopy(classifier)
    objective = example.surrogate_objective(classifier, (GRID, GRID))
    pixel_values = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(surrogate.parameters(), 1e-3)

    def held_out() -> float:
        with torch.no_grad():
            return sum(objective(surrogate, pixel_values, torch.Generator().manual_seed(s)).item() for s in range(5))

    before = held_out()
    for step in range(30):
        objective(surrogate, pixel_values, torch.Generator().manual_seed(100 + step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert held_out() < 0.7 * before


@torch.no_grad()
@pytest.mark.parametrize("multi_label", [False, True])
def test_the_surrogate_objective_is_least_for_the_classifier_itself(example, folder, multi_label, monkeypatch) -> None:
    """Where nothing is masked: a KL divergence is 0 there, a cross-entropy is that of the probabilities."""
    classifier = tve_hf.split_classifier(folder / "classifier")
    classifier = classifier.with_head(classifier.head, classifier.id2label, multi_label=multi_label)
    monkeypatch.setattr(example, "mask_patches", lambda pixel_values, keep, grid: pixel_values[:, None])
    objective = example.surrogate_objective(classifier, (GRID, GRID))
    given = classifier.probe(), torch.Generator().manual_seed(0)
    p = classifier.log_prob(classifier.embed(given[0])).exp().double()
    least = -(p * p.log() + (1 - p) * (1 - p).log()).sum(-1).mean().item() if multi_label else 0.0
    assert objective(classifier, *given).item() == pytest.approx(least, abs=1e-4)
    other = example.copy.deepcopy(classifier)
    next(iter(other.head.parameters())).mul_(1.2)
    assert objective(other, *given) > least + 1e-3


def test_mistakes_are_named(run, tmp_path) -> None:
    with pytest.raises(ValueError, match="fewer images than one batch of 8"):
        run(tmp_path / "a", batch_size=8)
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="No column 'photo'"):
        run(tmp_path / "b", image_column="photo")
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="choose an even number"):
        run(tmp_path / "c", masks_per_image=3, surrogate_steps=0)
