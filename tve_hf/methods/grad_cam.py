"""Grad-CAM (Selvaraju et al., arXiv 1610.02391) on any feature map: of a CNN, or patch tokens of a transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..classifiers import SplitClassifier


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
        ValueError: If no feature map has a gradient, as under `torch.no_grad`.
    """
    with torch.enable_grad():
        output = classifier(pixel_values.detach().requires_grad_())
        logits = output.logits.gather(1, class_idx.unsqueeze(1)).sum()
        maps = output.features[: layer + 1 or None]
        gradients = torch.autograd.grad(logits, maps, allow_unused=True)
    used = [(m, g) for m, g in zip(maps, gradients, strict=True) if g is not None and g.any()]
    if not used:
        raise ValueError(
            f"No feature map of {classifier.name} reaches the logits by a gradient; Grad-CAM cannot serve it."
        )
    feature, gradient = used[-1]
    cam = (gradient.mean((2, 3), keepdim=True) * feature).sum(1, keepdim=True).relu().detach().float()
    return F.interpolate(cam, size=grid_size, mode="bilinear", align_corners=False).squeeze(1)
