"""Draw attributions: a heat map on the original image, coloured over the photograph, and galleries to compare maps.

Drawing comes after the attribution and never changes it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Region = tuple[float, float, float, float]

# Inferno at nine equal steps: lightness rises evenly with the value, so the brightest spot is the strongest one, also
# in print and for the colour-blind.
_ANCHORS = np.array(
    [
        (0, 0, 4),
        (31, 12, 72),
        (85, 15, 109),
        (136, 34, 106),
        (186, 54, 85),
        (227, 89, 51),
        (249, 140, 10),
        (249, 201, 50),
        (252, 255, 164),
    ],
    dtype=np.float32,
)
_CELL, _GAP, _HEADER = 224, 6, 24  # of a gallery, pixels


def heatmap(scores: torch.Tensor | np.ndarray, size: tuple[int, int], region: Region | None = None) -> np.ndarray:
    """Spread patch scores smoothly over the image, scaled so that the lowest value is 0 and the highest 1.

    Signed scores are scaled over their whole range too, so 0 is the strongest evidence against the class, not the
    absence of evidence; the sign is in the scores, not in the picture.

    Args:
        scores: (rows, cols), any finite values.
        size: (width, height) of the original image, pixels.
        region: (left, top, right, bottom) of the part of the image that the scores cover, pixels, as from
            `seen_region`; it may exceed the image. The whole image if not given.

    Returns:
        (height, width), float32 in [0, 1]; 0 outside the region. Equal scores give a map of zeros.

    Raises:
        ValueError: if the scores are not a finite (rows, cols) map, or the region lies outside the image.
    """
    values = scores.detach().cpu().double().numpy() if isinstance(scores, torch.Tensor) else np.asarray(scores, float)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"Expected scores of shape (rows, cols), got {values.shape}: draw one map at a time.")
    if not np.isfinite(values).all():
        raise ValueError("The scores contain NaN or infinite values, so there is no map to draw.")
    width, height = size
    left, top, right, bottom = region or (0.0, 0.0, float(width), float(height))
    x0, x1, first_col, last_col = _cover(left, right, width, values.shape[1])
    y0, y1, first_row, last_row = _cover(top, bottom, height, values.shape[0])
    patches = Image.fromarray(min_max(torch.tensor(values)).float().numpy())
    smooth = patches.resize(
        (x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=(first_col, first_row, last_col, last_row)
    )
    result = np.zeros((height, width), np.float32)
    result[y0:y1, x0:x1] = min_max(torch.tensor(np.asarray(smooth))).numpy()
    return result


def overlay(image: Image.Image, heatmap: np.ndarray, region: Region | None = None, alpha: float = 0.5) -> Image.Image:
    """Colour a heat map over its image, from black (0) over violet and orange to light yellow (1).

    The photograph is turned grey under the colours, so that its own cannot be mistaken for the map's. What the model
    never saw, outside the region, is dark grey behind a bright frame.

    Args:
        image: the original image.
        heatmap: (height, width) of that image, in [0, 1], as from `heatmap`.
        region: (left, top, right, bottom) of the part of the image that the model saw, pixels. The whole image if not
            given.
        alpha: strength of the colours, from 0 (only the image) to 1 (only the map).

    Returns:
        An RGB image of the size of `image`.

    Raises:
        ValueError: if the heat map has another size than the image, a value or `alpha` is outside [0, 1], or the
            region lies outside the image.
    """
    width, height = image.size
    if heatmap.shape != (height, width):
        raise ValueError(f"Expected a heat map of shape {(height, width)}, as the image, got {heatmap.shape}.")
    if not (0 <= alpha <= 1 and heatmap.min() >= 0 and heatmap.max() <= 1):
        raise ValueError(
            f"Expected a heat map and an alpha in [0, 1] (alpha is {alpha}): use heatmap() to scale scores."
        )
    photo = np.asarray(image.convert("RGB"), dtype=np.float32)
    grey = photo @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)  # (height, width, 1), ITU-R 601 luma
    base = photo + min(1.0, 2 * alpha) * (grey - photo)
    seen = base + alpha * (_colors(heatmap) - base)
    if region is None:
        return Image.fromarray(np.rint(seen).astype(np.uint8))
    x0, x1, *_ = _cover(region[0], region[2], width, 1)
    y0, y1, *_ = _cover(region[1], region[3], height, 1)
    line = max(1, round(max(image.size) / 400))
    picture = np.broadcast_to(0.3 * grey, photo.shape).copy()
    picture[max(0, y0 - line) : y1 + line, max(0, x0 - line) : x1 + line] = 255
    picture[y0:y1, x0:x1] = seen[y0:y1, x0:x1]
    return Image.fromarray(np.rint(picture).astype(np.uint8))


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
    font = ImageFont.load_default(14)
    shown = [[_fit_cell(picture) for picture in row] for row in rows]
    heights = [max((picture.height for picture in row), default=0) for row in shown]
    margin = min(_CELL, max(int(font.getlength(title)) + 2 * _GAP for title in row_titles)) if row_titles else 0
    y = (_HEADER if column_titles else 0) + _GAP
    size = (margin + columns * (_CELL + _GAP) + _GAP, y + sum(heights) + len(rows) * _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(column_titles):
        x = margin + _GAP + c * (_CELL + _GAP) + _CELL / 2
        draw.text((x, _HEADER - _GAP), _shorten(title, _CELL, font), fill="black", font=font, anchor="ms")
    for r, row in enumerate(shown):
        if row_titles:
            title = _shorten(row_titles[r], margin - _GAP, font)
            draw.text((margin, y + heights[r] / 2), title, fill="black", font=font, anchor="rm")
        for c, picture in enumerate(row):
            x = margin + _GAP + c * (_CELL + _GAP) + (_CELL - picture.width) // 2
            sheet.paste(picture, (x, y + (heights[r] - picture.height) // 2))
        y += heights[r] + _GAP
    return sheet


def _cover(begin: float, end: float, side: int, cells: int) -> tuple[int, int, float, float]:
    """Give the pixels whose centres lie in a span of the image, and the part of the cells that falls on them."""
    first, stop = max(0, math.ceil(begin - 0.5)), min(side, math.ceil(end - 0.5))
    if not (first < stop):
        raise ValueError(f"The region from {begin:g} to {end:g} covers no pixel of a side of {side} pixels.")
    per_pixel = cells / (end - begin)
    return first, stop, max(0.0, (first - begin) * per_pixel), min(float(cells), (stop - begin) * per_pixel)


def min_max(values: torch.Tensor) -> torch.Tensor:
    """Scale maps (..., rows, cols) to 0..1, each by itself; a constant one becomes zeros."""
    low, high = (bound(values, (-2, -1), keepdim=True) for bound in (torch.amin, torch.amax))
    # Differences within rounding are no structure: drawn at full contrast they would be noise.
    flat = high - low <= 4 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
    return ((values - low) / (high - low).masked_fill(flat, 1)).masked_fill(flat, 0)


def _colors(values: np.ndarray) -> np.ndarray:
    """Colour values in [0, 1]: (...) -> (..., 3), 0..255."""
    position = values * (len(_ANCHORS) - 1)
    below = np.minimum(position.astype(np.int64), len(_ANCHORS) - 2)
    weight = (position - below)[..., None]
    return (1 - weight) * _ANCHORS[below] + weight * _ANCHORS[below + 1]


def _fit_cell(picture: Image.Image) -> Image.Image:
    scale = _CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text
