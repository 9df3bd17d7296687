"""Drawings against where things must lie, what colours must say, and results that draw only when they are asked."""

import base64
import copy
import pickle
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import tve_hf.visualization.drawing as drawing
from tve_hf.visualization import Explanation, Photograph, color_limit, figure, gallery, heatmap, overlay

REGIONS = [None, (85.2, 23.4, 413.7, 351.9), (-60.0, 0.0, 560.0, 375.0)]


def photo(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def noise(*shape):
    return np.random.default_rng(1).normal(size=shape)


# --- the map on the image -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("region", REGIONS)
def test_hot_patch_lies_on_its_rectangle(region, sign, smooth):
    rows, cols, (width, height) = 5, 8, (500, 375)
    left, top, right, bottom = region or (0, 0, width, height)
    for row, col in [(0, 1), (4, 6), (2, 3), (1, 5)]:
        scores = torch.zeros(rows, cols)
        scores[row, col] = 3.0 * sign
        drawn = heatmap(scores, (width, height), region, smooth=smooth)
        assert drawn.shape == (height, width) and drawn.dtype == np.float32
        strength = sign * (2 * drawn - 1)
        assert strength.min() == 0 and 0.99 < strength.max() <= 1  # nothing of the other sign around it
        ys, xs = np.nonzero(strength > 0.5)  # the whole hot spot, not only its peak, is centred there
        assert abs(xs.mean() + 0.5 - (left + (col + 0.5) * (right - left) / cols)) < 0.3 * (right - left) / cols
        assert abs(ys.mean() + 0.5 - (top + (row + 0.5) * (bottom - top) / rows)) < 0.3 * (bottom - top) / rows


def test_blocks_are_the_scores_repeated():
    scores = noise(6, 9)
    limit = np.abs(scores).max()
    expected = 0.5 + 0.5 * scores.repeat(30, 0).repeat(20, 1) / limit
    np.testing.assert_allclose(heatmap(scores, (180, 180), limit=limit, smooth=False), expected, atol=1e-6)


def test_smooth_map_has_the_scores_in_the_middle_of_patches_and_none_beyond_them_between():
    scores = noise(6, 9)
    drawn = 2 * heatmap(scores, (9 * 31, 6 * 31), limit=10.0) - 1
    np.testing.assert_allclose(10 * drawn[15::31, 15::31], scores, atol=1e-5)
    between = 10 * drawn[15 : 15 + 32, 15 : 15 + 32]  # from the middle of one patch to those of its neighbours
    assert scores[:2, :2].min() - 1e-5 <= between.min() and between.max() <= scores[:2, :2].max() + 1e-5


def test_zero_is_in_the_middle_whatever_the_range():
    for scores in (np.array([[-1.0, 0.0, 5.0]]), np.array([[-5.0, 0.0, 1.0]]), np.array([[-3.0, -2.0, 0.0]])):
        drawn = heatmap(scores, (3, 1), smooth=False)[0]
        np.testing.assert_array_equal(np.sign(drawn - 0.5), np.sign(scores[0]))
        assert drawn[scores[0] == 0] == 0.5


def test_outside_the_region_there_is_no_evidence():
    drawn = heatmap(noise(4, 4), (40, 30), (10, 5, 30, 25))
    inside = np.zeros((30, 40), bool)
    inside[5:25, 10:30] = True
    assert (drawn[~inside] == 0.5).all() and (drawn[inside] != 0.5).all()
    np.testing.assert_array_equal(drawn[5:25, 10:30], heatmap(noise(4, 4), (20, 20)))


@pytest.mark.parametrize("factor", [1e-30, 0.1, 7.0, 1e30])
def test_scale_does_not_matter_but_sign_does(factor):
    scores = noise(7, 5)
    expected = heatmap(scores, (31, 47))
    np.testing.assert_allclose(heatmap(factor * scores, (31, 47)), expected, atol=1e-6)
    np.testing.assert_allclose(heatmap(-factor * scores, (31, 47)), 1 - expected, atol=1e-6)


def test_colours_end_at_the_98th_percentile_of_absolute_scores():
    scores = np.arange(-100.0, 101.0).reshape(3, 67)
    scores[2, 66] = 1e9  # one stray patch
    assert color_limit(scores) == np.percentile(np.abs(scores), 98) < 100
    assert color_limit(torch.tensor(scores)) == color_limit(scores)
    hot = np.zeros((14, 14))
    hot[3, 3] = -2.0
    assert color_limit(hot) == 2.0  # where nearly all are zero it is the largest
    assert color_limit(np.zeros((2, 2))) == 0.0


def test_limit_makes_maps_comparable():
    scores = noise(4, 4)
    limit = color_limit(scores)
    strong, weak = (2 * heatmap(s, (8, 8), limit=limit, smooth=False) - 1 for s in (scores, 0.1 * scores))
    np.testing.assert_allclose(weak[np.abs(strong) < 1], 0.1 * strong[np.abs(strong) < 1], atol=1e-6)


def test_all_zero_is_all_zero():
    np.testing.assert_array_equal(heatmap(np.zeros((3, 4)), (20, 10)), np.full((10, 20), 0.5))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 300)])
