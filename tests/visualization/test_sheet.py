"""Text on pictures: what a font cannot write is written otherwise, and what is too long is shortened."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from tve_hf.visualization import sheet


@pytest.fixture
def no_system_fonts(monkeypatch):
    monkeypatch.setattr(sheet, "_FONTS", ())
    sheet._fonts.cache_clear()
    yield
    sheet._fonts.cache_clear()


def test_names_lose_their_accents_rather_than_turn_into_boxes(no_system_fonts):
    assert sheet._readable("tabby, tabby cat", 14)[0] == "tabby, tabby cat"
    assert sheet._readable("Épagneul  breton,\nžába", 14)[0] == "Epagneul breton, zaba"
    assert sheet._readable("猫", 14)[0] == "?"


def test_a_font_of_the_system_writes_what_pillows_own_cannot(monkeypatch):
    own, other = ImageFont.load_default(14), object()
    monkeypatch.setattr(sheet, "_fonts", lambda size: [own, other])
    monkeypatch.setattr(sheet, "_has", lambda font, character: font is other or character.isascii())
    assert sheet._readable("猫", 14) == ("猫", other)
    assert sheet._readable("cat", 14) == ("cat", own)


@pytest.mark.parametrize("text", ["a", "W" * 500, "猫" * 90, ""])
def test_text_stays_within_its_width(text):
    page = Image.new("RGB", (400, 40), "white")
    sheet._write(page, (200, 5), text, 18, 120)
    columns = np.nonzero((np.asarray(page) < 200).any((0, 2)))[0]
    assert columns.size == 0 if not text else 138 <= columns.min() and columns.max() <= 262


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([-0.5, 0.25], "-0.5 to +0.25"),
        ([-0.5, -0.25], "no patch for the class"),
        ([0.25, 0.5], "no patch against the class"),
        ([0.0, 0.0], "all patches at 0"),
    ],
)
def test_the_range_says_what_one_coloured_maps_mean(scores, words):
    assert words in sheet.score_range(np.array([scores]))
