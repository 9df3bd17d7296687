"""Recognise the weights of a backbone: a short string that survives a change of precision, device or names.

A quick fingerprint reads at most 256 values of each tensor, a full one all of them. Both hold hashes of what they
read, as it is and rounded to half precision in the ways in which checkpoints are, so that a copy in half precision is
known again and any other change is not: of sampled values for the quick one, of a single value anywhere for the full.
"""

import hashlib
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_PROJECTIONS = 16
_SAMPLE = 256  # values of each tensor
# What loading or saving in half precision does to float32 values; the last is a float16 checkpoint loaded in bfloat16.
_ROUNDINGS: tuple[tuple[torch.dtype, ...], ...] = (
    (),
    (torch.bfloat16,),
    (torch.float16,),
    (torch.float16, torch.bfloat16),
)
_FULL = "full"

Match = Literal["same weights", "same architecture, other weights", "no"]


def fingerprint(tensors: Iterable[Tensor], full: bool = False) -> str:
    """Summarise weights as `<shapes>-<sketch>-<hashes of a sample>` or, if full, `<shapes>-full-<hashes of all>`.

    Integers, such as counters and indices, do not count. A tensor that is listed twice, since two modules share it,
    counts twice, as its copy would.

    Args:
        tensors: in the order of the model.
        full: read every value, instead of 256 evenly spaced ones of each tensor. A quick fingerprint can miss a
            change that is elsewhere, as of a few rows; it sees any step of an optimizer that trains all weights.
    """
    tensors = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    shapes = hashlib.sha256(repr([tuple(tensor.shape) for tensor in tensors]).encode()).hexdigest()[:12]
    if full:
        return f"{shapes}-{_FULL}-{_hashes(tensors)}"
    flat = [tensor.reshape(-1) for tensor in tensors]
    samples = [values[:: max(1, values.numel() // _SAMPLE)][:_SAMPLE].float().cpu() for values in flat]
    return f"{shapes}-{_sketch(samples)}-{_hashes(samples)}"


def _hashes(tensors: Iterable[Tensor]) -> str:
    """Hash all values, as they are and after each of the roundings, 16 hexadecimal digits each."""
    hashes = [hashlib.sha256() for _ in _ROUNDINGS]
    for tensor in tensors:
        for one, dtypes in zip(hashes, _ROUNDINGS, strict=True):
            values = tensor.float().cpu()
            for dtype in dtypes:
                values = values.to(dtype)
            one.update((values.float() + 0.0).numpy().astype("<f4").tobytes())  # -0 becomes 0
    return "".join(one.hexdigest()[:16] for one in hashes)


def _sketch(samples: Iterable[Tensor]) -> str:
    """16 random projections, of unit variance, of all samples, each scaled to unit mean square."""
    scaled = [sample / sample.square().mean().sqrt().clamp(min=1e-12) for sample in samples]
    values = torch.cat([torch.zeros(1), *scaled]).numpy().astype(np.float64)
    # Signs from an integer hash, so that they are the same on every platform and in every version.
    index = np.arange(_PROJECTIONS * len(values), dtype=np.uint64).reshape(_PROJECTIONS, -1)
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    signs = 1.0 - 2.0 * ((mixed >> np.uint64(63)).astype(np.float64))
    sketch = signs @ values / len(values) ** 0.5
    return sketch.astype("<f2").tobytes().hex()


def match(one: str, other: str) -> Match:
    """Compare two fingerprints of the same kind, two quick or two full ones.

    Returns:
        "same weights" if one's are the other's, perhaps rounded to half precision; "same architecture, other weights"
        as after fine-tuning; "no" if the tensors have other shapes.

    Raises:
        ValueError: If one is quick and the other full, or one is no fingerprint.
    """
    (shapes, sketch, hashes), (other_shapes, other_sketch, other_hashes) = _parts(one), _parts(other)
    if (sketch == _FULL) != (other_sketch == _FULL):
        raise ValueError("A quick and a full fingerprint cannot be compared; make both with the same `full`.")
    if shapes != other_shapes:
        return "no"
    # The first is of the values as they are.
    same = hashes[0] in other_hashes or other_hashes[0] in hashes
    return "same weights" if same else "same architecture, other weights"


def _parts(fingerprint: str) -> tuple[str, str, list[str]]:
    """Shapes, sketch and hashes of a fingerprint."""
    parts = fingerprint.split("-")
    if len(parts) != 3:
        raise ValueError(f"{fingerprint!r} is no fingerprint; make one with `classifier.fingerprint()`.")
    shapes, sketch, hashes = parts
    return shapes, sketch, [hashes[i : i + 16] for i in range(0, len(hashes), 16)]
