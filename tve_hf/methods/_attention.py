"""Attention maps of unmodified transformers classes, read by hooks under eager attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..classifiers import SplitClassifier
from ..patches import token_grid


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Compute attention weights explicitly inside the block: the fused kernels never hold them."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before is None:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_maps(classifier: SplitClassifier, pixel_values: Tensor) -> list[Tensor]:
    """Run the classifier once and return the attention of its blocks, in order, (B, heads, T, T) each.

    An attention module is recognised by what it returns: beside its output, weights over its own tokens.

    Raises:
        ValueError: If no module returns such weights for all T tokens of the images.
    """
    model = classifier.backbone.model
    maps: list[Tensor] = []

    def record(module: nn.Module, args: tuple, output: object) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[-1] == weights.shape[-2]:
            if len(weights) == len(pixel_values) and not any(weights is known for known in maps):
                maps.append(weights)

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        with _eager_attention(model):
            classifier(pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    grid = token_grid(maps[0].shape[-1], *pixel_values.shape[-2:]) if maps else None
    if grid is None or grid[0] == 0 or any(m.shape[-1] != maps[0].shape[-1] for m in maps):
        raise ValueError(
            f"{classifier.name} has no attention of a class token to all patches in every block, which this method "
            "reads; use another, such as tve, exact or grad_cam."
        )
    return maps


def class_token_row(attention: Tensor, pixel_values: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The class token's attention to the patches, (B, T, T) -> (B, rows, cols), resampled to the grid."""
    grid = token_grid(attention.shape[-1], pixel_values.shape[-2], pixel_values.shape[-1])
    if grid is None:
        raise ValueError(f"{attention.shape[-1]} tokens hold no grid of an image of {tuple(pixel_values.shape[-2:])}.")
    prefix, rows, columns = grid
    row = attention[:, 0, prefix:].unflatten(1, (1, rows, columns))
    return F.interpolate(row, size=grid_size, mode="bilinear", align_corners=False).squeeze(1)
