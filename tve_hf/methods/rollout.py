"""Attention rollout (Abnar & Zuidema, arXiv 2005.00928): attention with the identity added, multiplied over blocks."""

from functools import reduce

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._attention import attend, find_layout


def explain(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Class-token row of prod_l rownorm(mean_heads A_l + I), (B, rows, cols); the same for every class.

    Without a class token, the mean over the tokens that the model pools. An attentional pooler, which the paper does
    not have, comes last and adds no identity: its queries are none of the tokens.

    Raises:
        ValueError: If the classifier has no attention over all tokens in every block.
    """
    layout = find_layout(classifier, pixel_values)
    with torch.no_grad():
        attended = attend(classifier, pixel_values, layout)
    steps = []
    for attention in attended.maps:  # (B, heads, T, T)
        step = attention.float().mean(1) + torch.eye(attention.shape[-1], device=attention.device)
        steps.append(step / step.sum(-1, keepdim=True))
    rollout = reduce(lambda product, step: step @ product, steps)  # the last block from the left
    if attended.pooled is not None:
        return layout.on_grid((attended.pooled.float().mean(1) @ rollout).mean(1), grid_size)
    return layout.on_grid(layout.query_rows(rollout), grid_size)
