"""Find out of one traced pass where the logits come from, and which modules give feature maps."""

import inspect
import math
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .parts import HeadPart, MapLayout, find_layout
from .tracing import Call
from .wrapped import count_weights

# Depths, as shares of the blocks that the trace saw, at which an explainer reads feature maps.
FEATURE_DEPTHS = (1 / 3, 2 / 3, 1.0)
# The most heads that the logits may be a sum of; models that distil have two, some have one for each stage.
MAX_HEADS = 8


def differ(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two results differ by more than rounding explains; one that is not a number differs from any.

    Args:
        ours, theirs: of one shape.
        tolerance: of the largest difference, as a share of the largest of their values; in half precision it is 1e-2.
    """
    if theirs.dtype not in (torch.float32, torch.float64):
        tolerance = 1e-2
    return not bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


class Candidate(NamedTuple):
    """A module that may be a head, what it reads, and the logits that it would give, (B, C)."""

    part: HeadPart
    input: Tensor
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
        shape, module_input = call.output.shape, call.input
        for axis in range(1, len(shape)):
            pooled = tuple(i for i in range(1, len(shape)) if i != axis and shape[i] > 1)
            at_positions = module_input.ndim == len(shape) and all(module_input.shape[i] == shape[i] for i in pooled)
            if shape[0] == batch and shape[axis] == classes and (at_positions or not pooled):
                for by_max in (False, True) if pooled else (False,):
                    part = HeadPart(call.name, pooled, by_max)
                    logits = part.pool(call.output).reshape(batch, classes)
                    if torch.isfinite(logits).all():
                        candidates.append(Candidate(part, part.read(module_input), logits))
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
        # For a weight that the model has as 1/2, least squares gives 0.4999999.
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
    for i, (part, read, _) in enumerate(chosen):
        same = [other for other, before in zip(parts, chosen[:i], strict=True) if torch.equal(before.input, read)]
        start = same[0].start if same else max((other.stop for other in parts), default=0)
        parts.append(replace(part, start=start, input_shape=tuple(read.shape[1:])))
    return parts


def find_layouts(calls: list[Call], pixel_values: Tensor) -> dict[str, MapLayout]:
    """Find which modules give a feature map of the traced images, and how it lies in what they give.

    Args:
        calls: of a traced pass.
        pixel_values: its images, (B, C, H, W). Of patches in a row the places in the image are not known: no layouts.
    """
    if pixel_values.ndim != 4:
        return {}
    layouts = ((call.name, find_layout(call.outputs, pixel_values)) for call in calls)
    return {name: layout for name, layout in layouts if layout is not None}


def find_features(
    calls: list[Call], head_names: list[str], layouts: dict[str, MapLayout], pixel_values: Tensor
) -> tuple[str, ...]:
    """Choose the blocks before the head, at fixed shares of the depth, whose outputs are feature maps.

    And the map whose mean over its positions the one head reads, if there is one: it says what each position adds.

    Args:
        calls: of a traced pass.
        head_names: the modules that give the logits, or their summands.
        layouts: of the modules that give feature maps.
        pixel_values: the traced images, (B, C, H, W).
    """
    names = [call.name for call in calls]
    maps = [name for name in names[: names.index(head_names[0])] if names.count(name) == 1 and name in layouts]
    # Blocks are what stands in a list: `layers.3`, `stages.1`. Any module will do where a model has none.
    blocks = [name for name in maps if name.rpartition(".")[2].isdigit()] or maps
    outer = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    blocks = outer if len(outer) >= len(FEATURE_DEPTHS) else blocks
    positions = sorted({math.ceil(depth * len(blocks)) - 1 for depth in FEATURE_DEPTHS}) if blocks else []
    chosen = [blocks[i] for i in positions]
    embeddings = calls[names.index(head_names[0])].input
    outputs = {call.name: call.outputs for call in calls}

    def is_pooled(name: str) -> bool:
        tensor = layouts[name].tensor_in(outputs[name], len(pixel_values))
        return is_mean_of(embeddings, layouts[name].as_map(tensor, *pixel_values.shape[-2:]))

    if len(head_names) == 1 and not any(map(is_pooled, chosen)):
        chosen += [name for name in maps if is_pooled(name)][-1:]
    return tuple(chosen)


def is_mean_of(embeddings: Tensor, feature_map: Tensor | None) -> bool:
    """Whether embeddings, (B, D, ...), are the mean of a feature map (B, C, h, w) over its positions."""
    if feature_map is None or embeddings.numel() != feature_map.shape[0] * feature_map.shape[1]:
        return False
    return not differ(feature_map.mean((2, 3)), embeddings.reshape(feature_map.shape[:2]))


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
