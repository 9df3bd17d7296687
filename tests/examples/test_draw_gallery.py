"""The pictures of docs/gallery.md."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import EXAMPLES, load_example
from transformers import pipeline

pytest.importorskip("skimage")
DOCS = EXAMPLES.parent / "docs"


@pytest.fixture(scope="module")
def example():
    return load_example("draw_gallery")


@pytest.fixture(scope="module")
def explain():
    return pipeline("transferable-attribution")


def test_the_page_shows_each_picture_and_says_whose_it_is(example) -> None:
    text = (DOCS / "gallery.md").read_text()
    shown = re.findall(r"\]\(gallery/([\w.]+)\)", text)
    assert shown == [*(f"{name}.png" for name in example.PHOTOGRAPHS), "deletion.webp"]
    assert {path.name for path in (DOCS / "gallery").iterdir()} == {*shown}
    licensed = re.findall(r"^\| (\w+) \| [^|]+ \| (?:CC0|public domain) \|$", text, flags=re.MULTILINE)
    assert [name.lower() for name in licensed] == [*example.PHOTOGRAPHS]


def test_crops_are_squares_of_the_photograph_and_those_of_the_seed(example) -> None:
    for name in example.PHOTOGRAPHS:
        first, second = (example.views(name, np.random.default_rng(3)) for _ in range(2))
        whole, crop = first["whole"], first["crop"]
        assert crop.tobytes() == second["crop"].tobytes()
        assert crop.width == crop.height and min(whole.size) // 2 <= crop.width <= min(whole.size)
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(whole)[..., 0], crop.size[::-1])
        first_rows = windows[:, :, 0] == np.asarray(crop)[0, :, 0]
        assert first_rows.all(-1).any()


def test_the_curve_is_the_probability_of_the_images_beside_it(example, explain) -> None:
    photograph = Image.fromarray(example.data.coffee())
    (explanation,) = explain(photograph)
    deletion = example.Deletion(explain, explanation, photograph)
    with torch.no_grad():
        found = explain.classifier(deletion.images).logits.softmax(-1)[:, explanation["class_idx"]]
    torch.testing.assert_close(deletion.curve, found, atol=1e-5, rtol=1e-4)
    assert found[0].item() == pytest.approx(explanation["score"], abs=1e-4)
    # The first to go is the patch with the highest score.
    rows, columns = explanation["attribution"].shape
    height, width = deletion.images.shape[-2] // rows, deletion.images.shape[-1] // columns
    changed = (deletion.images[1] != deletion.images[0]).any(0).unfold(0, height, height).unfold(1, width, width)
    changed = changed.flatten(2).any(-1).numpy()
    order = np.sort(explanation["attribution"], axis=None)[::-1]
    assert set(explanation["attribution"][changed]) == set(order[: changed.sum()]) and changed.sum() == 2
    assert deletion.frame(0).size == deletion.frame(1).size


@pytest.mark.slow
def test_all_are_drawn_by_the_methods_that_are_named(example, tmp_path) -> None:
    example.main(["--output_dir", str(tmp_path), "--methods", "tve", "centre"])
    for name in example.PHOTOGRAPHS:
        assert Image.open(tmp_path / f"{name}.png").width == example.WIDTH
    with Image.open(tmp_path / "deletion.webp") as animation:
        assert animation.n_frames == 33
