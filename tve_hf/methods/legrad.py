"""LeGrad: how sensitive a class is to each layer's attention, scored from that layer's own tokens (arXiv 2404.03214).

`upstream=True` follows the authors' released code (WalBouss/LeGrad, MIT licence) where it departs from the paper.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..classifiers import SplitClassifier
from ..classifiers.tracing import first_tensor
from ..patches import min_max
from ._attention import Layout, attend, find_layout, replace_first
from ._gradients import class_evidence, differentiable


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    layers: Sequence[int] | None = None,
    empty_head: Callable[[Tensor], Tensor] | None = None,
    upstream: bool = False,
) -> Tensor:
    """Mean over layers of E^l = mean over heads and queries of ReLU(ds^l / dA^l), one value for each key token.

    s^l is the class logit that the model's own last norm, pooling and head give for Z^l, the tokens after block l, in
    place of those of the last block. With an attentional pooler, A^l is the pooler's attention over Z^l.

    Args:
        layers: blocks to use, negative from the end; all if None (the last two if `upstream`). For deep models the
            last 40 % are a good choice.
        empty_head: score of an empty prompt such as "a photo of a" from embeddings, (B, D) -> (B, 1): of a zero-shot
            model `classifier.with_prompts(["a photo of a"], "{}").head`. The map is set to 0 where the map of that
            score, scaled to [0, 1], exceeds 0.8: the paper's correction for SigLIP.
        upstream: pool the mean of all tokens, class token included, before the last norm; give an attentional pooler
            tokens without the last norm; and scale each map to [0, 1].

    Returns:
        scores (B, rows, cols), at least 0.

    Raises:
        ValueError: If the classifier has no attention over all tokens in every block, a layer is not one of them,
            what follows the blocks treats a batch as a whole, or under inference mode.
    """
    layout = find_layout(classifier, pixel_values)
    count = len(layout.blocks)
    if layers is None:
        layers = range(-min(2, count), 0) if upstream else range(count)
    used = sorted({layer % count for layer in layers if -count <= layer < count})
    if not used or any(not -count <= layer < count for layer in layers):
        raise ValueError(f"layers={list(layers)} must name some of the {count} blocks of {classifier.name}.")
    values = _sensitivity(classifier, pixel_values, class_idx, layout, used, upstream)
    if empty_head is not None:
        empty = classifier.with_head(empty_head)
        nothing = _sensitivity(empty, pixel_values, torch.zeros_like(class_idx), layout, used, upstream)
        values = values.masked_fill(_scaled(nothing) > 0.8, 0)
    values = _scaled(values) if upstream else values
    before = values.new_zeros(len(values), layout.prefix)
    return layout.on_grid(torch.cat([before, values], 1), grid_size)


def _scaled(values: Tensor) -> Tensor:
    """Scale each image's values to [0, 1], (B, N)."""
    return min_max(values.unsqueeze(1)).squeeze(1)


def _sensitivity(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, layout: Layout, used: list[int], mean: bool
) -> Tensor:
    """Mean over the used layers of E^l at the patches, (B, N), in one pass and one backward.

    Each block starts from a detached copy of the tokens before it, so that A^l reaches no score but s^l; and the last
    block hands on the tokens of all used layers as one large batch, so that the rest of the model scores them all.
    """
    model = classifier.backbone.model
    states: list[Tensor] = []

    def hooks() -> Iterator[Any]:
        for index, name in enumerate(layout.blocks):

            def hand_on(module: nn.Module, args: tuple, output: Any, index: int = index) -> Any:
                tokens = first_tensor(output)
                assert tokens is not None
                if index in used:
                    is_read_at_tokens = mean and layout.pooler is None
                    states.append(tokens.mean(1, keepdim=True).expand_as(tokens) if is_read_at_tokens else tokens)
                is_last = index == len(layout.blocks) - 1
                return replace_first(output, torch.cat(states) if is_last else tokens.detach().requires_grad_())

            yield model.get_submodule(name).register_forward_hook(hand_on)
        if mean and layout.pooler is not None:

            def without_norm(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
                return (), inputs | dict.fromkeys(("key", "value"), torch.cat(states))

            pooler = model.get_submodule(layout.pooler)
            if not isinstance(pooler, nn.MultiheadAttention):
                raise ValueError(f"{classifier.name} has a pooler that upstream=True cannot serve; leave it out.")
            yield pooler.register_forward_pre_hook(without_norm, with_kwargs=True)

    with differentiable(pixel_values) as x:
        attended = attend(classifier, x, layout, hooks())
        logits = attended.logits
        if len(logits) != len(used) * len(pixel_values):
            raise ValueError(f"{classifier.name} treats the tokens of a batch as a whole; LeGrad cannot serve it.")
        read = [attended.maps[index] for index in used] if attended.pooled is None else [attended.pooled]
        slopes = torch.autograd.grad(class_evidence(logits, class_idx.repeat(len(used))), read)
    slope = torch.cat(slopes).float().relu().mean((1, 2))  # (layers * B, T)
    return slope.unflatten(0, (len(used), -1)).mean(0)[:, layout.prefix :]
