"""The pictures of docs/concepts.md."""

import re

import pytest
import torch
from PIL import Image
from scripts import EXAMPLES, load_example

pytest.importorskip("skimage")
DOCS = EXAMPLES.parent / "docs"


@pytest.fixture(scope="module")
def example():
    return load_example("draw_concepts")


@pytest.fixture(scope="module")
def scene(example):
    return example.Scene()


def test_the_page_shows_each_picture(example) -> None:
    shown = re.findall(r"\]\(concepts/(\w+)\.png\)", (DOCS / "concepts.md").read_text())
    assert shown == [*example.PICTURES]
    assert {path.stem for path in (DOCS / "concepts").iterdir()} == {*shown}


def test_masked_images_show_what_they_say(scene) -> None:
    keep = torch.zeros(scene.grid, dtype=torch.bool)
    keep[0, 1] = True
    whole, masked = scene.image(scene.pixels[0]), scene.masked(keep.flatten())
    width, height = whole.width // scene.grid[1], whole.height // scene.grid[0]
    box = (width, 0, 2 * width, height)
    assert masked.crop(box).tobytes() == whole.crop(box).tobytes()
    masked.paste((0, 0, 0), box)
    assert len(set(masked.getdata())) == 2  # the hole, and one colour, the mean of the training images
    small = scene.pipeline.image_processor(scene.photo, return_tensors="pt", do_normalize=False)["pixel_values"][0]
    mean = (small - torch.tensor(whole.convert("RGB").getdata()).float().T.reshape(small.shape) / 255).abs().max()
    assert mean < 0.01


@pytest.mark.slow
def test_all_are_drawn(example, tmp_path) -> None:
    example.main(["--output_dir", str(tmp_path)])
    for name in example.PICTURES:
        assert len(Image.open(tmp_path / f"{name}.png").convert("RGB").resize((64, 64)).getcolors(4096)) > 50
