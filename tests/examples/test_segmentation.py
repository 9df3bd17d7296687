"""The example that compares maps with masks: the masks as the model sees the image, and the whole command."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import GRID, noise_image
from transformers import CLIPImageProcessorPil

import tve_hf
from tve_hf.evaluation.localization import localization

EXAMPLE = Path(__file__).parents[2] / "examples" / "segmentation.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("segmentation", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("crop", [True, False])
def test_a_mask_is_cut_as_its_image_is(example, crop) -> None:
    """A picture that is white on the object goes through the processor: where it comes out white is the object."""
    mask = np.zeros((60, 90), np.uint8)
    mask[10:50, 20:50] = 255
    mask[30:, 50:70] = 255
    picture = Image.fromarray(mask)
    processor = CLIPImageProcessorPil(
        do_center_crop=crop,
        size={"shortest_edge": 40} if crop else {"height": 32, "width": 32},
        crop_size={"height": 32, "width": 32},
        do_normalize=False,
    )
    shown = processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0, 0] > 0.5
    found = example.mask_as_seen(picture, processor, 32, 32)
    assert found.dtype == torch.bool and found.shape == (32, 32)
    assert 0.1 < shown.float().mean() < 0.9
    assert (found != shown).float().mean() < 0.03  # on the border of the object


def test_padding_is_background(example) -> None:
    """A processor that puts the image in the middle of a larger square."""

    def processor(images, return_tensors: str) -> dict[str, torch.Tensor]:
        images = images if isinstance(images, list) else [images]
        padded = [Image.new("RGB", (2 * max(x.size),) * 2) for x in images]
        for square, image in zip(padded, images, strict=True):
            square.paste(image, tuple((square.width - side) // 2 for side in image.size))
        arrays = [np.array(square.resize((64, 64), Image.Resampling.BILINEAR)) for square in padded]
        return {"pixel_values": torch.stack([torch.from_numpy(x).permute(2, 0, 1) / 255 for x in arrays])}

    found = example.mask_as_seen(Image.new("L", (80, 40), 255), processor, 64, 64)
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[24:40, 16:48] = True
    assert (found != expected).float().mean() < 0.03


def _rows(folder: Path, sizes: list[tuple[int, int]], mask_sizes: list[tuple[int, int]]) -> Path:
    datasets = pytest.importorskip("datasets")
    masks = []
    for size in mask_sizes:
        mask = np.zeros(size[::-1], np.uint8)
        mask[: size[1] // 2, : size[0] // 3] = 255
        masks.append(Image.fromarray(mask))
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "label": datasets.Value("int64")}
    )
    rows = {"image": [noise_image(seed, size) for seed, size in enumerate(sizes)], "mask": masks}
    rows["label"] = [0] * len(masks)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "masks.parquet")
    return folder / "masks.parquet"


def _run(example, monkeypatch, **arguments) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(arguments["output_file"].parent / "cache"))
    line = " ".join(f"--{key} {value}" for key, value in arguments.items())
    monkeypatch.setattr(sys, "argv", ["segmentation.py", *line.split()])
    example.main()


def test_the_command_gives_what_the_functions_give(tmp_path, monkeypatch, example, pair) -> None:
    classifier, explainer = pair
    sizes = [(40, 40), (60, 40), (32, 50)]
    output = tmp_path / "new" / "report.json"
    _run(
        example,
        monkeypatch,
        classifier=classifier,
        model=explainer,
        files=_rows(tmp_path, sizes, sizes),
        methods="centre rollout tve rise@20",
        batch_size=2,
        output_file=output,
    )
    report = json.loads(output.read_text())
    assert report["num_images"] == 3
    assert list(report["methods"]) == ["centre", "rollout", "tve", "rise@20"]

    model = tve_hf.split_classifier(classifier)
    images = [noise_image(seed, size) for seed, size in enumerate(sizes)]
    pixel_values = model.image_processor(images, return_tensors="pt")["pixel_values"]
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[:, :16] = torch.arange(32) < torch.tensor([13, 20, 10]).view(3, 1, 1) * 32 / torch.tensor([40, 60, 32]).view(
        3, 1, 1
    )  # a third, rounded down in pixels of each image, by the half
    maps = tve_hf.methods.explain("rollout", model, pixel_values, torch.zeros(3, dtype=torch.int64), GRID)
    expected = localization(maps, masks)
    found = report["methods"]["rollout"]
    assert found["mean_iou"] == pytest.approx(expected.mean_iou.item(), abs=0.02)
    for name in ("pointing", "pixel_accuracy", "average_precision"):
        values = getattr(expected, name).tolist()
        assert found[name]["per_image"] == pytest.approx(values, abs=0.02)
        assert found[name]["mean"] == pytest.approx(sum(found[name]["per_image"]) / 3, abs=2e-4)
        assert found[name]["interval"][0] <= found[name]["mean"] <= found[name]["interval"][1]


def test_a_mask_of_another_size_is_refused(tmp_path, monkeypatch, example, pair) -> None:
    wrong = r"Image 1 of .*, of \(40, 40\) pixels, has a mask of \(20, 40\); pass masks that fit"
    with pytest.raises(SystemExit, match=wrong):
        _run(
            example,
            monkeypatch,
            classifier=pair[0],
            files=_rows(tmp_path, [(40, 40)] * 2, [(40, 40), (20, 40)]),
            methods="centre",
            output_file=tmp_path / "report.json",
        )
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": "centre tve"}, "The method tve needs an explainer of the classifier; pass --model"),
        ({"methods": "grad_cat"}, "Unknown method 'grad_cat'"),
        ({"mask_column": "label"}, "has no images in a column 'label'; pass that of the masks as --mask_column"),
        ({"mask_column": "kind"}, "has no images in a column 'kind'; pass that of the masks as --mask_column"),
        ({"num_images": 0}, "gives no image with --num_images 0; pass at least one"),
        ({"files": "none.parquet"}, "none.parquet"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    tmp_path, monkeypatch, example, pair, change, message
) -> None:
    monkeypatch.setattr(example, "options_of", None)  # of what computes maps
    arguments = {"classifier": pair[0], "methods": "centre", "output_file": tmp_path / "report.json"}
    rows = _rows(tmp_path, [(40, 40)], [(40, 40)])
    with pytest.raises(SystemExit, match=message):
        _run(example, monkeypatch, **({"files": rows} | arguments | change))
    assert not (tmp_path / "report.json").exists()
