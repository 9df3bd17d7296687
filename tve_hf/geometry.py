"""What an image processor shows of an image, and how it changes colours, found by looking; where patches lie on it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

Region = tuple[float, float, float, float]  # (left, top, right, bottom), pixels of an image

_LOOKED_AT = 1024  # pixels of the longer side, of the smaller stand-ins for large images


def seen_region(image_processor: Callable[..., Any], size: tuple[int, int]) -> Region:
    """Find the part of an original image that a processor shows to the model, by looking at what comes out.

    Attributes such as `crop_pct` mean something else in every processor. Instead, one image with a ramp from left to
    right in red, one from top to bottom in green, and full blue goes through it; position = a * pixel + b is fitted to
    what comes out. Small flat images tell how the processor changes colours. In place of a large image, two of its
    shape with longer sides of 1024 and 512 pixels go through it, unless what it shows of them differs. The cost is
    that of processing these images; callers with many images of one size may want to remember the answer.

    Args:
        image_processor: turns PIL images into {"pixel_values": (B, 3, H, W)}, by any resize, crop and padding.
        size: (width, height) of the original image, pixels.

    Returns:
        (left, top, right, bottom) in pixels of the original image. It reaches beyond the image where the processor
        pads. A side closer to the image's border than half a pixel, of the image or of what comes out, is put on it.

    Where the processor gives rows of patches and their `spatial_shapes`, the mean of each patch is looked at.

    Raises:
        ValueError: if the processor gives neither (B, 3, H, W) pixels nor such rows, turns the image, or mixes colours
            so that they cannot be told apart.
    """
    if max(size) > 2 * _LOOKED_AT:
        regions = [_relative_region(image_processor, size, side) for side in (_LOOKED_AT, _LOOKED_AT // 2)]
        if np.abs(np.subtract(*regions)).max() < 0.01:  # else it does not depend on the shape of the image alone
            left, top, right, bottom = np.multiply(regions[0], (*size, *size)).tolist()
            return left, top, right, bottom
    return _seen_region(image_processor, size)


def _relative_region(image_processor: Callable[..., Any], size: tuple[int, int], longest: int) -> np.ndarray:
    """The region of an image of this shape with another longer side, as shares of its sides."""
    width, height = (max(1, round(side * longest / max(size))) for side in size)
    return np.divide(_seen_region(image_processor, (width, height)), (width, height, width, height))


def _seen_region(image_processor: Callable[..., Any], size: tuple[int, int]) -> Region:
    colors = [(64, 64, 64), (192, 64, 64), (64, 192, 64), (64, 64, 192)]
    flat = _process(image_processor, [Image.new("RGB", (32, 32), color) for color in colors])  # (4, 3, h, w)
    response = flat[1:] - flat[0]  # (3 in, 3 out, h, w)
    row, col = divmod(int(np.abs(response).sum((0, 1)).argmax()), response.shape[-1])  # not a padded pixel
    if np.linalg.matrix_rank(response[..., row, col], tol=1e-4) < 3:
        raise ValueError("The image processor mixes the colours, so the region that it covers cannot be found.")
    to_input = np.linalg.inv(response[..., row, col]) * 128

    width, height = size
    ramps = [np.rint(np.arange(side) * _levels_per_pixel(side)).astype(np.uint8) for side in size]
    image = np.full((height, width, 3), 255, np.uint8)
    image[..., 0], image[..., 1] = ramps[0], ramps[1][:, None]
    output = _process(image_processor, [Image.fromarray(image)])[0]  # (3, h, w)
    x, y, blue = np.einsum("chw,cd->dhw", output - flat[0, :, row, col][:, None, None], to_input) + 64
    inside = (blue > 250) & (np.minimum(x, y) < 250)  # neither padded with another blue nor with white
    if not inside.any():
        raise ValueError(f"The image processor shows no pixel of an image of size {size}: check its crop and padding.")
    left, right = _fit(np.where(inside, x, np.nan), width)
    top, bottom = _fit(np.where(inside, y, np.nan).T, height)
    return left, top, right, bottom


def normalization(image_processor: Callable[..., Any]) -> tuple[list[float], list[float]]:
    """Find what an image processor subtracts from each channel in [0, 1], and what it then divides by.

    From what a black and a white image become, since processors tell it in several ways, or not at all.

    Returns:
        (mean, std), one value for each channel of `pixel_values`, rounded to 6 decimals.
    """
    black, white = _process(image_processor, [Image.new("RGB", (32, 32), color) for color in ("black", "white")])
    row, col = divmod(int((white - black).sum(0).argmax()), white.shape[-1])  # not a padded pixel
    black, white = (pixels[:, row, col].astype(np.float64) for pixels in (black, white))
    std = 1 / (white - black)
    return (-black * std).round(6).tolist(), std.round(6).tolist()


class PatchMap:
    """A map of patch scores, spread over the pixels of an image.

    Args:
        scores: (rows, cols), any finite values.
        size: (width, height) of the image, pixels.
        region: the part of the image that the scores cover; it may exceed the image. The whole image if None.

    Raises:
        ValueError: if the scores are not a finite (rows, cols) map, or the region lies outside the image.
    """

    def __init__(self, scores: torch.Tensor | np.ndarray, size: tuple[int, int], region: Region | None = None):
        as_array = scores.detach().cpu().double().numpy() if isinstance(scores, torch.Tensor) else scores
        self.scores = np.asarray(as_array, np.float64)
        if self.scores.ndim != 2 or 0 in self.scores.shape:
            raise ValueError(f"Expected scores (rows, cols), got shape {self.scores.shape}: draw one map at a time.")
        if not np.isfinite(self.scores).all():
            raise ValueError("The scores contain NaN or infinite values, so there is no map to draw.")
        self.size = width, height = size
        self.left, self.top, self.right, self.bottom = region or (0.0, 0.0, float(width), float(height))
        self.columns = covered_pixels(self.left, self.right, width)
        self.rows = covered_pixels(self.top, self.bottom, height)

    def band(self, begin: int, stop: int, smooth: bool, outside: float) -> np.ndarray:
        """The scores on the rows begin to stop of the image, (stop - begin, width), float32.

        Args:
            smooth: pass over evenly from the middle of one patch to the next. No value is then beyond those of the
                patches around it, as it would be by cubic interpolation, which surrounds evidence for a class by some
                against it. Otherwise each patch is a block.
            outside: what pixels have that the map does not cover.
        """
        band = np.full((stop - begin, self.size[0]), outside, np.float32)
        (x0, x1), (y0, y1) = self.columns, (max(begin, self.rows[0]), min(stop, self.rows[1]))
        if y0 >= y1:
            return band
        rows, columns = self.scores.shape
        xs = np.clip((np.array([x0, x1]) - self.left) * columns / (self.right - self.left), 0, columns)
        ys = np.clip((np.array([y0, y1]) - self.top) * rows / (self.bottom - self.top), 0, rows)
        how = Image.Resampling.HAMMING if smooth else Image.Resampling.BOX
        patches = Image.fromarray(self.scores.astype(np.float32))
        box = float(xs[0]), float(ys[0]), float(xs[1]), float(ys[1])
        band[y0 - begin : y1 - begin, x0:x1] = np.asarray(patches.resize((x1 - x0, y1 - y0), how, box))
        return band


def covered_pixels(begin: float, end: float, side: int) -> tuple[int, int]:
    """The first pixel whose centre lies in a span of an image's side, and the first after it that does not."""
    first, stop = max(0, math.ceil(begin - 0.5)), min(side, math.ceil(end - 0.5))
    if not (first < stop):
        raise ValueError(f"The region from {begin:g} to {end:g} covers no pixel of a side of {side} pixels.")
    return first, stop