def test_images_smaller_than_the_grid(size, smooth):
    drawn = heatmap(noise(14, 14), size, smooth=smooth)
    assert drawn.shape == size[::-1] and np.isfinite(drawn).all()
    assert 0 <= drawn.min() and drawn.max() <= 1


def test_scores_are_left_alone():
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = scores.detach().clone()
    heatmap(scores, (9, 9))
    assert torch.equal(scores, before)
    assert heatmap(scores.bfloat16(), (9, 9)).shape == (9, 9)


@pytest.mark.parametrize("scores", [np.array([[0, np.nan]]), np.array([[0, np.inf]]), np.zeros(4), np.zeros((0, 3))])
def test_maps_that_cannot_be_drawn_are_refused(scores):
    with pytest.raises(ValueError, match="scores"):
        heatmap(scores, (8, 8))


def test_region_outside_the_image_is_refused():
    with pytest.raises(ValueError, match="region from 20 to 30"):
        heatmap(np.eye(2), (10, 10), (20, 0, 30, 10))


# --- colours over the image -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(37, 23), (1, 1), (2, 99), (224, 600)])
@pytest.mark.parametrize("with_region", [False, True])
def test_overlay_has_the_size_of_the_image(size, with_region):
    region = (0.3 * size[0], 0.0, size[0] + 5.0, 0.8 * size[1]) if with_region else None
    drawn = overlay(photo(*size), heatmap(np.eye(4), size, region), region)
    assert drawn.size == size and drawn.mode == "RGB"


def test_zero_is_transparent():
    image = photo(60, 600)
    drawn = overlay(image, np.full((600, 60), 0.5))
    assert not ImageChops.difference(drawn, image.convert("L").convert("RGB")).getbbox()


def test_red_supports_blue_opposes_and_more_is_stronger():
    grey = Image.new("RGB", (255, 1), (128, 128, 128))
    drawn = np.asarray(overlay(grey, np.linspace(0, 1, 255)[None]))[0].astype(int)
    red_less_blue = drawn[:, 0] - drawn[:, 2]
    assert (red_less_blue[:127] < 0)[:110].all() and (red_less_blue[128:] > 0)[17:].all()
    assert (drawn[127] == 128).all()
    distance = np.linalg.norm(drawn - 128.0, axis=1)  # from the photograph's own colour
    assert (np.diff(distance[127:]) >= -1).all() and (np.diff(distance[:128]) <= 1).all()
    assert distance[0] > 60 and distance[-1] > 60


def test_blue_and_red_differ_for_those_who_see_no_red_or_no_green():
    # Viénot, Brettel and Mollon 1999: linear RGB as a protanope and a deuteranope see it.
    seen = [[(0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)]]
    seen += [[(0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1)]]
    linear = (np.array([drawing.PALETTE[0], drawing.PALETTE[-1]]) / 255) ** 2.2
    for matrix in seen:
        against, supports = linear @ np.array(matrix).T
        assert against[2] > 3 * against[:2].max() and supports[:2].max() > 1.5 * supports[2]


def test_the_photograph_stays_legible_under_the_strongest_colours():
    stripes = np.zeros((10, 20, 3), np.uint8)
    stripes[:, ::2] = 255
    for value in (0.0, 1.0):
        drawn = np.asarray(overlay(Image.fromarray(stripes), np.full((10, 20), value)).convert("L")).astype(int)
        assert (drawn[:, ::2] - drawn[:, 1::2] > 255 / 4).all()


def test_alpha_zero_is_the_image_inside_the_region():
    image, region = photo(41, 31), (10.0, 5.0, 33.0, 28.0)
    assert overlay(image, heatmap(np.eye(5), image.size), alpha=0) == image
    drawn = np.asarray(overlay(image, heatmap(np.eye(5), image.size, region), region, alpha=0))
    np.testing.assert_array_equal(drawn[5:28, 10:33], np.asarray(image)[5:28, 10:33])


