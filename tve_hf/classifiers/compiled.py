"""The passes that give embeddings alone, compiled: masked images, which are nearly all that evaluations cost."""

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..messages import sentence
from .model import SplitClassifier
from .parts import Backbone

# Largest difference of what a graph computes from what the model does, as a share of the largest value if above 1.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class CompiledPass(nn.Module):
    """A function of images (B, 3, H, W) as a module, whose calls can be hooked; it holds no weights of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.function(pixel_values)


class CompiledBackbone(Backbone):
    """A backbone whose embeddings alone, without gradient, come from compiled code; all else runs as it was written.

    So do batches of one image, images of another size, and those with more inputs. Compiled code reads the model's
    weights where they are, but does not run its hooks. A deep copy is not compiled, since its weights are others.

    Args:
        backbone: to compile; its model is shared, not copied.
        images_like: two images or more of the size to compile for.
    """

    def __init__(self, backbone: Backbone, images_like: Tensor, compiled_pass: CompiledPass | None = None):
        own = backbone.model, backbone.parts, backbone.feature_names, backbone.other_inputs, backbone.layouts
        super().__init__(*own, image_size=backbone.image_size)
        self.images_like = images_like
        self.compiled_pass = compiled_pass or CompiledPass(_compile(backbone, images_like))

    def embed(self, pixel_values: Tensor, **inputs: Tensor) -> Tensor:
        """Return the embeddings, (B, D)."""
        like = self.images_like
        as_compiled = pixel_values.shape[1:] == like.shape[1:]
        as_compiled = as_compiled and (pixel_values.dtype, pixel_values.device) == (like.dtype, like.device)
        if not as_compiled or len(pixel_values) == 1 or inputs or torch.is_grad_enabled() or self.model.training:
            return super().embed(pixel_values, **inputs)
        return self.compiled_pass(pixel_values)

    def reading(self, feature_names: tuple[str, ...]) -> "CompiledBackbone":
        return CompiledBackbone(super().reading(feature_names), self.images_like, self.compiled_pass)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return copy.deepcopy(super().reading(self.feature_names), memo)


def reason_in(error: Exception) -> str:
    """The first sentence of what torch says, which is often long."""
    return sentence(error).split(". ")[0].rstrip(".")


@torch.no_grad()
def as_graph(module: nn.Module, pixel_values: Tensor) -> ExportedProgram:
    """Trace a module of images as one graph, for batches of any size.

    Raises:
        ValueError: Why it cannot be, in torch's words: if what it does depends on values, on the size of the batch, or
            on what is not torch's.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch prints what it could not trace
            return torch.export.export(module, (pixel_values,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(reason_in(error)) from error


def _compile(backbone: Backbone, images_like: Tensor) -> Callable[[Tensor], Tensor]:
    # Traced first: hooks that read the head's input are in the graph then, and nothing of them is left to break it.
    program = as_graph(_Embedding(backbone), images_like).module()
    return torch.compile(lambda pixel_values: program(pixel_values), fullgraph=True, dynamic=True)


class _Embedding(nn.Module):
    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.backbone.embed(pixel_values)


@torch.no_grad()
def with_compiled_passes(classifier: SplitClassifier) -> SplitClassifier:
    """Return this classifier with its masked passes compiled by `torch.compile`, for images of its own size.

    On a CPU a CNN then takes little more than half the time, since activations and norms need no passes over memory of
    their own; a small transformer gains nothing. The first pass compiles for some seconds. Model and head are shared.

    Raises:
        ValueError: If the model cannot be traced as one graph, compiled, or its compiled embeddings differ.
    """
    like = classifier.probe()
    remedy = "leave torch_compile out"
    if classifier.backbone.other_inputs:
        inputs = ", ".join(classifier.backbone.other_inputs)
        raise ValueError(f"{classifier.name} also reads {inputs}, and is compiled for pixel_values alone; {remedy}.")
    expected = classifier.embed(like)
    try:
        found = classifier._with(backbone=CompiledBackbone(classifier.backbone, like))
        embeddings = found.embed(like)
    except (RuntimeError, ValueError) as error:  # of the trace, dynamo and the compiler
        raise ValueError(f"{classifier.name} cannot be compiled ({reason_in(error)}); {remedy}.") from error
    difference = float((embeddings - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= TOLERANCES.get(like.dtype, 1e-4):
        raise ValueError(f"The compiled embeddings of {classifier.name} differ by {difference:.2g}; {remedy}.")
    return found
