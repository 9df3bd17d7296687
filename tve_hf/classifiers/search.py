"""Find out of one traced pass where the logits come from, and which modules give feature maps."""

import inspect
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .tracing import Call, feature_in
from .wrapped import count_weights

# Depths, as shares of the blocks that the trace saw, at which an explainer reads feature maps.
FEATURE_DEPTHS = (1 / 3, 2 / 3, 1.0)
# The most heads that the logits may be a sum of; models that distil have two, some have one for each stage.
MAX_HEADS = 8


def differ(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits differ by more than the rounding of their precision explains."""
    tolerance = 1e-5 if theirs.dtype in (torch.float32, torch.float64) else 1e-2
    return not bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


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
