"""Draw signed maps over photographs, and results that draw their pictures when they are asked for them.

Drawing comes after the attribution and never changes it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..geometry import PatchMap, Region, covered_pixels
from .colors import PALETTE, STEPS, ZERO
from .html import explanation_html
from .lazy import ReadingDict, Undrawn
from .sheet import PANEL, Panel, Parts, sheet

MAX_SIZE = 1600  # pixels of a picture's longer side
_PERCENTILE = 98  # of |score|, where colours end
_NOTE = f"colours end at the {_PERCENTILE}th percentile of |score|"
_ALPHA = 0.65
_ROWS = 256  # drawn at a time, so that large pictures need little memory
_UNPACKED = 2**19  # pixels of the largest photograph that is kept as it is


def color_limit(scores: torch.Tensor | np.ndarray) -> float:
    """The score at which colours end, and less it on the other side of zero: the 98th percentile of |score|.

    So one stray patch does not make all others pale. It is the largest |score| where nearly all are zero.
    """
    sizes = np.abs(PatchMap(scores, (1, 1)).scores)
    return float(np.percentile(sizes, _PERCENTILE) or sizes.max())


def _scaled(scores: torch.Tensor | np.ndarray, size: tuple[int, int], region: Region | None, limit: float) -> PatchMap:
    """A map on the scale of pictures: 0 for -limit or less, 0.5 for zero, 1 for limit or more."""
    spread = PatchMap(scores, size, region)
    spread.scores = 0.5 + 0.5 * (spread.scores.clip(-limit, limit) / limit if limit else np.zeros_like(spread.scores))
    return spread


def heatmap(
    scores: torch.Tensor | np.ndarray,
    size: tuple[int, int],
    region: Region | None = None,
    limit: float | None = None,
    smooth: bool = True,
) -> np.ndarray:
    """Spread signed patch scores over the image: 0.5 is zero, above it speaks for the class, below it against.

    Args:
        scores: (rows, cols), any finite values; positive supports the class.
        size: (width, height) of the image, pixels.
        region: (left, top, right, bottom) of the part of the image that the scores cover, pixels, as from
            `seen_region`; it may exceed the image. The whole image if not given.
        limit: the score drawn as 1; its negative is 0. Scores beyond are cut off. `color_limit(scores)` by default;
            give one for maps that are to be compared.
        smooth: pass over from patch to patch, or draw each patch as a block.

    Returns:
        (height, width), float32 in [0, 1]; 0.5, no evidence, outside the region.

    Raises:
        ValueError: if the scores are not a finite (rows, cols) map, or the region lies outside the image.
    """
    limit = color_limit(scores) if limit is None else limit
    return _scaled(scores, size, region, limit).band(0, size[1], smooth, 0.5)


def overlay(
    image: Image.Image, heatmap: np.ndarray, region: Region | None = None, alpha: float = _ALPHA
) -> Image.Image:
    """Colour a heat map over its image: red speaks for the class, blue against it, and zero has no colour.

    The photograph is turned grey under the colours, so that its own cannot be mistaken for the map's. What the model
    never saw, outside the region, is veiled a little behind a frame.

    Args:
        image: the original image.
        heatmap: (height, width) of that image, in [0, 1] with zero at 0.5, as from `heatmap`.
        region: (left, top, right, bottom) of the part of the image that the model saw, pixels. The whole image if not
            given.
        alpha: strength of the colours, from 0 (only the image) to 1 (no image where the map is strongest).

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
    return _paint(image, lambda begin, stop: heatmap[begin:stop], region, alpha)


def _paint(
    image: Image.Image, rows: Callable[[int, int], np.ndarray], region: Region | None, alpha: float
) -> Image.Image:
    """Colour an image by the rows of a heat map, some at a time."""
    width, height = image.size
    picture = Image.new("RGB", image.size)
    strength = [round(255 * alpha * abs(step - ZERO) / ZERO) for step in range(STEPS)] + [0] * (256 - STEPS)
    for begin in range(0, height, _ROWS):
        stop = min(begin + _ROWS, height)
        steps = Image.fromarray(np.rint(rows(begin, stop) * (STEPS - 1)).astype(np.uint8))
        photo = image.crop((0, begin, width, stop)).convert("RGB")
        base = Image.blend(photo, photo.convert("L").convert("RGB"), min(1.0, 2 * alpha))
        colors = steps.convert("P")
        colors.putpalette(PALETTE.tobytes())
        picture.paste(Image.composite(colors.convert("RGB"), base, steps.point(strength)), (0, begin))
    if region is None:
        return picture
    (x0, x1), (y0, y1) = covered_pixels(region[0], region[2], width), covered_pixels(region[1], region[3], height)
    if (x0, y0, x1, y1) == (0, 0, width, height):
        return picture
    line = max(1, round(max(image.size) / 400))
    frame = max(0, x0 - line), max(0, y0 - line), min(width, x1 + line), min(height, y1 + line)
    seen = picture.crop((x0, y0, x1, y1))
    # White lifts the darkest by a third and leaves two thirds of the contrast.
    picture = picture.point([round(255 - (255 - value) * 2 / 3) for value in range(256)] * 3)
    picture.paste((255, 255, 255), frame)
    picture.paste(seen, (x0, y0))
    return picture


