"""Pictures laid out on a sheet with text: a figure with its scale, and galleries to compare maps."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL = 448  # pixels of the longer side of a panel of a figure
_CELL, _GAP, _HEADER = 224, 6, 24  # of a gallery, pixels
_MARGIN, _NARROWEST = 16, 280  # of a figure; a column is at least so wide, for its title
_LARGE, _SMALL = 18, 14
_COLUMNS = 4
SIDES = "against the class", "for the class"  # of zero
_INK, _FAINT = (20, 20, 20), (90, 90, 90)
# Pillow's own font has little but ASCII; these are looked for where the system keeps fonts.
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "Arial.ttf", "arial.ttf", "msyh.ttc")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Panel:
    """One map of a figure: its picture, two lines of title, and the scores that it shows."""

    picture: Image.Image
    title: str
    subtitle: str
    scores: np.ndarray


@dataclass(frozen=True)
class Parts:
    """What a figure shows.

    Args:
        photograph: of the size of each panel's picture.
        panels: its maps.
        scale: the colours from -limit on the left to limit on the right.
        limit: the score where colours end.
        unit: of the scores.
        note: said below the scale.
        smooth: whether the maps are drawn smoothly.
    """

    photograph: Image.Image
    panels: Sequence[Panel]
    scale: Image.Image
    limit: float
    unit: str
    note: str
    smooth: bool


def sheet(parts: Parts) -> Image.Image:
    """Lay out a photograph, its maps and their one scale."""
    photograph, panels, scale = parts.photograph, parts.panels, parts.scale
    width, height = photograph.size
    column, row = max(width, _NARROWEST), 2 * _SMALL + _LARGE + height + 2 * _GAP + _MARGIN
    columns = across(photograph, panels)
    down = -(-(len(panels) + 1) // columns)
    legend = scale.height + 4 * (_SMALL + _GAP)
    total = max(columns * (column + _MARGIN), scale.width + 2 * _MARGIN) + _MARGIN
    page = Image.new("RGB", (total, _MARGIN + down * row + legend + _MARGIN), "white")
    left = (total - columns * (column + _MARGIN) + _MARGIN) // 2
    for place, panel in enumerate(with_photograph(photograph, panels, parts.smooth)):
        x, y = left + place % columns * (column + _MARGIN), _MARGIN + place // columns * row
        middle = x + column / 2
        _write(page, (middle, y), panel.title, _LARGE, column)
        _write(page, (middle, y + _LARGE + _GAP), panel.subtitle, _SMALL, column, _FAINT)
        y += _LARGE + _SMALL + 2 * _GAP + _GAP
        page.paste(panel.picture, (x + (column - width) // 2, y))
        if panel.scores.size:
            _write(page, (middle, y + height + 2), score_range(panel.scores), _SMALL, column, _FAINT)
    _legend(page, _MARGIN + down * row + _GAP, parts)
    return page


def across(photograph: Image.Image, panels: Sequence[Panel]) -> int:
    """How many pictures of a figure stand side by side."""
    return 1 if photograph.width > 2 * photograph.height else min(len(panels) + 1, _COLUMNS)


def with_photograph(photograph: Image.Image, panels: Sequence[Panel], smooth: bool) -> list[Panel]:
    """The pictures of a figure: the photograph, with what is said of all maps, and the maps."""
    rows, columns = panels[0].scores.shape
    how = "smoothed" if smooth else "as blocks"
    return [Panel(photograph, "photograph", f"maps of {rows} x {columns} patches, {how}", np.empty(0)), *panels]


def ticks(limit: float) -> dict[float, str]:
    """What is marked on the scale, by its share of the width; a map of nothing but zeros has none but zero."""
    return {0.0: f"{-limit:.2g}", 0.5: "0", 1.0: f"{limit:+.2g}"} if limit else {0.5: "0"}


def score_range(scores: np.ndarray) -> str:
    """The range of a map in words, and whether it lies on one side of zero."""
    low, high = float(np.min(scores)), float(np.max(scores))
    if low == high == 0:
        return "all patches at 0"
    aside = " : no patch for the class" if high <= 0 else " : no patch against the class" if low >= 0 else ""
    return f"{low:+.2g} to {high:+.2g}{aside}"


def _legend(page: Image.Image, y: int, parts: Parts) -> None:
    scale = parts.scale
    x = (page.width - scale.width) // 2
    page.paste(scale, (x, y))
    draw = ImageDraw.Draw(page)
    draw.rectangle((x - 1, y - 1, x + scale.width, y + scale.height), outline=_FAINT)
    bottom = y + scale.height
    for share, text in ticks(parts.limit).items():
        at = x + round(share * (scale.width - 1))
        draw.line((at, y, at, bottom + 4), fill=_INK)
        _write(page, (at, bottom + _GAP), text, _SMALL)
    below = bottom + 2 * _GAP + _SMALL
    against, supports = SIDES
    _write(page, (x + _length(against, _SMALL) / 2, below), against, _SMALL, color=_FAINT)
    _write(page, (x + scale.width / 2, below), parts.unit, _SMALL, scale.width - 240)
    _write(page, (x + scale.width - _length(supports, _SMALL) / 2, below), supports, _SMALL, color=_FAINT)
    _write(page, (x + scale.width / 2, below + _SMALL + _GAP), parts.note, _SMALL, scale.width, _FAINT)


def gallery(
    rows: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
) -> Image.Image:
    """Lay pictures out in a grid with captions, to compare maps side by side.

    Args:
        rows: pictures of any size, each scaled to fit a cell; rows may differ in length.
        column_titles: captions above the columns, one per column of the longest row.
        row_titles: captions left of the rows, one per row.

    Raises:
        ValueError: if there is no picture, or the number of titles does not fit.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("A gallery needs at least one picture.")
    for titles, count, name in ((column_titles, columns, "column"), (row_titles, len(rows), "row")):
        if titles and len(titles) != count:
            raise ValueError(f"Expected {count} {name} titles, got {len(titles)}: {list(titles)}.")
    shown = [[_fit_cell(picture) for picture in row] for row in rows]
    heights = [max((picture.height for picture in row), default=0) for row in shown]
    margin = min(_CELL, max(_length(title, _SMALL) + 2 * _GAP for title in row_titles)) if row_titles else 0
    y = (_HEADER if column_titles else 0) + _GAP
    size = (margin + columns * (_CELL + _GAP) + _GAP, y + sum(heights) + len(rows) * _GAP)
    page = Image.new("RGB", size, "white")
    for c, title in enumerate(column_titles):
        _write(page, (margin + _GAP + c * (_CELL + _GAP) + _CELL / 2, _GAP), title, _SMALL, _CELL)
    for r, row in enumerate(shown):
        if row_titles:
            _write(page, (margin / 2, y + heights[r] / 2 - _SMALL / 2), row_titles[r], _SMALL, margin - _GAP)
        for c, picture in enumerate(row):
            x = margin + _GAP + c * (_CELL + _GAP) + (_CELL - picture.width) // 2
            page.paste(picture, (x, y + (heights[r] - picture.height) // 2))
        y += heights[r] + _GAP
    return page


def _fit_cell(picture: Image.Image) -> Image.Image:
    scale = _CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _write(
    page: Image.Image,
    place: tuple[float, float],
    text: str,
    size: int,
    width: float | None = None,
    color: tuple[int, int, int] = _INK,
) -> None:
    """Write a line whose upper edge has its middle at a place, shortened to a width and moved onto the page."""
    text, font = _readable(text, size)
    while width and len(text) > 1 and font.getlength(text) > width:
        text = text.rstrip("…")[:-1].rstrip() + "…"
    half = font.getlength(text) / 2
    x = min(max(place[0], half + 2), page.width - half - 2)
    ImageDraw.Draw(page).text((round(x - half), round(place[1] + size)), text, fill=color, font=font, anchor="ls")


def _length(text: str, size: int) -> int:
    text, font = _readable(text, size)
    return int(font.getlength(text))


def _readable(text: str, size: int) -> tuple[str, Font]:
    """One line of a text and the font that has most of its characters; the others lose their accents or become "?"."""
    text = " ".join(text.split())
    font = max(_fonts(size), key=lambda font: sum(_has(font, character) for character in text))  # the first of equals

    def replaced(character: str) -> str:
        bare = unicodedata.normalize("NFKD", character)[0]
        return next((c for c in (character, bare) if _has(font, c)), "?")

    return "".join(map(replaced, text)), font


@cache
def _fonts(size: int) -> list[Font]:
    """Pillow's own font, and those of the system."""
    fonts: list[Font] = [ImageFont.load_default(size)]
    for name in _FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not installed
            continue
    return fonts


@cache  # or looking for a font takes most of the time of a figure
def _has(font: Font, character: str) -> bool:
    """Whether a font draws a character otherwise than one that no font has."""
    if character == " ":
        return True
    mask, unknown = font.getmask(character), font.getmask("\U0010ffff")
    return (mask.size, bytes(mask)) != (unknown.size, bytes(unknown))
