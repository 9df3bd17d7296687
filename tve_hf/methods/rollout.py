"""Attention rollout (Abnar & Zuidema, arXiv 2005.00928): attention with the identity added, multiplied over blocks."""

from functools import reduce

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._attention import attention_maps, class_token_row


@torch.no_grad()
def explain(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Class-token row of prod_l rownorm(mean_heads A_l + I), (B, rows, cols); the same for every class.

    Raises:
        ValueError: If the classifier has no attention over a class token and all patches.
    """
    steps = []
    for attention in attention_maps(classifier, pixel_values):  # (B, heads, T, T)
        step = attention.float().mean(1) + torch.eye(attention.shape[-1], device=attention.device)
        steps.append(step / step.sum(-1, keepdim=True))
    rollout = reduce(lambda product, step: step @ product, steps)  # the last block from the left
    return class_token_row(rollout, pixel_values, grid_size)
