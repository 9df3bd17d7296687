"""Grad-CAM (Selvaraju et al., arXiv 1610.02391) on any feature map: of a CNN, or patch tokens of a transformer."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifiers import SplitClassifier
from ..classifiers.tracing import hooked
from ._gradients import class_evidence, differentiable


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    layer: int = -1,
) -> Tensor:
    """ReLU of the channel sum of the map, weighted by the spatial mean of the class logit's gradient.

    Args:
        layer: which of the classifier's feature maps. Where the head reads a class token, the last block's patch
            tokens do not reach the logits, and the one before is used: the last map with a gradient.

    Returns:
        scores (B, rows, cols), at least 0, resampled from the map to the grid.

    Raises:
        ValueError: If no feature map has a gradient, or under inference mode.
    """
    # Gradients are asked of the modules' own outputs: a map made of tokens is a view beside the way to the logits.
    backbone = classifier.backbone
    names = backbone.feature_names
    outputs: dict[str, Tensor] = {}

    def hooks() -> Iterator[Any]:
        for name in names:

            def keep_output(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
                layout = backbone.layout_of(name, output, pixel_values)
                value = None if layout is None else layout.tensor_in(output, len(pixel_values))
                if value is not None:
                    outputs[name] = value

            yield backbone.model.get_submodule(name).register_forward_hook(keep_output)

    with differentiable(pixel_values) as x, hooked(hooks()):
        logits = classifier(x).logits
        values = [outputs[name] for name in names][: layer + 1 or None]
        evidence = class_evidence(logits, class_idx)
        gradients: tuple[Tensor, ...] = ()
        if values:
            gradients = torch.autograd.grad(evidence, values, allow_unused=True, materialize_grads=True)
    height, width = pixel_values.shape[-2:]
    used = []
    for name, value, gradient in zip(names, values, gradients, strict=False):
        as_map = backbone.layouts[name].as_map
        feature, gradient_map = (as_map(tensor, height, width) for tensor in (value, gradient))
        if feature is not None and gradient_map is not None and gradient_map.any():
            used.append((feature, gradient_map))
    if not used:
        raise ValueError(
            f"No feature map of {classifier.name} reaches the logits by a gradient; Grad-CAM cannot serve it."
        )
    feature, gradient = used[-1]
    cam = (gradient.mean((2, 3), keepdim=True) * feature).sum(1, keepdim=True).relu().detach().float()
    return F.interpolate(cam, size=grid_size, mode="bilinear", align_corners=False).squeeze(1)
