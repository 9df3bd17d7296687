"""AttentionCAM: Grad-CAM with the last attention map of each head as a channel.

As in LeGrad's comparison (arXiv 2404.03214) and, under the name of GradCAM, in Chefer et al. (arXiv 2012.09838). Their
code (MIT licence) averages a head's gradient over the class token's row, as is done here, and sets negative scores to
0, which is left to drawing.
"""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._attention import attend, find_layout
from ._gradients import class_evidence, differentiable


def explain(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """sum_h w_h A_h, w_h the mean over patches of the class logit's gradient by the class token's row of A_h.

    A is the last block's attention; with an attentional pooler, the pooler's. Without a class token, gradients and
    rows are averaged over the tokens that the model pools.

    Returns:
        Signed scores (B, rows, cols).

    Raises:
        ValueError: If the classifier's last block has no attention over all tokens, or under inference mode.
    """
    layout = find_layout(classifier, pixel_values, every_block=False)
    with differentiable(pixel_values) as x:
        attended = attend(classifier, x, layout)
        attention = attended.maps[-1] if attended.pooled is None else attended.pooled
        (slope,) = torch.autograd.grad(class_evidence(attended.logits, class_idx), attention)
    queries = list(layout.queries) if attended.pooled is None else slice(None)
    rows, slopes = (t.detach().float()[:, :, queries] for t in (attention, slope))  # (B, heads, Q, T)
    weights = slopes[..., layout.prefix :].mean((2, 3)).unsqueeze(-1)  # (B, heads, 1)
    return layout.on_grid((weights * rows.mean(2)).sum(1), grid_size)
