"""Remove patches from a vision transformer by taking their tokens out of its sequence, instead of painting pixels.

Where the sequence starts is found by watching passes over noise, not by name: at a module's input whose tokens each
hold one patch and its position, and after which the transformer does not care about their order.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..patches import GridSize, spread, token_grid
from .parts import Backbone
from .search import differ
from .tracing import ABOUT_SHAPES, Call, hooked, is_about_shapes, trace


class TokenInput(NamedTuple):
    """A module whose input is the token sequence: `prefix` tokens, then those of rows * columns patches."""

    name: str
    prefix: int
    rows: int
    columns: int


# For each model, where its sequence starts for images of each height and width.
_TOKEN_INPUTS: WeakKeyDictionary[nn.Module, dict[tuple[int, int], TokenInput]] = WeakKeyDictionary()


def _embed(backbone: Backbone, tokens: TokenInput, pixel_values: Tensor, patches: Tensor) -> Tensor:
    """G of images (M, C, H, W) with only these patch tokens, in this order: `patches` (M, k) int64 -> (M, D)."""
    prefix = torch.arange(tokens.prefix, device=patches.device).expand(len(patches), -1)
    index = torch.cat([prefix, tokens.prefix + patches], dim=1).unsqueeze(-1)

    def drop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        values = [*args, *kwargs.values()]
        at = next(i for i, value in enumerate(values) if isinstance(value, Tensor))
        values[at] = values[at].gather(1, index.expand(-1, -1, values[at].shape[-1]))
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

    module = backbone.model.get_submodule(tokens.name)
    with hooked(iter([module.register_forward_pre_hook(drop, with_kwargs=True)])):
        return backbone.embed(pixel_values)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether results are equal up to sums in another order, through all blocks."""
    return not differ(ours, theirs, tolerance=1e-4)


@torch.no_grad()
def find_token_input(backbone: Backbone, pixel_values: Tensor) -> TokenInput:
    """Find where the token sequence of images like these starts, and prove that tokens may be dropped there.

    Each token must depend on its own patch only, the embedding must not depend on the order of the tokens, and once
    the tokens of some patches are dropped it must not depend on the pixels of these patches.

    Raises:
        ValueError: If it starts nowhere, as in CNNs, windowed transformers, and those that add positions within
            attention.
    """
    known = _TOKEN_INPUTS.setdefault(backbone.model, {})
    height, width = pixel_values.shape[-2:]
    if (height, width) in known:
        return known[height, width]
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 1, *pixel_values.shape[1:], generator=generator).to(pixel_values)
    _, calls = trace(backbone.model, image)
    changed: dict[tuple[int, int], tuple[Tensor, list[Call]]] = {}  # a checkerboard of patches is other noise
    # From the last on: the block comes before its parts, of which none reads all that the block does.
    for i, call in reversed(list(enumerate(calls))):
        grid = token_grid(call.input.shape[1], height, width) if call.input.ndim == 3 else None
        if grid is None or sum(other.name == call.name for other in calls) > 1:
            continue
        prefix, rows, columns = grid
        if height % rows or width % columns:
            continue
        cells = torch.arange(rows * columns, device=image.device)
        odd = (cells // columns + cells % columns) % 2 == 1
        if (rows, columns) not in changed:
            other = torch.where(spread(odd, (rows, columns), height, width), noise, image)
            changed[rows, columns] = other, trace(backbone.model, other)[1]
        other, calls_of_other = changed[rows, columns]
        same_tokens = torch.cat([torch.ones_like(odd[:1]).expand(prefix), ~odd])
        if not _same(calls_of_other[i].input[:, same_tokens], call.input[:, same_tokens]):
            continue
        tokens = TokenInput(call.name, *grid)
        even = cells[~odd]
        try:
            in_order = _embed(backbone, tokens, image, cells[None])
            reversed_order = _embed(backbone, tokens, image, cells.flip(0)[None])
            without, without_other = (_embed(backbone, tokens, x, even[None]) for x in (image, other))
        except ABOUT_SHAPES as error:
            if is_about_shapes(error):  # of a module that needs the whole sequence
                continue
            raise
        if _same(reversed_order, in_order) and _same(without_other, without):
            known[height, width] = tokens
            return tokens
    raise ValueError(
        f"Tokens of removed patches cannot be dropped from {type(backbone.model).__name__} on images of "
        f"{height} x {width} pixels: it is no vision transformer, or adds positions within its blocks; choose another "
        "removal."
    )


def embed_without_tokens(
    backbone: Backbone, pixel_values: Tensor, keep: Tensor, grid_size: GridSize, chunk_size: int
) -> Tensor:
    """Return G of each image with only the tokens of its kept patches, which keep their positions.

    Args:
        backbone: of a vision transformer.
        pixel_values: (B, C, H, W).
        keep: boolean (B, K, N).
        grid_size: of the N patches; it divides the token grid.
        chunk_size: sequences in one pass, of which all have the same length.

    Returns:
        Embeddings, (B, K, D).

    Raises:
        ValueError: If tokens cannot be dropped from this model, the grid does not divide the token grid, or no token
            is kept and the model has no class token to read.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; token_drop takes images (B, C, H, W) alone."
        )
    tokens = find_token_input(backbone, pixel_values)
    batch, num_masks = keep.shape[:2]
    kept = spread(keep.to(pixel_values.device), grid_size, tokens.rows, tokens.columns, "tokens")
    kept = kept.flatten(-2).flatten(0, 1)  # (B K, tokens)
    counts = kept.sum(1)
    parts: list[Tensor] = []
    order: list[Tensor] = []
    for count in counts.unique().tolist():
        for row in (counts == count).nonzero().squeeze(1).split(chunk_size):
            patches = kept[row].nonzero()[:, 1].view(len(row), count)
            parts.append(_embed(backbone, tokens, pixel_values[row // num_masks], patches))
            order.append(row)
        if count == 0 and not torch.isfinite(parts[-1]).all():
            raise ValueError(
                f"{type(backbone.model).__name__} averages patch tokens, so an image without any has no embedding; "
                "choose another removal than token_drop, or keep at least one patch."
            )
    return torch.cat(parts)[torch.cat(order).argsort()].unflatten(0, (batch, num_masks))
