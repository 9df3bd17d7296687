"""Look at one forward pass of a classifier: where its logits come from, and which modules give feature maps."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from .patches import as_pair, is_grid, token_grid
from .wrapped import count_weights, has_adapters, placement, uncompiled

# Depths, as shares of the blocks that the trace saw, at which an explainer reads feature maps.
FEATURE_DEPTHS = (1 / 3, 2 / 3, 1.0)
# The most heads that the logits may be a sum of; models that distil have two, some have one for each stage.
MAX_HEADS = 8


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


def differ(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits differ by more than the rounding of their precision explains."""
    tolerance = 1e-5 if theirs.dtype in (torch.float32, torch.float64) else 1e-2
    return not bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


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


@dataclass(frozen=True)
class HeadPart:
    """A module that gives the logits, or a fixed share of them, from a part of the embedding.

    Args:
        name: the module's.
        pooled: axes of positions, over which the model takes the mean or maximum of the module's output. The mean is
            taken of its input instead, which is the same for a linear module such as a 1 x 1 convolution; for a
            maximum, the inputs at all positions are the embedding.
        by_max: whether it is the maximum.
        scale: the logits are the sum over all parts of scale * output.
        start: where its input begins in the embedding; parts that are given the same share it.
        input_shape: of that input for one image.
    """

    name: str
    pooled: tuple[int, ...] = ()
    by_max: bool = False
    scale: float = 1.0
    start: int = 0
    input_shape: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.input_shape)

    def pool(self, output: Tensor) -> Tensor:
        """The module's output with its positions pooled."""
        if not self.pooled:
            return output
        return output.amax(self.pooled, keepdim=True) if self.by_max else output.mean(self.pooled, keepdim=True)

    def read(self, given: Tensor) -> Tensor:
        """What of the module's input is a part of the embedding."""
        return given if self.by_max else self.pool(given)


class Candidate(NamedTuple):
    """A module that may be a head, what it was given, and the logits it would give, (B, C)."""

    part: HeadPart
    given: Tensor
    logits: Tensor


def find_candidates(calls: list[Call], logits_shape: torch.Size, num_weights: int) -> list[Candidate]:
    """Find the innermost modules with weights whose outputs have the shape of logits, perhaps at several positions."""
    batch, classes = logits_shape
    candidates = []
    for call in calls:
        own = count_weights(call.module)
        # The whole network in a wrapper outputs the logits too, but leaves no weights for a backbone.
        is_network = own == num_weights and any(True for _ in call.module.children())
        if not own or is_network:
            continue
        shape, given = call.output.shape, call.given
        for axis in range(1, len(shape)):
            pooled = tuple(i for i in range(1, len(shape)) if i != axis and shape[i] > 1)
            at_positions = given.ndim == len(shape) and all(given.shape[i] == shape[i] for i in pooled)
            if shape[0] == batch and shape[axis] == classes and (at_positions or not pooled):
                for by_max in (False, True) if pooled else (False,):
                    part = HeadPart(call.name, pooled, by_max)
                    logits = part.pool(call.output).reshape(batch, classes)
                    if torch.isfinite(logits).all():
                        candidates.append(Candidate(part, part.read(given), logits))
                break
    return [
        outer
        for outer in candidates
        if not any(
            inner.part.name.startswith(outer.part.name + ".") and not differ(inner.logits, outer.logits)
            for inner in candidates
        )
    ]


