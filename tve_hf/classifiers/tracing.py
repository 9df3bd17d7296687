"""Run a model once and see what its modules do: the calls in their order, tensors, feature maps and logits."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..patches import as_pair, is_grid, token_grid
from .wrapped import has_adapters, placement, uncompiled


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """The tensor itself, or those of a tuple, list or mapping."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else (value,)
    return tuple(item for item in values if isinstance(item, Tensor))


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first one of a tuple, list or mapping."""
    return next(iter(tensors_in(value)), None)


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returns, (B, C); axes of one element, as of a single query, are dropped."""
    logits = getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None else logits
    if logits is not None and logits.ndim > 2 and logits[0].numel() == max(logits.shape[1:]):
        logits = logits.flatten(1)
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


def feature_in(output: Any, images: Tensor) -> Tensor | None:
    """The first tensor of a module's output that `as_map` sees as a feature map of these images, (B, C, H, W)."""
    for value in tensors_in(output):  # some have a row for each window or patch instead of each image
        if value.shape[:1] == images.shape[:1] and as_map(value, *images.shape[-2:]) is not None:
            return value
    return None


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
    given: Tensor
    outputs: tuple[Tensor, ...]

    @property
    def output(self) -> Tensor:
        return self.outputs[0]


def trace(model: nn.Module, pixel_values: Tensor, **inputs: Tensor) -> tuple[Tensor, list[Call]]:
    """Run the model once; return its logits and the calls of its modules in the order in which they ended.

    A module with adapters is one module: what is inside depends on which of them are active.
    """
    calls: list[Call] = []
    adapted = tuple(f"{name}." for name, module in model.named_modules() if has_adapters(module))

    def hooks() -> Iterator[Any]:
        for name, module in model.named_modules():
            if name.startswith(adapted):
                continue

            def record(module: nn.Module, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
                given, outputs = first_tensor((*args, *kwargs.values())), tensors_in(output)
                if name and given is not None and outputs:
                    calls.append(Call(name, module, given, outputs))

            yield module.register_forward_hook(record, with_kwargs=True)

    with uncompiled(model), hooked(hooks()), torch.no_grad():
        try:
            output = model(pixel_values, **inputs)
        except ValueError as error:  # what models say to images of another size
            interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
            raise ValueError(
                f"{type(model).__name__} does not take pixel_values of shape {tuple(pixel_values.shape)} ({error}); "
                "set the size of its image processor to the model's"
                f"{', or wrap the model to pass interpolate_pos_encoding=True' if interpolates else ''}."
            ) from error
        except Exception as error:  # often an assert without a message
            error.add_note(
                f"{type(model).__name__} was given noise of shape {tuple(pixel_values.shape)}; if that is not what it "
                "takes, pass image_processor=, one that makes images of its size."
            )
            raise
    return logits_of(output), calls


def probe_like(model: nn.Module, image_processor: Any, num_images: int = 2) -> dict[str, Tensor]:
    """Noise in the place of images, as the model takes them: pixel_values first, then what else it may read.

    On the model's device and in its dtype.
    """
    device, dtype = placement(model)
    others: dict[str, Tensor] = {}
    if image_processor is not None:
        given = dict(image_processor(Image.new("RGB", (64, 64)), return_tensors="pt"))
        if "pixel_values" not in given:
            raise ValueError(
                f"The image processor gives {', '.join(given)}, but no pixel_values; pass one that makes pixel_values."
            )
        shape = given.pop("pixel_values").shape[1:]
        others = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    else:
        config = getattr(model, "config", None)
        configs = [config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))]
        size = next((c.image_size for c in configs if getattr(c, "image_size", None)), 224)
        channels = next((c.num_channels for c in configs if getattr(c, "num_channels", None)), 3)
        shape = (channels, *as_pair(size))
    noise = torch.randn(num_images, *shape, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": noise.to(device, dtype)} | {
        name: value.to(device, dtype if value.is_floating_point() else None).repeat_interleave(num_images, 0)
        for name, value in others.items()
    }