def _process(image_processor: Callable[..., Any], images: list[Image.Image]) -> np.ndarray:
    processed = image_processor(images=images, return_tensors="pt")
    pixels = torch.as_tensor(processed["pixel_values"])
    if pixels.ndim == 3 and "spatial_shapes" in processed:
        rows, columns = torch.as_tensor(processed["spatial_shapes"])[0].tolist()
        # Values of a patch lie pixel by pixel, three colours each, as NaFlex processors have them.
        pixels = pixels[:, : rows * columns].unflatten(-1, (-1, 3)).mean(-2).unflatten(1, (rows, columns))
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"The image processor gives pixel_values of shape {tuple(pixels.shape)}, not (B, 3, H, W).")
    return pixels.float().cpu().numpy()


def _levels_per_pixel(side: int) -> float:
    return 255 // side or 255 / side  # a whole number if possible, so that no level is rounded


def _fit(ramp: np.ndarray, side: int) -> tuple[float, float]:
    """Fit where the columns of a ramp (rows, columns; 0..255, NaN where padded) begin and end, in source pixels."""
    seen = ~np.isnan(ramp).all(0)
    if np.nanstd(ramp[:, seen], 0).mean() > np.ptp(np.nanmean(ramp[:, seen], 0)) + 1:  # it runs along the columns
        raise ValueError("The image processor turns images of this shape, so the region that it covers is no box.")
    pixel = np.flatnonzero(seen) + 0.5
    position = np.nanmean(ramp[:, seen], 0) / _levels_per_pixel(side) + 0.5
    # Near the border of the image the resizing filter bends the ramp: leave out two pixels of the coarser grid.
    margin = min(2 * max(1.0, np.ptp(position) / position.size), 0.15 * side)
    straight = (position > margin) & (position < side - margin)
    if np.unique(position[straight].round(3)).size < 2:  # a side of one pixel has no ramp: take it as seen whole
        return 0.0, float(side)
    scale, offset = np.polyfit(pixel[straight], position[straight], 1)
    begin, end, near = float(offset), float(offset + scale * ramp.shape[1]), 0.5 * max(1.0, scale)
    return 0.0 if abs(begin) <= near else begin, float(side) if abs(end - side) <= near else end
