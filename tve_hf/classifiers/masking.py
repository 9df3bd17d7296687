"""Embeddings of many masked images, in passes of bounded size."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..patches import GridSize, mask_patches


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
