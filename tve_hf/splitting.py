"""Look at one forward pass of a classifier: where its logits come from, and which modules give feature maps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .patches import as_pair, is_grid, token_grid

# Depths, as shares of the blocks that the trace saw, at which an explainer reads feature maps.
FEATURE_DEPTHS = (1 / 3, 2 / 3, 1.0)


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first one of a tuple, list or mapping."""
    if isinstance(value, Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((item for item in values if isinstance(item, Tensor)), None)


def logits_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None else logits
    if logits is None or logits.ndim != 2:
        found = type(output).__name__ if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"The model returned {found}; pass an image classifier whose logits have shape (batch, classes)."
        )
    return logits


def as_map(value: Tensor | None, height: int, width: int) -> Tensor | None:
    """See a module's output as a feature map (B, C, h, w) of an image of that height and width, or return None.

    Channels-first and channels-last maps are told apart by which of them tiles the image with the squarer cells.
    """
    if value is None:
        return None
    if value.ndim == 4:
        maps = [m for m in (value, value.permute(0, 3, 1, 2)) if is_grid(m.shape[2], m.shape[3], height, width)]
        return min(maps, key=lambda m: abs(height * m.shape[3] - width * m.shape[2]), default=None)
    grid = token_grid(value.shape[1], height, width) if value.ndim == 3 else None
    return None if grid is None else value[:, grid[0] :].transpose(1, 2).unflatten(2, grid[1:])


@contextmanager
def hooked(handles: Iterator[Any]) -> Iterator[None]:
    """Keep hooks for the length of a with-block; they are removed whatever happens inside."""
    active: list[Any] = []
    try:
        active.extend(handles)
        yield
    finally:
        for handle in active:
            handle.remove()


@dataclass
class Call:
    """What one module did in the traced pass."""

    name: str
    module: nn.Module
    input_shape: torch.Size
    output: Tensor


def trace(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, list[Call]]:
    """Run the model once; return its logits and the calls of its modules in the order in which they ended."""
    calls: list[Call] = []

    def hooks() -> Iterator[Any]:
        for name, module in model.named_modules():

            def record(module: nn.Module, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
                given, result = first_tensor((*args, *kwargs.values())), first_tensor(output)
                if name and given is not None and result is not None:
                    calls.append(Call(name, module, given.shape, result))

            yield module.register_forward_hook(record, with_kwargs=True)

    with hooked(hooks()), torch.no_grad():
        return logits_of(model(pixel_values)), calls


def find_head(logits: Tensor, calls: list[Call]) -> Call:
    """Find the innermost module with weights whose output is the logits."""

    def is_logits(value: Tensor) -> bool:
        return value.numel() == logits.numel() and torch.equal(value.reshape(logits.shape).to(logits.dtype), logits)

    found = [c for c in calls if is_logits(c.output) and any(True for _ in c.module.parameters())]
    inner = [c for c in found if not any(o.name.startswith(c.name + ".") for o in found)]
    if len(inner) != 1:
        names = ", ".join(c.name for c in inner) or "they are computed outside of a module, or from several heads"
        raise ValueError(
            f"Cannot split the classifier: {len(inner)} of its modules output its logits, expected one ({names}); "
            "wrap it so that one nn.Linear or similar module gives the logits."
        )
    return inner[0]


def find_features(calls: list[Call], before: str, height: int, width: int) -> tuple[str, ...]:
    """Choose the blocks, at fixed shares of the depth, whose outputs are feature maps."""
    names = [c.name for c in calls]
    calls = [c for c in calls[: names.index(before)] if names.count(c.name) == 1]
    modules = {c.name: c.module for c in calls}
    maps = [c.name for c in calls if as_map(c.output, height, width) is not None]
    # Blocks are what stands in a list: `layers.3`, `stages.1`. Any module will do where a model has none.
    blocks = [name for name in maps if name.rpartition(".")[2].isdigit()] or maps
    outer = [n for n in blocks if not any(n.startswith(o + ".") and o in modules for o in blocks)]
    blocks = outer if len(outer) >= len(FEATURE_DEPTHS) else blocks
    positions = sorted({math.ceil(depth * len(blocks)) - 1 for depth in FEATURE_DEPTHS}) if blocks else []
    return tuple(blocks[i] for i in positions)


def probe_like(model: nn.Module, image_processor: Any) -> Tensor:
    """A batch of two noise images of the size that the model takes, on its device and in its dtype."""
    if image_processor is not None:
        shape = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[1:]
    else:
        config = getattr(model, "config", None)
        size = getattr(config, "image_size", None) or 224
        height, width = as_pair(size)
        shape = (getattr(config, "num_channels", 3), height, width)
    parameter = next(model.parameters())
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)
