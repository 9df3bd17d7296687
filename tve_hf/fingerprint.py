"""Recognise the weights of a backbone: a short string that survives a change of precision, device or names."""

import hashlib
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_PROJECTIONS = 16
_SAMPLE = 256  # values of each tensor
# Rounding to bfloat16 moves a sketch by about 0.001, one epoch of fine-tuning by far more.
_TOLERANCE = 0.003

Match = Literal["same weights", "same architecture, other weights", "no"]


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Summarise weights as `<hash of the shapes>-<sketch of the values>`.

    The sketch is 16 random projections, of unit variance, of 256 evenly spaced values of each floating-point tensor,
    every tensor scaled to unit mean square.
    """
    tensors = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    shapes = hashlib.sha256(repr([tuple(tensor.shape) for tensor in tensors]).encode()).hexdigest()[:12]
    samples = [torch.zeros(1)]
    for tensor in tensors:
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float().cpu()
        samples.append(sample / sample.square().mean().sqrt().clamp(min=1e-12))
    values = torch.cat(samples).numpy().astype(np.float64)
    # Signs from an integer hash, so that they are the same on every platform and in every version.
    index = np.arange(_PROJECTIONS * len(values), dtype=np.uint64).reshape(_PROJECTIONS, -1)
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    signs = 1.0 - 2.0 * ((mixed >> np.uint64(63)).astype(np.float64))
    sketch = signs @ values / len(values) ** 0.5
    return f"{shapes}-{sketch.astype('<f2').tobytes().hex()}"


def match(one: str, other: str) -> Match:
    """Compare two fingerprints."""
    shapes, _, sketch = one.partition("-")
    other_shapes, _, other_sketch = other.partition("-")
    if shapes != other_shapes:
        return "no"
    values, other_values = (np.frombuffer(bytes.fromhex(s), "<f2").astype(np.float64) for s in (sketch, other_sketch))
    distance = np.sqrt(np.mean((values - other_values) ** 2))
    return "same weights" if distance <= _TOLERANCE else "same architecture, other weights"
