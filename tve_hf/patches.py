"""The patch grid: neighbourhoods, masking and sampling. The only place where pixels are masked.

Patches are numbered row by row: patch (row, col) of a grid (rows, cols) is row * cols + col.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .removals import Removal, blur, mean, road, zero

GridSize = int | Sequence[int]


def as_pair(size: GridSize) -> tuple[int, int]:
    """Return a side, or a pair of sides, as (rows, columns) or (height, width).

    Raises:
        ValueError: If these are not one or two whole numbers from 1 on.
    """
    sides = [size] if isinstance(size, (int, np.integer, str)) or not isinstance(size, Iterable) else list(size)
    whole = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side >= 1 for side in sides)
    if not whole or len(sides) not in (1, 2):
        raise ValueError(f"{size!r} is no grid; pass whole numbers from 1 on, a side like 14 or (rows, cols).")
    return int(sides[0]), int(sides[-1])


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


def dividing_grid(height: int, width: int, longest: int = 14) -> tuple[int, int]:
    """Return the grid of square patches that divides an image, its longer side as near to so many as possible.

    Raises:
        ValueError: If the longer side of every such grid has fewer than 2 or more than 28 patches.
    """
    sides = math.gcd(height, width)
    patches = [side for side in range(1, sides + 1) if sides % side == 0]
    # The coarser one of two that are as near: it costs less.
    patch = min(patches, key=lambda side: (abs(max(height, width) // side - longest), -side))
    rows, columns = height // patch, width // patch
    if not 2 <= max(rows, columns) <= 28:
        raise ValueError(
            f"No grid of square patches, 2 to 28 a side, divides images of {height} x {width} pixels; pass a "
            "grid_size=(rows, cols) that does, or make images of another size."
        )
    return rows, columns


@cache  # asked in each pass, of few sizes
def is_grid(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether rows x columns cells, as wide as high, tile an image of that size, up to rounding of one cell."""
    return (
        rows * columns > 1
        and rows <= height
        and columns <= width
        and abs(height * columns - width * rows) < max(height, width)
    )


