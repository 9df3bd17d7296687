"""Drawings against where things must lie; the colours themselves are judged by eye."""

import numpy as np
import pytest
import torch
from PIL import Image

from tve_hf.visualization import gallery, heatmap, overlay

REGIONS = [None, (85.2, 23.4, 413.7, 351.9), (-60.0, 0.0, 560.0, 375.0)]


@pytest.mark.parametrize("region", REGIONS)
def test_hot_patch_lies_on_its_rectangle(region):
    rows, cols, (width, height) = 5, 8, (500, 375)
    left, top, right, bottom = region or (0, 0, width, height)
    for row, col in [(0, 1), (4, 6), (2, 3), (1, 5)]:
        scores = torch.zeros(rows, cols)
        scores[row, col] = 3.0
        drawn = heatmap(scores, (width, height), region)
        assert drawn.shape == (height, width) and drawn.dtype == np.float32
        assert drawn.min() == 0 and drawn.max() == 1
        y, x = np.unravel_index(drawn.argmax(), drawn.shape)
        assert left + col * (right - left) / cols <= x + 0.5 <= left + (col + 1) * (right - left) / cols
        assert top + row * (bottom - top) / rows <= y + 0.5 <= top + (row + 1) * (bottom - top) / rows
        ys, xs = np.nonzero(drawn > 0.5)  # the whole hot spot, not only its peak, is centred there
        assert abs(xs.mean() + 0.5 - (left + (col + 0.5) * (right - left) / cols)) < 0.3 * (right - left) / cols
        assert abs(ys.mean() + 0.5 - (top + (row + 0.5) * (bottom - top) / rows)) < 0.3 * (bottom - top) / rows


def test_map_agrees_with_the_scores_at_patch_centres():
    scores = np.random.default_rng(0).normal(size=(6, 9))
    drawn = heatmap(scores, (270, 180), None)
    centres = drawn[15::30, 15::30]
    assert np.corrcoef(centres.ravel(), scores.ravel())[0, 1] > 0.99


def test_outside_the_region_is_zero():
    scores = np.random.default_rng(0).normal(size=(4, 4))
    drawn = heatmap(scores, (40, 30), (10, 5, 30, 25))
    inside = np.zeros((30, 40), bool)
    inside[5:25, 10:30] = True
    assert (drawn[~inside] == 0).all() and drawn[inside].max() == 1
    np.testing.assert_array_equal(drawn[5:25, 10:30], heatmap(scores, (20, 20)))


@pytest.mark.parametrize("factor", [1e-30, 0.1, 7.0, 1e30])
def test_scale_and_shift_do_not_matter(factor):
    scores = np.random.default_rng(1).normal(size=(7, 5))
    expected = heatmap(scores, (31, 47))
    np.testing.assert_allclose(heatmap(factor * scores, (31, 47)), expected, atol=1e-6)
    np.testing.assert_allclose(heatmap(factor * (scores + 3), (31, 47)), expected, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-40, 1e30])
def test_constant_scores_give_zeros(value):
    noise = np.random.default_rng(0).choice([-1, 1], (3, 4)) * np.finfo(np.float32).eps
    for scores in (np.full((3, 4), value), (np.full((3, 4), value) * (1 + noise)).astype(np.float32)):
        np.testing.assert_array_equal(heatmap(scores, (20, 10)), np.zeros((10, 20)))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 300)])
def test_images_smaller_than_the_grid(size):
    scores = np.random.default_rng(0).normal(size=(14, 14))
    drawn = heatmap(scores, size)
    assert drawn.shape == size[::-1] and np.isfinite(drawn).all()
    assert 0 <= drawn.min() and drawn.max() <= 1


def test_scores_are_left_alone():
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = scores.detach().clone()
    heatmap(scores, (9, 9))
    assert torch.equal(scores, before)
    assert heatmap(scores.bfloat16(), (9, 9)).max() == 1


@pytest.mark.parametrize("scores", [np.array([[0, np.nan]]), np.array([[0, np.inf]]), np.zeros(4), np.zeros((0, 3))])
def test_maps_that_cannot_be_drawn_are_refused(scores):
    with pytest.raises(ValueError, match="scores"):
        heatmap(scores, (8, 8))


def test_region_outside_the_image_is_refused():
    with pytest.raises(ValueError, match="region from 20 to 30"):
        heatmap(np.eye(2), (10, 10), (20, 0, 30, 10))


def photo(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(37, 23), (1, 1), (2, 99), (224, 224)])
@pytest.mark.parametrize("with_region", [False, True])
def test_overlay_has_the_size_of_the_image(size, with_region):
    region = (0.3 * size[0], 0.0, size[0] + 5.0, 0.8 * size[1]) if with_region else None
    drawn = overlay(photo(*size), heatmap(np.eye(4), size, region), region)
    assert drawn.size == size and drawn.mode == "RGB"


def test_alpha_zero_is_the_image_inside_the_region():
    image, region = photo(41, 31), (10.0, 5.0, 33.0, 28.0)
    scores = np.eye(5)
    assert overlay(image, heatmap(scores, image.size), alpha=0) == image
    drawn = np.asarray(overlay(image, heatmap(scores, image.size, region), region, alpha=0))
    np.testing.assert_array_equal(drawn[5:28, 10:33], np.asarray(image)[5:28, 10:33])


def test_unseen_pixels_are_dark_grey_behind_a_frame():
    image, region = Image.new("RGB", (60, 40), (200, 120, 40)), (20, 10, 50, 30)
    drawn = np.asarray(overlay(image, np.zeros((40, 60)), region)).astype(int)
    assert (drawn[9, 19:51] == 255).all() and (drawn[30, 19:51] == 255).all()
    assert (drawn[9:31, 19] == 255).all() and (drawn[9:31, 50] == 255).all()
    outside = np.ones((40, 60), bool)
    outside[9:31, 19:51] = False
    assert np.ptp(drawn[outside], 1).max() == 0 and drawn[outside].max() < 50


def test_brightness_rises_with_the_heat():
    ramp = np.linspace(0, 1, 256)[None]
    drawn = overlay(Image.new("RGB", (256, 1), "grey"), ramp, alpha=1)
    assert (np.diff(np.asarray(drawn.convert("L"))[0].astype(int)) >= 0).all()


def test_overlay_refuses_what_does_not_fit():
    image = photo(6, 4)
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        overlay(image, np.zeros((6, 4)))
    for drawn, alpha in ((np.full((4, 6), 1.5), 0.5), (np.full((4, 6), np.nan), 0.5), (np.zeros((4, 6)), 2)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            overlay(image, drawn, alpha=alpha)


def test_gallery_shows_every_picture_whole():
    colors = [["red", "lime"], ["blue"]]
    rows = [[Image.new("RGB", (30, 20), color) for color in row] for row in colors]
    sheet = gallery(rows, ["exact", "a caption " * 30], ["cat.jpg", "a much longer row title " * 20])
    counts = {color: count for count, color in sheet.getcolors(sheet.width * sheet.height)}
    for color in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]:
        assert counts[color] == 224 * 149  # 30 x 20 enlarged to the cell
    assert gallery(rows).width < sheet.width


def test_gallery_refuses_what_does_not_fit():
    row = [Image.new("RGB", (4, 4))]
    with pytest.raises(ValueError, match="at least one"):
        gallery([[]])
    with pytest.raises(ValueError, match="1 column titles, got 2"):
        gallery([row], ["a", "b"])
    with pytest.raises(ValueError, match="2 row titles, got 1"):
        gallery([row, row], row_titles=["a"])