def weighted_sum(logits: Tensor, candidates: list[Candidate]) -> list[Candidate]:
    """Choose the fewest last candidates of which the logits are a weighted sum, found by least squares."""
    wanted = logits.double().cpu()
    # As many weights as logits, and any candidates would do.
    for count in range(1, min(len(candidates), MAX_HEADS, wanted.numel() - 1) + 1):
        last = candidates[-count:]
        shares = torch.stack([candidate.logits.double().cpu() for candidate in last], -1)  # (B, C, count)
        solution = torch.linalg.lstsq(shares.flatten(0, 1), wanted.flatten().unsqueeze(1)).solution.flatten()
        # A weight that the model has as 1/2 is found as 0.4999999.
        simple = [float(Fraction(scale).limit_denominator(8)) for scale in solution.tolist()]
        for scales in (simple, solution.tolist()):
            if not differ((shares @ torch.tensor(scales, dtype=torch.float64)).to(logits.dtype), logits.cpu()):
                return [
                    candidate._replace(part=replace(candidate.part, scale=scale))
                    for candidate, scale in zip(last, scales, strict=True)
                    if differ(wanted - scale * candidate.logits.double().cpu(), wanted)  # it does contribute
                ]
    return []


def find_head(model: nn.Module, logits: Tensor, calls: list[Call]) -> list[HeadPart]:
    """Find the innermost module with weights whose output is the logits, or several of which they are a fixed sum.

    Raises:
        ValueError: If there are none, or if more than one gives the logits by itself.
    """
    candidates = find_candidates(calls, logits.shape, count_weights(model))
    whole = [candidate for candidate in candidates if not differ(candidate.logits, logits)]
    chosen = whole or weighted_sum(logits, candidates)
    if len(whole) > 1 or not chosen:
        names = ", ".join(candidate.part.name for candidate in whole) or "they are computed outside of a module"
        raise ValueError(
            f"Cannot split the classifier: {len(whole)} of its modules output its logits, expected one ({names}) or "
            "several of which they are a weighted sum; wrap it so that one nn.Linear or similar module gives them."
        )
    parts: list[HeadPart] = []
    for i, (part, given, _) in enumerate(chosen):
        same = [other for other, before in zip(parts, chosen[:i], strict=True) if torch.equal(before.given, given)]
        start = same[0].start if same else max((other.stop for other in parts), default=0)
        parts.append(replace(part, start=start, input_shape=tuple(given.shape[1:])))
    return parts


def find_features(calls: list[Call], before: str, pixel_values: Tensor) -> tuple[str, ...]:
    """Choose the blocks, at fixed shares of the depth, whose outputs are feature maps."""
    if pixel_values.ndim != 4:  # patches in a row, whose places in the image are not known
        return ()
    names = [c.name for c in calls]
    calls = [c for c in calls[: names.index(before)] if names.count(c.name) == 1]
    modules = {c.name: c.module for c in calls}
    maps = [c.name for c in calls if feature_in(c.outputs, pixel_values) is not None]
    # Blocks are what stands in a list: `layers.3`, `stages.1`. Any module will do where a model has none.
    blocks = [name for name in maps if name.rpartition(".")[2].isdigit()] or maps
    outer = [n for n in blocks if not any(n.startswith(o + ".") and o in modules for o in blocks)]
    blocks = outer if len(outer) >= len(FEATURE_DEPTHS) else blocks
    positions = sorted({math.ceil(depth * len(blocks)) - 1 for depth in FEATURE_DEPTHS}) if blocks else []
    return tuple(blocks[i] for i in positions)


def check_inputs(model: nn.Module) -> None:
    """Refuse a model that cannot be watched, that has no head, or that reads tokens, as its `forward` says.

    Raises:
        ValueError: If it is compiled to TorchScript, says `num_classes=0`, or `forward` takes `input_ids`.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"Cannot split {type(model).__name__}: what happens inside TorchScript cannot be watched; pass the module "
            "that it was made from."
        )
    if getattr(model, "num_classes", None) == 0:
        raise ValueError(
            f"Cannot split {type(model).__name__}: it has no head (num_classes=0) and returns features; pass one with "
            "classes, or put a head on it first."
        )
    names = inspect.signature(model.forward).parameters
    if "input_ids" in names:
        reads = "text (input_ids) beside the image" if "pixel_values" in names else "tokens (input_ids), not pixels"
        raise ValueError(
            f"Cannot split {type(model).__name__}: it reads {reads}, and an attribution is of pixels alone; pass a "
            "classifier that reads nothing but pixel_values."
        )


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
