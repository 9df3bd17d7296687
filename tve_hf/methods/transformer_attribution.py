"""Transformer attribution (Chefer, Gur & Wolf, arXiv 2012.09838): rollout of relevance times gradient.

Written from the paper; the authors' code (hila-chefer/Transformer-Explainability, MIT licence) tells the defaults.
`chefer_cam` is their later method, with attention itself in place of its relevance.

Layer-wise relevance propagation is patented; Fraunhofer lets it be used free of charge for personal and scientific
purposes only, and the licence of this package grants no rights to its patents. So no budget of `tve-hf evaluate` has
this method: it runs only when named.
"""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._attention import attend, find_layout
from ._gradients import class_evidence, differentiable
from ._relevance import Tape


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    start_layer: int = 0,
) -> Tensor:
    """Class-token row of prod_l (I + mean_heads ReLU(grad A_l * R_l)) (Eq. 13-14).

    R_l is the relevance of block l's attention A_l (`_relevance`), grad A_l the gradient of the class logit. Rows are
    not normalised, as in the authors' code. An attentional pooler, which the paper does not have, comes last and adds
    no identity. Without a class token, rows are averaged over the tokens that the model pools.

    Args:
        start_layer: the first block that counts; negative from the end. The authors' API uses all, their evaluation
            leaves out the first (1).

    Returns:
        scores (B, rows, cols), at least 0.

    Raises:
        ValueError: If the classifier has no attention over all tokens in every block, `start_layer` is not one of
            them, relevance would have to pass an operation that has no rule, or under inference mode.
    """
    layout = find_layout(classifier, pixel_values)
    with differentiable(pixel_values) as x:
        with Tape(classifier, x) as tape:
            attended = attend(classifier, x, layout)
        used = attended.maps_from(start_layer, classifier.name)
        slopes = torch.autograd.grad(class_evidence(attended.logits, class_idx), used)
    relevance = tape.relevance(attended.logits, class_idx, used)
    weighted = [r * slope for r, slope in zip(relevance, slopes, strict=True)]
    return layout.on_grid(layout.accumulated(weighted), grid_size)
