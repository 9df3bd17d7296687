"""CheferCAM: generic attention explainability (Chefer, Gur & Wolf, arXiv 2103.15679), self-attention and decoder.

Written from the paper; the authors' code (hila-chefer/Transformer-MM-Explainability, MIT licence) tells the defaults.
"""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._attention import attend, find_layout
from ._gradients import class_evidence, differentiable


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    start_layer: int = 0,
) -> Tensor:
    """Class-token row of R, where R <- R + mean_heads(ReLU(grad A_l * A_l)) R over the blocks, from R = I.

    grad A_l is the gradient of the class logit. Rows are not normalised, as in the authors' code for images. An
    attentional pooler ends with the decoder's rule without its skip connection, mean_heads(ReLU(grad A * A)) R.
    Without a class token, rows are averaged over the tokens that the model pools.

    Args:
        start_layer: the first block that counts; negative from the end. The authors use all blocks of a ViT, and only
            the last (-1) of CLIP, whose early blocks add artefacts.

    Returns:
        scores (B, rows, cols), at least 0.

    Raises:
        ValueError: If the classifier has no attention over all tokens in every block, `start_layer` is not one of
            them, or under inference mode.
    """
    layout = find_layout(classifier, pixel_values)
    with differentiable(pixel_values) as x:
        attended = attend(classifier, x, layout)
        used = attended.maps_from(start_layer, classifier.name)
        slopes = torch.autograd.grad(class_evidence(attended.logits, class_idx), used)
    weighted = [a.detach().float() * slope.float() for a, slope in zip(used, slopes, strict=True)]
    return layout.on_grid(layout.accumulated(weighted), grid_size)
