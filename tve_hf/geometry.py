"""What an image processor shows of an image, and how it changes colours, found by looking at what comes out of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image


def seen_region(image_processor: Callable[..., Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Find the part of an original image that a processor shows to the model, by looking at what comes out.

    Attributes such as `crop_pct` mean something else in every processor. Instead, one image with a ramp from left to
    right in red, one from top to bottom in green, and full blue goes through it; position = a * pixel + b is fitted to
    what comes out. Small flat images tell how the processor changes colours. The cost is that of processing one image
    of this size; callers with many images of one size may want to remember the answer.

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