@cache  # asked in each pass, of few sizes
def tiling_grid(num_cells: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the grid (rows, columns) of that many cells that tiles an image with the squarest ones, or None.

    Unlike `token_grid`, which has to guess how many tokens are none of the grid, it also finds grids that are rounded
    up: 3 x 4 cells of 16 pixels for an image of 33 x 64.
    """
    shorter = (num_cells * min(height, width) / max(height, width)) ** 0.5  # cells along the shorter side
    sides = [side for side in {math.floor(shorter), math.ceil(shorter)} if side > 0 and num_cells % side == 0]
    grids = [(side, num_cells // side) if height <= width else (num_cells // side, side) for side in sides]
    grids = [grid for grid in grids if is_grid(*grid, height, width)]
    return min(grids, key=lambda grid: abs(height * grid[1] - width * grid[0]), default=None)


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


# Name -> what a removed pixel is replaced with.
REMOVALS: dict[str, Removal] = {"zero": zero, "mean": mean, "blur": blur, "road": road}
# Paints nothing: the patches' tokens are taken out of a transformer's sequence, by `SplitClassifier.embed_masked`.
TOKEN_DROP = "token_drop"


def patch_size(grid_size: GridSize, height: int, width: int, unit: str = "pixels") -> tuple[int, int]:
    """Return the (height, width) of a patch of an image; raises ValueError if the grid does not divide it."""
    rows, columns = as_pair(grid_size)
    if height % rows or width % columns:
        raise ValueError(
            f"A grid of {rows} x {columns} patches does not divide an image of {height} x {width} {unit}; "
            "choose a grid whose sides divide the image's."
        )
    return height // rows, width // columns


def patch_means(pixels: Tensor, grid_size: GridSize) -> Tensor:
    """Average over the pixels of each patch, (..., H, W) -> (..., rows, cols).

    Raises:
        ValueError: If the grid does not divide the image.
    """
    patch_height, patch_width = patch_size(grid_size, *pixels.shape[-2:])
    rows, columns = as_pair(grid_size)
    return pixels.unflatten(-1, (columns, patch_width)).unflatten(-3, (rows, patch_height)).mean((-3, -1))


def spread(keep: Tensor, grid_size: GridSize, height: int, width: int, unit: str = "pixels") -> Tensor:
    """Spread a mask of patches, (..., N), over the pixels or tokens of an image, (..., height, width).

    Raises:
        ValueError: If the grid does not divide the image.
    """
    patch_height, patch_width = patch_size(grid_size, height, width, unit)
    mask = keep.unflatten(-1, as_pair(grid_size))
    return mask.repeat_interleave(patch_height, dim=-2).repeat_interleave(patch_width, dim=-1)


def _mask_rows(
    pixel_values: Tensor, keep: Tensor, grid_size: GridSize, removal: str, spatial_shapes: Tensor
) -> Tensor:
    """`mask_patches` of rows of patches, (B, L, pixels of a patch): row by row through each image, then padding."""
    if removal != "zero":
        raise ValueError(f'The pixels of patches in rows have no neighbours for removal={removal!r}; pass "zero".')
    masks = []
    for i, (height, width) in enumerate(spatial_shapes.tolist()):
        mask = spread(keep if keep.ndim == 2 else keep[i], grid_size, height, width, "patches").flatten(-2)
        masks.append(F.pad(mask, (0, pixel_values.shape[1] - height * width), value=True))  # padding stays as it is
    mask = torch.stack(masks).unsqueeze(-1)  # (B, K, L, 1)
    return torch.where(mask, pixel_values.unsqueeze(1), torch.zeros_like(pixel_values).unsqueeze(1))


def mask_patches(
    pixel_values: Tensor,
    keep: Tensor,
    grid_size: GridSize,
    removal: str = "zero",
    spatial_shapes: Tensor | None = None,
) -> Tensor:
    """Keep only some patches of each image and replace every other pixel: f_t(S; x, y) is f_t of this.

    Args:
        pixel_values: normalised images, (B, C, H, W), or rows of patches, (B, L, pixels of a patch).
        keep: patches to keep, boolean (B, K, N) or (K, N): K masks for each image.
        grid_size: grid that divides the image, a side or (rows, cols), rows * cols = N.
        removal: what replaces a removed pixel, a key of `REMOVALS`; "zero" is the papers'.
        spatial_shapes: rows and columns of patches in each image, (B, 2), where the images are rows of patches, as
            NaFlex processors make them. The grid divides these shapes; rows of padding are never touched.

    Returns:
        Masked images, (B, K, C, H, W) or (B, K, L, pixels of a patch).

    Raises:
        ValueError: If the grid does not divide the image, this is no image, or `removal` is unknown.
    """
    if removal not in REMOVALS:
        raise ValueError(
            f"Unknown removal operator {removal!r}; choose one of {', '.join(REMOVALS)}, or {TOKEN_DROP} for the "
            "tokens of a vision transformer."
        )
    if pixel_values.ndim == 3 and spatial_shapes is not None:
        return _mask_rows(pixel_values, keep, grid_size, removal, spatial_shapes)
    if pixel_values.ndim != 4:
        raise ValueError(
            f"Patches are masked in images (B, C, H, W), but pixel_values has shape {tuple(pixel_values.shape)}; "
            "pass images, or rows of patches with the spatial_shapes that their processor gives."
        )
    mask = spread(keep if keep.ndim == 3 else keep.unsqueeze(0), grid_size, *pixel_values.shape[-2:]).unsqueeze(2)
    fill = REMOVALS[removal](pixel_values, mask)
    return torch.where(mask, pixel_values.unsqueeze(1), fill)  # (B, K, C, H, W)


def embed_masked_images(
    embed: Callable[..., Tensor],
    pixel_values: Tensor,
    keep: Tensor,
    grid_size: GridSize,
    removal: str,
    chunk_size: int,
    inputs: dict[str, Tensor],
) -> Tensor:
    """Return G of each image with only some patches kept.

    Args:
        embed: G, from images (M, 3, H, W) and their other inputs to embeddings (M, D).
        pixel_values: (B, 3, H, W).
        keep: K sets of patches for each image, boolean (B, K, N).
        grid_size: of the N patches, a side or (rows, cols); it divides the image.
        removal: what replaces removed pixels, a key of `patches.REMOVALS`.
        chunk_size: the most masked images in one pass.
        inputs: what else the classifier reads, a row for each of the B images.

    Returns:
        Embeddings, (B, K, D).

    Raises:
        ValueError: If the grid does not divide the image, or the removal is unknown.
    """
    batch, num_masks = keep.shape[:2]
    step = max(1, chunk_size // num_masks)
    shapes = inputs.get("spatial_shapes")
    embeddings = []
    for start in range(0, batch, step):
        some = slice(start, start + step)
        rows = []
        # As many masks of an image in each pass, so that none is nearly empty.
        for masks in keep[some].to(pixel_values.device).chunk(math.ceil(num_masks / chunk_size), dim=1):
            masked = mask_patches(
                pixel_values[some], masks, grid_size, removal, None if shapes is None else shapes[some]
            ).flatten(0, 1)
            others = {name: value[some].repeat_interleave(masks.shape[1], 0) for name, value in inputs.items()}
            rows.append(embed(masked, **others).unflatten(0, masks.shape[:2]))
        embeddings.append(torch.cat(rows, dim=1))
    return torch.cat(embeddings)


def min_max(values: Tensor) -> Tensor:
    """Scale maps (..., rows, cols) to 0..1, each by itself; a constant one becomes zeros."""
    low, high = (bound(values, (-2, -1), keepdim=True) for bound in (torch.amin, torch.amax))
    # Differences within rounding are no structure: at full contrast they would be noise.
    flat = high - low <= 4 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
    return ((values - low) / (high - low).masked_fill(flat, 1)).masked_fill(flat, 0)
