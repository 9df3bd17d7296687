"""A tiny model of timm, fine-tuned on reddish and bluish noise, and what its loop writes about explanations."""

import csv
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import load_example
from tiny import noise_image, same_weights

import tve_hf

timm = pytest.importorskip("timm", reason="timm is not installed; `make test-extras` makes an environment that has it")

EXPLAINED = 2
GAP = 6  # pixels between the pictures of a sheet


@pytest.fixture(scope="module")
def example():
    load_example("train_classifier")  # which the script imports from its own folder
    return load_example("train_timm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])})
    tints = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    for split, seeds in {"train": range(8), "test": range(8, 12)}.items():
        images = [Image.blend(noise_image(seed), tints[seed % 2], 0.4) for seed in seeds]
        rows = {"image": images, "label": [seed % 2 for seed in seeds]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-0.parquet")
    return root


@pytest.fixture(scope="module")
def train(example, folder, tmp_path_factory):
    def run(number: int) -> Path:
        output = tmp_path_factory.mktemp("runs") / "new"
        given = {
            "dataset": folder,
            "classifier": "test_vit",
            "pretrained": False,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "num_explained": number,
            "output_dir": output,
        }
        example.main([part for name, value in given.items() for part in (f"--{name}", str(value))])
        return output

    return run


@pytest.fixture(scope="module")
def explained(train) -> Path:
    return train(EXPLAINED)


@pytest.fixture(scope="module")
def watched(folder) -> list[Image.Image]:
    test = datasets.load_dataset(str(folder), split="test")
    return [*test.shuffle(seed=42).select(range(EXPLAINED))["image"]]


def rows_of(output: Path) -> list[dict[str, float]]:
    with (output / "summary.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def model_of(output: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{output}", pretrained=True).eval()


def test_each_epoch_has_a_row_and_a_sheet(explained, watched):
    rows = rows_of(explained)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[0]["train_loss"] != rows[1]["train_loss"] and rows[1]["lr"] == pytest.approx(rows[0]["lr"] / 2)
    sheets = [np.asarray(Image.open(explained / f"explanations-{epoch}.png")) for epoch in range(2)]
    assert len([*explained.glob("*.png")]) == 2 and (sheets[0] != sheets[1]).any()
    photographs = np.asarray(tve_hf.visualization.gallery([[image] for image in watched]))
    cells = photographs.shape[1] - GAP  # of one column, with the gap on its left
    for sheet in sheets:  # names, photographs, maps; the header is above
        height, left = len(photographs), sheet.shape[1] - GAP - 2 * cells
        assert height < len(sheet) < height + cells / 2  # there is no further row
        shown, maps = (sheet[-height:, x : x + cells] for x in (left, left + cells))
        assert (shown == photographs[:, :cells]).all() and (maps != shown).any()


def test_the_fidelity_gap_is_that_of_the_last_epochs_maps(explained, watched):
    split = tve_hf.split_classifier(model_of(explained))
    pixels = split.image_processor(watched, return_tensors="pt")["pixel_values"]
    classes = split(pixels).logits.argmax(-1)
    maps = tve_hf.methods.explain("sampled", split, pixels, classes)
    expected = tve_hf.fidelity(split, pixels, maps, classes).gap.mean().item()
    assert rows_of(explained)[-1]["eval_fidelity_gap"] == pytest.approx(expected, abs=1e-5)


def test_accuracy_is_that_of_timms_own_transform_and_the_saved_model_knows_its_classes(explained, folder):
    model = model_of(explained)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    test = datasets.load_dataset(str(folder), split="test")
    with torch.no_grad():
        found = model(torch.stack([transform(image) for image in test["image"]])).argmax(1)
    assert rows_of(explained)[-1]["eval_accuracy"] == (found == torch.tensor(test["label"])).float().mean()
    assert tve_hf.split_classifier(model).id2label == {0: "red", 1: "blue"}


def test_training_is_the_same_without_explanations(train, explained):
    plain = train(0)
    assert same_weights(model_of(plain), model_of(explained))
    kept = ("train_loss", "eval_accuracy", "lr")
    assert [[row[name] for name in kept] for row in rows_of(plain)] == [
        [row[name] for name in kept] for row in rows_of(explained)
    ]
    assert not [*plain.glob("*.png")] and "eval_fidelity_gap" not in rows_of(plain)[0]


def test_another_run_is_not_written_over(example, explained, folder):
    before = (explained / "summary.csv").read_text()
    given = ["--dataset", str(folder), "--classifier", "test_vit", "--output_dir", str(explained)]
    with pytest.raises(ValueError, match=re.escape(f"{explained} holds another run")):
        example.main(given)
    assert (explained / "summary.csv").read_text() == before
