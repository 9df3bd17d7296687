"""Trace a classifier over noise of the size that it takes, which is looked for where nobody says it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..patches import as_pair
from .loading import image_processor_from, pretrained_cfg_of
from .tracing import ABOUT_SHAPES, Call, RefusedShape, is_about_shapes, probe_like, trace

# Sides that are tried where no module tells its own. A stride of 5 or more is that of patches.
_USUAL_STRIDE, _LEAST_PATCH = 32, 5
_MOST_STRIDES, _LONGEST_SIDE = 32, 512


class Traced(NamedTuple):
    """A pass over noise.

    Args:
        image_processor: the user's, or the one that the model's `pretrained_cfg` describes, or None.
        image_size: (height, width) of the noise, where it had to be looked for.
        probe: the noise and what else the model reads, pixel_values first.
        logits: (images, C).
        calls: of the model's modules.
    """

    image_processor: Any
    image_size: tuple[int, int] | None
    probe: dict[str, Tensor]
    logits: Tensor
    calls: list[Call]

    @property
    def pixel_values(self) -> Tensor:
        return self.probe["pixel_values"]


def trace_noise(model: nn.Module, image_processor: Any = None) -> Traced:
    """Run a model over noise of the size that its processor makes, or else that it says, or else that it takes.

    Raises:
        ValueError: If its size is not found, or it returns no logits.
        Exception: What the model raises for images of the user's processor.
    """
    if image_processor is not None:
        probe = probe_like(model, image_processor)
        return Traced(image_processor, None, probe, *trace(model, **probe))
    image_processor = image_processor_from(pretrained_cfg_of(model))
    probe = probe_like(model, image_processor)
    try:
        return Traced(image_processor, None, probe, *trace(model, **probe))
    except (RefusedShape, AssertionError, IndexError, RuntimeError) as error:
        if not is_about_shapes(error):
            raise
        refusal: Exception = error
    traced = _trace_size_it_takes(model)
    if traced is not None:
        return traced
    shape = tuple(probe["pixel_values"].shape)
    reason = str(refusal.__cause__ or refusal).strip().partition("\n")[0]  # often an assert without a message
    raise ValueError(
        f"{type(model).__name__} does not take pixel_values of shape {shape}{f' ({reason})' if reason else ''}, and "
        "does not tell what it takes; pass image_processor=, one that makes images of its size."
    ) from refusal


def trace_more_noise(model: nn.Module, traced: Traced, num_images: int) -> Traced:
    """Run the model over noise of the same size, but more of it."""
    probe = probe_like(model, traced.image_processor, num_images, traced.image_size)
    return Traced(traced.image_processor, traced.image_size, probe, *trace(model, **probe))


def _trace_size(model: nn.Module, size: tuple[int, int]) -> Traced | None:
    """The pass over noise of this height and width, with a processor that makes such images; None if it is refused."""
    pretrained_cfg = pretrained_cfg_of(model)
    if "input_size" in pretrained_cfg:
        pretrained_cfg = pretrained_cfg | {"input_size": (pretrained_cfg["input_size"][0], *size)}
    image_processor = image_processor_from(pretrained_cfg)
    probe = probe_like(model, image_processor, image_size=size)
    try:
        return Traced(image_processor, size, probe, *trace(model, **probe))
    except ABOUT_SHAPES as error:
        if is_about_shapes(error):
            return None
        raise


def _trace_size_it_takes(model: nn.Module) -> Traced | None:
    """The pass over noise of a size that its modules tell, or else of the only one of many that it takes; or None."""
    for size in dict.fromkeys(_sizes_told(model)):
        traced = _trace_size(model, size)
        if traced is not None:
            return traced
    accepted = None
    for side in _sides_to_try(model):
        traced = _trace_size(model, (side, side))
        if traced is not None and accepted is not None:
            return None  # it takes several, and was made for one of them
        accepted = accepted or traced
    return accepted


def _sizes_told(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Sizes (height, width) of images that modules say they take, as timm's patch embeddings do."""
    for module in model.modules():
        for name in ("img_size", "image_size"):
            size = getattr(module, name, None)
            sides = size if isinstance(size, (tuple, list)) else (size, size)
            if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
                yield as_pair(sides)


def _sides_to_try(model: nn.Module) -> range:
    """Sides of square images: multiples of a patch, or of the stride of most CNNs."""
    strides = (module.stride[0] for module in model.modules() if isinstance(module, nn.Conv2d))
    stride = next((stride for stride in strides if stride >= _LEAST_PATCH), _USUAL_STRIDE)
    return range(stride, min(_MOST_STRIDES * stride, _LONGEST_SIDE) + 1, stride)
