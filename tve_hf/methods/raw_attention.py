"""Raw attention of the last block: a baseline of Chefer et al. (arXiv 2012.09838) and of LeGrad (arXiv 2404.03214)."""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._attention import attend, find_layout


def explain(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Class-token row of mean_heads A_L, or the map of the attentional pooler, (B, rows, cols); for every class.

    Without a class token, the mean over the tokens that the model pools.

    Raises:
        ValueError: If the classifier's last block has no attention over all tokens.
    """
    layout = find_layout(classifier, pixel_values, every_block=False)
    with torch.no_grad():
        attended = attend(classifier, pixel_values, layout)
    if attended.pooled is not None:
        return layout.on_grid(attended.pooled.float().mean((1, 2)), grid_size)
    return layout.on_grid(layout.query_rows(attended.maps[-1].float().mean(1)), grid_size)