def test_unseen_pixels_are_lightly_veiled_behind_a_frame():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, ::2] = 250
    drawn = np.asarray(overlay(Image.fromarray(pixels), np.full((40, 60), 0.5), (20, 10, 50, 30))).astype(int)
    assert (drawn[9, 19:51] == 255).all() and (drawn[30, 19:51] == 255).all()
    assert (drawn[9:31, 19] == 255).all() and (drawn[9:31, 50] == 255).all()
    np.testing.assert_array_equal(drawn[10:30, 20:50], pixels[10:30, 20:50])  # grey already
    above = drawn[:8]
    assert np.ptp(above, axis=2).max() == 0 and (above >= pixels[:8]).all()
    assert 100 < np.ptp(above) < 200  # what is there can be made out


def test_overlay_refuses_what_does_not_fit():
    image = photo(6, 4)
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        overlay(image, np.zeros((6, 4)))
    for drawn, alpha in ((np.full((4, 6), 1.5), 0.5), (np.full((4, 6), np.nan), 0.5), (np.zeros((4, 6)), 2)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            overlay(image, drawn, alpha=alpha)


# --- results that draw ----------------------------------------------------------------------------------------------


def explanation(image=None, scores=None, region=None, max_size=1600, **options):
    photograph = Photograph(image or photo(90, 60), region, max_size)
    values = {"label": "cat", "score": 0.7, "attribution": noise(4, 6) if scores is None else scores}
    return Explanation(values, photograph, "change of probability", **options)


@pytest.fixture
def paintings(monkeypatch):
    """One entry for each picture that is painted."""
    painted, paint = [], drawing._paint
    monkeypatch.setattr(drawing, "_paint", lambda *args: painted.append(1) or paint(*args))
    return painted


def test_pictures_are_drawn_when_they_are_asked_for_and_once(paintings):
    found = explanation()
    assert list(found) == ["label", "score", "attribution", "heatmap", "overlay", "figure"] and len(found) == 6
    assert "overlay" in found and "drawn when asked for" in repr(found)
    found.copy(), copy.deepcopy(found), pickle.loads(pickle.dumps(found))
    assert paintings == []
    assert found["overlay"] is found["overlay"] is found.get("overlay")
    assert len(paintings) == 1


def test_whatever_reads_all_values_gets_pictures():
    for read in (dict, lambda found: {**found}, lambda found: found | {}, lambda found: {} | found):
        plain = read(explanation())
        assert type(plain) is dict and isinstance(plain["overlay"], Image.Image)
    assert isinstance(dict(explanation().items())["figure"], Image.Image)
    assert any(isinstance(value, Image.Image) for value in explanation().values())
    assert isinstance(explanation().pop("overlay"), Image.Image)


def test_a_result_is_a_dict_that_can_be_changed():
    found = explanation()
    found["overlay"], found["note"] = "mine", 1
    del found["figure"]
    assert isinstance(found, dict) and found["overlay"] == "mine" and set(found) >= {"note"} and "figure" not in found
    assert found.get("figure") is None and found.setdefault("label", "dog") == "cat"
    with pytest.raises(KeyError):
        found["figure"]


def test_copies_and_pickles_draw_the_same():
    found = explanation(region=(3.0, 0.0, 80.0, 60.0))
    for other in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert type(other) is Explanation
        assert other["overlay"] == found["overlay"]
        np.testing.assert_array_equal(other["heatmap"], found["heatmap"])


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("region", [None, (10.5, 301.0, 69.0, 550.2)])
def test_overlay_drawn_in_bands_is_that_of_the_whole_heat_map(region, smooth):
    image = photo(80, 700)
    found = explanation(image, noise(7, 5), region, smooth=smooth)
    expected = overlay(image, heatmap(noise(7, 5), image.size, region, smooth=smooth), region)
    np.testing.assert_allclose(np.asarray(found["overlay"]).astype(int), np.asarray(expected), atol=1)
    np.testing.assert_array_equal(found["heatmap"], heatmap(noise(7, 5), image.size, region, smooth=smooth))


def test_large_photographs_are_drawn_at_a_bounded_size_unless_asked_otherwise():
    large, region = Image.new("RGB", (2000, 1000), (90, 90, 90)), (500.0, 0.0, 1500.0, 1000.0)
    scores = np.zeros((2, 2))
    scores[0, 1] = 1.0
    for max_size, size in ((1600, (1600, 800)), (200, (200, 100)), (None, (2000, 1000)), (5000, (2000, 1000))):
        found = explanation(large, scores, region, max_size, smooth=False)
        assert found["overlay"].size == size and found["heatmap"].shape == size[::-1]
        hot = np.nonzero(found["heatmap"] > 0.9)
        ends = [axis.min() / size[0] for axis in hot] + [axis.max() / size[0] for axis in hot]
        assert ends == pytest.approx([0, 0.5, 0.25, 0.75], abs=0.01)
    with pytest.raises(ValueError, match="max_size is 0"):
        Photograph(large, max_size=0)


def test_a_result_that_drew_nothing_is_small():
    pixels = np.asarray(photo(100, 75).resize((3000, 2250)))
    found = explanation(Image.fromarray(pixels))
    assert len(pickle.dumps(found)) < pixels.nbytes / 20
    assert explanation(photo(400, 300)).photograph.image() == photo(400, 300)  # small ones are kept as they are


# --- figures --------------------------------------------------------------------------------------------------------


def test_overlay_has_no_text_and_figure_has():
    plain = Image.new("RGB", (400, 300), (100, 100, 100))
    found = explanation(plain, np.zeros((5, 5)))
    assert found["overlay"] == plain
    titled = figure(found)
    assert found["figure"] == titled
    assert titled.width > 2 * 448 and titled.height > 448 * 3 / 4 + 100
    assert len(titled.getcolors(2**16)) > 20  # letters


def test_several_classes_share_one_scale():
    image, size = Image.new("RGB", (448, 448), (128, 128, 128)), 448 * 448
    photograph = Photograph(image)
    strong, weak = (
        Explanation({"label": name, "score": 0.5, "attribution": np.full((2, 2), value)}, photograph, "nats")
        for name, value in (("strong", 1.0), ("weak", 0.1))
    )
    counts = {color: count for count, color in figure([strong, weak]).getcolors(2**20)}
    for value in (1.0, 0.1):
        color = overlay(image, np.full((448, 448), 0.5 + 0.5 * value)).getpixel((0, 0))
        assert counts[color] >= size
    alone = {color: count for count, color in figure(weak).getcolors(2**20)}
    assert alone[overlay(image, np.ones((448, 448))).getpixel((0, 0))] >= size
    assert figure([strong, weak]).width > figure(weak).width


@pytest.mark.parametrize("size", [(32, 32), (3000, 400), (40, 900)])
def test_figures_of_any_shape_show_photograph_and_map_whole(size):
    found = explanation(Image.new("RGB", size, (10, 200, 30)), np.ones((3, 3)))
    sheet = found["figure"]
    panel = [round(side * 448 / max(size)) for side in size]
    counts = {color: count for count, color in sheet.getcolors(2**20)}
    assert counts[10, 200, 30] >= 0.99 * panel[0] * panel[1]
    assert counts[found["overlay"].getpixel((size[0] // 2, size[1] // 2))] >= 0.99 * panel[0] * panel[1]


def test_figure_refuses_what_has_no_common_scale():
    with pytest.raises(ValueError, match="one photograph"):
        figure([explanation(), explanation()])
    with pytest.raises(ValueError, match="one photograph"):
        figure([])


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


# --- in notebooks ---------------------------------------------------------------------------------------------------


def test_a_notebook_shows_the_picture_and_the_facts():
    quality = {"logit_r2": 0.4556, "num_images": 32}
    verification = {"num_coalitions": 64, "r2": 0.5, "r2_interval": (0.2, 0.7), "pearson": 0.8}
    values = {"label": "tabby", "score": 0.123, "attribution": np.array([[-0.5, 0.25]])}
    values |= {"method": "tve", "rule": "prob", "quality": quality, "verification": verification}
    found = Explanation(values, Photograph(photo(64, 48)), "change of probability")
    html = found._repr_html_()
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', html)
    shown = Image.open(BytesIO(base64.b64decode(data)))
    assert shown.size == found["overlay"].size
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(found["overlay"])).mean() < 20  # a JPEG of noise
    text = re.sub(r"<[^>]*>", " ", html)
    for fact in ("tabby, probability 12.3%", "tve, rule prob", "-0.5 to +0.25, change of probability; 1 x 2 patches"):
        assert fact in text
    assert "logit_r2 0.456, num_images 32" in text and "accounts for 50% (20% to 70%)" in text


def test_a_label_is_text_in_html_whatever_it_holds():
    values = {"label": '"><script>alert(1)</script>&', "score": 0.5, "attribution": np.ones((1, 1))}
    html = Explanation(values, Photograph(photo(8, 8)))._repr_html_()
    assert "<script" not in html and html.count("<img ") == 1
    parsed = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: parsed.append((tag, dict(attrs).get("alt")))
    parser.feed(html)
    assert {tag for tag, _ in parsed} == {"div", "img", "table", "tr", "th", "td"}
    assert any(alt and values["label"] in alt for _, alt in parsed)
