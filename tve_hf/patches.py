"""The patch grid: neighbourhoods, masking and sampling. The only place where pixels are masked.

Patches are numbered row by row: patch (row, col) of a grid (rows, cols) is row * cols + col.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GridSize = int | Sequence[int]


def as_pair(size: GridSize) -> tuple[int, int]:
    """Return a side, or a pair of sides, as (rows, columns) or (height, width)."""
    if isinstance(size, int):
        return size, size
    rows, columns = size
    return int(rows), int(columns)


def grid_of(num_patches: int, grid_size: GridSize | None) -> tuple[int, int]:
    """Return the grid (rows, cols) that holds `num_patches`; a square one if `grid_size` is None.

    Raises:
        ValueError: If the grid does not hold that many patches, or no square grid does.
    """
    if grid_size is None:
        grid_size = round(num_patches**0.5)
    rows, columns = as_pair(grid_size)
    if rows * columns != num_patches:
        raise ValueError(
            f"{num_patches} patches do not fill a grid of {rows} x {columns}; pass grid_size=(rows, cols) of the map."
        )
    return rows, columns


def is_grid(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether rows x columns cells, as wide as high, tile an image of that size, up to rounding of one cell."""
    return (
        rows * columns > 1
        and rows <= height
        and columns <= width
        and abs(height * columns - width * rows) < max(height, width)
    )


def token_grid(num_tokens: int, height: int, width: int) -> tuple[int, int, int] | None:
    """See a sequence as prefix tokens (class, distillation, registers) and a grid of patch tokens.

    Returns:
        (prefix tokens, rows, columns) with the fewest prefix tokens that leave a grid of the image's shape, or None.
    """
    for prefix in range(min(num_tokens, 16)):
        tokens = num_tokens - prefix
        rows = round((tokens * height / width) ** 0.5)
        if rows and tokens % rows == 0 and is_grid(rows, tokens // rows, height, width):
            return prefix, rows, tokens // rows
    return None


def neighborhoods(grid_size: GridSize, hops: int, device: torch.device | None = None) -> Tensor:
    """Mark the neighbourhood N(z) of every patch: the patches at Chebyshev distance at most `hops`, z included.

    Returns:
        Boolean (N, N); row z is N(z), a window of (2 * hops + 1) squared patches, cut at the border.
    """
    rows, columns = as_pair(grid_size)
    position = torch.arange(rows * columns, device=device)
    row, column = position // columns, position % columns
    near_row = (row[:, None] - row[None]).abs() <= hops
    near_column = (column[:, None] - column[None]).abs() <= hops
    return near_row & near_column


def average_over_neighborhoods(scores: Tensor, grid_size: GridSize, hops: int) -> Tensor:
    """Replace each patch's score, (..., N), by the mean over its neighbourhood; windows are cut at the border."""
    window = neighborhoods(grid_size, hops, scores.device).to(scores.dtype)
    return scores @ (window / window.sum(1, keepdim=True)).T


def sample_patches(batch_size: int, num_patches: int, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `k` different patches for each image, (batch_size, k) int64; random through `generator` alone."""
    if not 1 <= k <= num_patches:
        raise ValueError(f"Cannot sample k={k} of {num_patches} patches; choose k between 1 and {num_patches}.")
    return torch.rand(batch_size, num_patches, generator=generator).argsort(dim=1)[:, :k]


def _patch_size(pixels: Tensor, grid_size: GridSize) -> tuple[int, int]:
    """Return the (height, width) of a patch of (..., H, W); raises ValueError if the grid does not divide it."""
    rows, columns = as_pair(grid_size)
    height, width = pixels.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(
            f"A grid of {rows} x {columns} patches does not divide an image of {height} x {width} pixels; "
            "choose a grid whose sides divide the image's."
        )
    return height // rows, width // columns


def patch_means(pixels: Tensor, grid_size: GridSize) -> Tensor:
    """Average over the pixels of each patch, (..., H, W) -> (..., rows, cols).

    Raises:
        ValueError: If the grid does not divide the image.
    """
    patch_height, patch_width = _patch_size(pixels, grid_size)
    rows, columns = as_pair(grid_size)
    return pixels.unflatten(-1, (columns, patch_width)).unflatten(-3, (rows, patch_height)).mean((-3, -1))


def _blurred(pixel_values: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of a tenth of the shorter side; the border is extended."""
    sigma = min(pixel_values.shape[-2:]) / 10
    radius = int(2 * sigma)
    offset = torch.arange(-radius, radius + 1, device=pixel_values.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(pixel_values.dtype)
    channels = pixel_values.shape[1]
    x = F.pad(pixel_values, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)


# What a removed pixel is replaced with: name -> fill image, (B, C, H, W) -> (B, C, H, W).
REMOVALS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,  # the papers': pixel_values are normalised, so 0 is about the mean pixel
    "blur": _blurred,
}


def mask_patches(pixel_values: Tensor, keep: Tensor, grid_size: GridSize, removal: str = "zero") -> Tensor:
    """Keep only some patches of each image and replace every other pixel: f_t(S; x, y) is f_t of this.

    Args:
        pixel_values: normalised images, (B, C, H, W).
        keep: patches to keep, boolean (B, K, N) or (K, N): K masks for each image.
        grid_size: grid that divides the image, a side or (rows, cols), rows * cols = N.
        removal: what replaces a removed pixel, a key of `REMOVALS`; "zero" is the papers'.

    Returns:
        Masked images, (B, K, C, H, W).

    Raises:
        ValueError: If the grid does not divide the image, this is no image, or `removal` is unknown.
    """
    if removal not in REMOVALS:
        raise ValueError(f"Unknown removal operator {removal!r}; choose one of {', '.join(REMOVALS)}.")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"Patches are masked in images (B, C, H, W), but pixel_values has shape {tuple(pixel_values.shape)}; "
            "pass images, and a classifier that takes them."
        )
    patch_height, patch_width = _patch_size(pixel_values, grid_size)
    mask = keep.unflatten(-1, as_pair(grid_size))
    mask = mask.repeat_interleave(patch_height, dim=-2).repeat_interleave(patch_width, dim=-1)
    mask = mask.unsqueeze(-3)  # (B, K, 1, H, W) or (K, 1, H, W)
    fill = REMOVALS[removal](pixel_values)
    return torch.where(mask, pixel_values.unsqueeze(1), fill.unsqueeze(1))
