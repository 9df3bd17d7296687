"""TVE: one pass of a pre-trained explainer, then transfer by the classifier's head (arXiv 2312.15359, Eq. 10)."""

import torch
from torch import Tensor

from ..attribution import DEFAULT_RULE, transfer
from ..classifiers import SplitClassifier
from ..modeling_tve import TVEExplainer


@torch.no_grad()
def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    explainer: TVEExplainer,
    rule: str = DEFAULT_RULE,
) -> Tensor:
    """Scores (B, rows, cols) of the explainer, on its own grid, in the units of the rule."""
    config = explainer.config
    if config.grid_shape != grid_size:
        raise ValueError(
            f"The explainer's grid is {config.grid_shape}, not {grid_size}; pass grid_size={config.grid_shape}."
        )
    seen = classifier(pixel_values)
    predicted = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
    scores = transfer(predicted.kept, predicted.removed, classifier, class_idx, rule, grid_size, config.hops)
    return scores.unflatten(1, grid_size)
