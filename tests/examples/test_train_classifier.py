"""Classifier-tuning, full fine-tuning and training from scratch, on two colours of noise that a line tells apart."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture
from scripts import load_example
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import tve_hf

FAST = ["--use_cpu", "--per_device_train_batch_size", "16", "--disable_tqdm", "true", "--learning_rate", "5e-3"]


@pytest.fixture(scope="module")
def example():
    return load_example("train_classifier")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, fitted):
    """A data set of reddish and bluish noise, and a small ResNet with batch normalisation."""
    root = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)

    def rows(count: int) -> Dataset:
        labels = [i % 2 for i in range(count)]
        noise = rng.integers(0, 160, (count, 32, 32, 3), dtype=np.uint8)
        for picture, label in zip(noise, labels, strict=True):
            picture[..., 2 * label] += 90
        features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
        return Dataset.from_dict({"image": [Picture.fromarray(x) for x in noise], "label": labels}, features=features)

    splits = DatasetDict({"train": rows(64), "test": rows(32)})
    (root / "data").mkdir()
    for name, split in splits.items():
        split.to_parquet(str(root / "data" / f"{name}-0.parquet"))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    fitted(ResNetForImageClassification(config), 32).save_pretrained(root / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "model")
    return root


def run(example, folder, output, *arguments):
    given = ["--dataset", str(folder / "data"), "--output_dir", str(output), *FAST, *arguments]
    metrics = example.main(given)
    return metrics, AutoModelForImageClassification.from_pretrained(output)


def backbone_of(model):
    return {name: weight for name, weight in model.state_dict().items() if not name.startswith("classifier")}


def test_classifier_tuning_leaves_the_backbone_as_it_was(example, folder, tmp_path):
    before = AutoModelForImageClassification.from_pretrained(folder / "model")
    epochs = ["--num_train_epochs", "20", "--learning_rate", "5e-2"]
    metrics, model = run(
        example, folder, tmp_path, "--classifier", str(folder / "model"), "--freeze_backbone", *epochs
    )
    ours, theirs = backbone_of(model), backbone_of(before)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # batch statistics too
    assert model.config.id2label == {0: "red", 1: "blue"}
    assert metrics["eval_accuracy"] >= 0.9
    prints = [tve_hf.split_classifier(m).fingerprint() for m in (model, before)]
    assert tve_hf.fingerprint.match(*prints) == "same weights"


def test_full_fine_tuning_moves_the_backbone(example, folder, tmp_path):
    before = AutoModelForImageClassification.from_pretrained(folder / "model")
    metrics, model = run(example, folder, tmp_path, "--classifier", str(folder / "model"))
    assert not torch.equal(*(m.resnet.embedder.embedder.convolution.weight.data for m in (model, before)))
    prints = [tve_hf.split_classifier(m).fingerprint() for m in (model, before)]
    assert tve_hf.fingerprint.match(*prints) == "same architecture, other weights"
    ours, theirs = ({name: value for name, value in m.named_buffers()} for m in (model, before))
    assert ours and all(torch.equal(ours[name], theirs[name]) for name in theirs)  # batch statistics
    assert metrics["eval_accuracy"] >= 0.9


def test_from_scratch_and_again_from_the_last_checkpoint(example, folder, tmp_path):
    config = ["--config", str(folder / "model")]
    whole, model = run(example, folder, tmp_path / "whole", *config, "--num_train_epochs", "2")
    assert (model.resnet.embedder.embedder.normalization.running_var != 1).any()  # which learns them
    assert model.config.num_labels == 2
    # The last checkpoint is lost: the same command trains only what is missing, to the same weights.
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "part" / "checkpoint-4")
    again, resumed = run(example, folder, tmp_path / "part", *config, "--num_train_epochs", "2")
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, resumed.state_dict()[name], atol=1e-6), name
    assert again["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Pass either classifier"),
        (["--config", "x", "--freeze_backbone"], "freeze_backbone needs a trained backbone"),
        (["--classifier", "MODEL", "--label_column", "class"], "no split or column 'class'"),
        (["--classifier", "MODEL", "--test_split", "validation"], "no split or column 'validation'"),
        (["--classifier", "MODEL", "--label_column", "image"], "holds no class labels"),
    ],
)
def test_bad_settings_are_named(example, folder, tmp_path, arguments, message):
    arguments = [str(folder / "model") if a == "MODEL" else a for a in arguments]
    with pytest.raises(ValueError, match=message):
        run(example, folder, tmp_path / "out", *arguments)
    assert not (tmp_path / "out" / "config.json").exists()
