"""Run a model once over noise and see what its modules do: their calls in order, what they read and what they give."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..patches import as_pair
from .parts import first_tensor, logits_in, tensors_in
from .wrapped import has_adapters, placement, uncompiled


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
    input: Tensor
    outputs: tuple[Tensor, ...]

    @property
    def output(self) -> Tensor:
        return self.outputs[0]


class RefusedShape(ValueError):
    """A model says that it does not take images of the shape of the probe."""


# What models raise at images of a size that they do not take; RuntimeErrors are torch's for much else as well.
ABOUT_SHAPES = (AssertionError, ValueError, IndexError, ZeroDivisionError, RuntimeError)


def is_about_shapes(error: Exception) -> bool:
    """Whether this is how a model complains of the shape of what it reads, and no other failure.

    torch raises one class of error for both, such as when memory runs out or a device fails, so its words tell.
    """
    if isinstance(error, RuntimeError):
        words = ("shape", "size", "dimension", "channels")
        return not isinstance(error, torch.OutOfMemoryError) and any(word in str(error).lower() for word in words)
    return isinstance(error, ABOUT_SHAPES)


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
                module_input, outputs = first_tensor((*args, *kwargs.values())), tensors_in(output)
                if name and module_input is not None and outputs:
                    calls.append(Call(name, module, module_input, outputs))

            yield module.register_forward_hook(record, with_kwargs=True)

    with uncompiled(model), hooked(hooks()), torch.no_grad():
        try:
            output = model(pixel_values, **inputs)
        except ValueError as error:  # what models say to images of another size
            interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
            raise RefusedShape(
                f"{type(model).__name__} does not take pixel_values of shape {tuple(pixel_values.shape)} ({error}); "
                "set the size of its image processor to the model's"
                f"{', or wrap the model to pass interpolate_pos_encoding=True' if interpolates else ''}."
            ) from error
        except ABOUT_SHAPES as error:
            if is_about_shapes(error):  # often an assert without a message
                error.add_note(
                    f"{type(model).__name__} was given noise of shape {tuple(pixel_values.shape)}; if that is not "
                    "what it takes, pass image_processor=, one that makes images of its size."
                )
            raise
    return logits_in(output), calls


def probe_like(
    model: nn.Module, image_processor: Any, num_images: int = 2, image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Noise in the place of images, as the model takes them: pixel_values first, then what else it may read.

    Args:
        model: the noise is on its device and in its dtype.
        image_processor: says by an example what it makes of an image; None where there is none.
        num_images: rows of every tensor.
        image_size: (height, width) without a processor; by default what the model's config says, or 224 x 224.
    """
    device, dtype = placement(model)
    others: dict[str, Tensor] = {}
    if image_processor is not None:
        example = dict(image_processor(Image.new("RGB", (64, 64)), return_tensors="pt"))
        if "pixel_values" not in example:
            raise ValueError(
                f"The image processor gives {', '.join(example)}, but no pixel_values; pass one that makes "
                "pixel_values."
            )
        shape = example.pop("pixel_values").shape[1:]
        others = {name: value for name, value in example.items() if isinstance(value, Tensor)}
    else:
        config = getattr(model, "config", None)
        configs = [config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))]
        size = image_size or next((c.image_size for c in configs if getattr(c, "image_size", None)), 224)
        channels = next((c.num_channels for c in configs if getattr(c, "num_channels", None)), 3)
        shape = (channels, *as_pair(size))
    noise = torch.randn(num_images, *shape, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": noise.to(device, dtype)} | {
        name: value.to(device, dtype if value.is_floating_point() else None).repeat_interleave(num_images, 0)
        for name, value in others.items()
    }