class Photograph:
    """A photograph that results draw on: no larger than a picture may be, and packed if it is large.

    Args:
        image: the original image.
        region: (left, top, right, bottom) of the part of it that the model saw; the whole of it if None.
        max_size: pixels of the longer side of pictures, to which a larger photograph is scaled; None for any size.

    Raises:
        ValueError: if `max_size` is below 1.
    """

    def __init__(self, image: Image.Image, region: Region | None = None, max_size: int | None = MAX_SIZE):
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size is {max_size}; give the pixels of a longer side, or None for any size.")
        scale = min(1.0, (max_size or max(image.size)) / max(image.size))
        width, height = (max(1, round(side * scale)) for side in image.size)
        self.size: tuple[int, int] = width, height
        self.region = region and _on_size(region, image.size, self.size)
        if scale < 1:
            image = image.resize(self.size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        self._kept: Image.Image | bytes = image.convert("RGB")
        if width * height > _UNPACKED:  # so that a list of many results stays small
            packed = BytesIO()
            self._kept.save(packed, "JPEG", quality=95, subsampling=0)
            self._kept = packed.getvalue()

    def image(self) -> Image.Image:
        """The photograph, RGB."""
        return Image.open(BytesIO(self._kept)).convert("RGB") if isinstance(self._kept, bytes) else self._kept

    def at(self, longest: int) -> "Photograph":
        """The same with a longer side of so many pixels, be it smaller or larger."""
        image = self.image()
        width, height = (max(1, round(side * longest / max(self.size))) for side in self.size)
        scaled = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
        return Photograph(scaled, self.region and _on_size(self.region, self.size, scaled.size), None)

    def overlay(
        self, scores: torch.Tensor | np.ndarray, limit: float | None = None, smooth: bool = True
    ) -> Image.Image:
        """`overlay` of `heatmap`, some rows at a time."""
        image, limit = self.image(), color_limit(scores) if limit is None else limit
        spread = _scaled(scores, image.size, self.region, limit)
        return _paint(image, lambda begin, stop: spread.band(begin, stop, smooth, 0.5), self.region, _ALPHA)


def _on_size(region: Region, size: tuple[int, ...], other: tuple[int, ...]) -> Region:
    """A region of an image of one size where the image is scaled to another."""
    x, y = (there / here for here, there in zip(size, other, strict=True))
    return region[0] * x, region[1] * y, region[2] * x, region[3] * y


class Explanation(ReadingDict):
    """What is found of one image and class: a dict whose pictures are drawn when they are first asked for.

    - **heatmap**: the map on the photograph's pixels, (H, W) float32 in [0, 1]; 0.5 is zero. See `heatmap`.
    - **overlay**: the heat map over the photograph, without any text. See `overlay`.
    - **figure**: the same with title, scale and unit. See `figure`.

    A picture that was drawn is kept. Keys, `in`, `len`, printing, copying and pickling draw none; whatever reads all
    values, such as `items()`, `values()` and `dict(explanation)`, draws all three.

    Args:
        values: all other entries; at least `label`, `score` and `attribution`, the map (rows, cols).
        photograph: what to draw on.
        unit: of the scores, as the scale names it.
        smooth: whether pictures pass over from patch to patch; otherwise each patch is a block.
    """

    def __init__(self, values: dict[str, Any], photograph: Photograph, unit: str = "score", smooth: bool = True):
        dict.__init__(self, values, **dict.fromkeys(_DRAWN, Undrawn.YET))
        self.photograph, self.unit, self.smooth = photograph, unit, smooth

    def __getitem__(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        if value is Undrawn.YET:
            value = self[key] = _DRAWN[key](self)
        return value

    # What reads without drawing is dict's; an own __iter__ keeps `dict(explanation)` from copying what is not drawn.
    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self)

    __setitem__, __delitem__ = dict.__setitem__, dict.__delitem__
    __len__, __contains__ = dict.__len__, dict.__contains__

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def _repr_html_(self) -> str:  # which notebooks show
        return explanation_html(self, self.unit)

    def copy(self) -> "Explanation":
        return copy.copy(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (dict(dict.items(self)), vars(self))


def _remade(values: dict[str, Any], state: dict[str, Any]) -> Explanation:
    made = Explanation.__new__(Explanation)
    dict.update(made, values)
    vars(made).update(state)
    return made


def figure(explanations: Explanation | Sequence[Explanation]) -> Image.Image:
    """One photograph and its maps side by side, each with its class and probability, and one scale for all.

    The scale has zero in its middle and ends at the largest `color_limit` of the maps; the range of each map is below
    it.

    Args:
        explanations: of one class, or of several of one photograph, as `pipeline(..., top_k=3)` gives them.

    Returns:
        An RGB image; panels have a longer side of 448 pixels, whatever the photograph's size.

    Raises:
        ValueError: if there is none, or they are of several photographs or units.
    """
    return sheet(parts_of(explanations))


def parts_of(explanations: Explanation | Sequence[Explanation]) -> Parts:
    """What `figure` shows, to be laid out."""
    shown = [explanations] if isinstance(explanations, Explanation) else list(explanations)
    if len({(id(one.photograph), one.unit) for one in shown}) != 1:
        raise ValueError("A figure shows one photograph or more classes of it in one unit; draw one figure for each.")
    limit = max(color_limit(one["attribution"]) for one in shown)
    photograph = shown[0].photograph.at(PANEL)
    panels = [
        Panel(
            photograph.overlay(one["attribution"], limit, one.smooth),
            one["label"],
            f"probability {one['score']:.1%}",
            one["attribution"],
        )
        for one in shown
    ]
    ramp = np.broadcast_to(np.linspace(0, 1, 512), (16, 512))
    scale = overlay(Image.new("RGB", (512, 16), (170, 170, 170)), ramp)
    return Parts(photograph.image(), panels, scale, limit, shown[0].unit, _NOTE, shown[0].smooth)


_DRAWN: dict[str, Callable[[Explanation], Any]] = {
    "heatmap": lambda one: heatmap(one["attribution"], one.photograph.size, one.photograph.region, smooth=one.smooth),
    "overlay": lambda one: one.photograph.overlay(one["attribution"], smooth=one.smooth),
    "figure": figure,
}
