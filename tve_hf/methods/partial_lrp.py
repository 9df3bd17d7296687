"""Partial LRP: the relevance of the last block's attention, carried no further (Voita et al., arXiv 1905.09418).

Voita et al. give it for the heads of text models; this is the map that Chefer et al. (arXiv 2012.09838) and LeGrad
(arXiv 2404.03214) compare with, as in the former's code (hila-chefer/Transformer-Explainability, MIT licence).

Layer-wise relevance propagation is patented; Fraunhofer lets it be used free of charge for personal and scientific
purposes only, and the licence of this package grants no rights to its patents. So no budget of `tve-hf evaluate` has
this method: it runs only when named.
"""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._attention import attend, find_layout
from ._relevance import Tape


def explain(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Class-token row of mean_heads ReLU(R), R the relevance of the last block's attention, or of the pooler's.

    R is by LRP as it was before Chefer et al.: sums do not follow their Eq. 9-10. Without a class token, rows are
    averaged over the tokens that the model pools.

    Returns:
        scores (B, rows, cols), at least 0; the class has relevance 1.

    Raises:
        ValueError: If the classifier's last block has no attention over all tokens, relevance would have to pass an
            operation that has no rule, or under inference mode.
    """
    layout = find_layout(classifier, pixel_values, every_block=False)
    with torch.no_grad(), Tape(classifier, pixel_values) as tape:
        attended = attend(classifier, pixel_values, layout)
    attention = attended.maps[-1] if attended.pooled is None else attended.pooled
    (relevance,) = tape.relevance(attended.logits, class_idx, [attention], normalize=False)
    rows = relevance.relu().mean(1)
    return layout.on_grid(layout.query_rows(rows) if attended.pooled is None else rows.mean(1), grid_size)
