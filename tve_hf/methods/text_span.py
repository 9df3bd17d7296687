"""TextSpan's map: what each image token adds to the class by attention alone (Gandelsman et al., arXiv 2310.05916).

Written from the paper. The greedy basis of texts that its code is named for takes no part in the map, which the
authors' code sums over all layers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..classifiers import SplitClassifier
from ..classifiers.search import differ
from ._attention import attend, find_layout
from ._gradients import differentiable


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Sum over layers and heads of <c_{l,h,n}, w_y - mean over classes of w>, for each token n.

    c_{l,h,n} is what the tokens that the embedding is read from take from token n through head h of block l, carried
    along the residual stream and the last norm, whose statistics are held fixed; w_y is the row of the head for class
    y (divided by the embedding's length, where the head normalises it). A constant of the image, such as the shares
    of biases, which the paper spreads evenly over tokens, is left out.

    Args:
        layers: blocks to use, negative from the end; all if None.

    Returns:
        Signed scores (B, rows, cols), in logits.

    Raises:
        ValueError: If the classifier has no attention over all tokens in every block, an attentional pooler, a head
            that is not linear, blocks without a norm before attention, or under inference mode.
    """
    layout = find_layout(classifier, pixel_values)
    count = len(layout.blocks)
    chosen = range(count) if layers is None else layers
    if not len(chosen) or any(not -count <= layer < count for layer in chosen):
        raise ValueError(f"layers={list(chosen)} must name some of the {count} blocks of {classifier.name}.")
    if layout.pooler is not None:
        raise ValueError(
            f"{classifier.name} pools its tokens by attention, so that none adds to the embedding directly; use "
            "another method, such as legrad."
        )
    model = classifier.backbone.model

    def hooks() -> Iterator[Any]:
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                inside = any(name.startswith(f"{block}.") for block in layout.blocks)
                yield module.register_forward_hook(_cut if inside else _fixed)

    with differentiable(pixel_values) as x:
        attended = attend(classifier, x, layout, hooks())
        weight = _head_weight(classifier, attended.embeddings.detach())  # (B, C, D)
        direction = weight[torch.arange(len(x)), class_idx] - weight.mean(1)
        maps = [attended.maps[index] for index in sorted({layer % count for layer in chosen})]
        slopes = torch.autograd.grad((attended.embeddings * direction).sum(), maps, allow_unused=True)
    shares = [
        (a.detach() * slope).float().sum((1, 2)) for a, slope in zip(maps, slopes, strict=True) if slope is not None
    ]
    if len(shares) < len(maps):
        raise ValueError(
            f"What attention gives is normalised before a block of {classifier.name} passes it on, so that no token "
            "adds to the embedding directly; use another method, such as legrad."
        )
    return layout.on_grid(torch.stack(shares).sum(0), grid_size)


def _cut(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Take what a branch of a block reads for a constant, so that the residual stream alone carries gradients."""
    return output.detach().requires_grad_()


def _fixed(module: nn.LayerNorm, args: tuple, output: Tensor) -> Tensor:
    """Layer normalisation by fixed statistics: linear in its input."""
    axes = tuple(range(-len(module.normalized_shape), 0))
    variance, mean = torch.var_mean(args[0].detach().float(), axes, correction=0, keepdim=True)
    normed = ((args[0] - mean) * (variance + module.eps).rsqrt()).to(output.dtype)
    normed = normed if module.weight is None else normed * module.weight
    return normed if module.bias is None else normed + module.bias


@torch.no_grad()
def _head_weight(classifier: SplitClassifier, embeddings: Tensor) -> Tensor:
    """Rows W of a head that is W e + b, or W e / |e| + b, at each embedding, (B, C, D).

    They are read from what the head gives for the unit vectors and their opposites.
    """
    units = torch.eye(embeddings.shape[-1], device=embeddings.device, dtype=embeddings.dtype)
    plus, minus = classifier.head(units), classifier.head(-units)
    weight, bias = (plus - minus).T / 2, (plus + minus).mean(0) / 2  # (C, D), (C,)
    logits, lengths = classifier.head(embeddings), embeddings.norm(dim=-1, keepdim=True)
    if not differ(embeddings @ weight.T + bias, logits):
        return weight.expand(len(embeddings), -1, -1)
    if not differ(embeddings / lengths @ weight.T + bias, logits):
        return weight / lengths.unsqueeze(-1)
    raise ValueError(f"The head of {classifier.name} is not linear, as text_span needs; use another, such as legrad.")
