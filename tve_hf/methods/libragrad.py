"""LibraGrad: FullGrad+ by balanced gradients (Mehri et al., CVPR 2025, arXiv 2411.16760).

Written from the paper; what its equations leave open is as in the authors' code (NightMachinery/decompv-libragrad-v1
and NightMachinery/pytorch-image-models-libragrad-v1). Of the methods that the paper puts on balanced gradients, this
is the one that it recommends.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..classifiers import SplitClassifier
from ..classifiers.tracing import first_tensor
from ._attention import attend, find_layout
from ._balanced import Balanced, frozen
from ._gradients import class_evidence, differentiable

# Largest difference between the contributions' sum and the output, as a share of the latter, and in roundings of all
# that is added up.
TOLERANCE, ROUNDINGS = 0.01, 1000


def explain(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Sum over blocks l of x_l * dy/dx_l and over biases b of b * dy/db, summed over channels, at each patch token.

    x_l are the tokens before block l, y is the class logit, and gradients are those of `_balanced`. A bias counts at
    every token that it is added to; what is added after the tokens are pooled, as the head's bias, belongs to no
    patch, as does what the class token contributes.

    Departs from the authors' code, which explains the softmax's probability of a class of ImageNet and the logit of
    CLIP: here it is always the logit, as in the other methods.

    Returns:
        Signed scores (B, rows, cols).

    Raises:
        ValueError: If the classifier has no attention over all tokens in every block, contributions do not sum to the
            output, since it computes what no rule is for, or under inference mode.
    """
    layout = find_layout(classifier, pixel_values)
    model = classifier.backbone.model
    balanced = Balanced()
    tokens: list[Tensor] = []

    def hooks() -> Iterator[Any]:
        for index, name in enumerate(layout.blocks):

            def keep_input(module: nn.Module, args: tuple, kwargs: dict, index: int = index) -> None:
                given = first_tensor((*args, *kwargs.values()))
                assert given is not None
                tokens.append(given)
                if index == 0:
                    balanced.constants.clear()  # what is added before is a part of these tokens

            yield model.get_submodule(name).register_forward_pre_hook(keep_input, with_kwargs=True)

    with differentiable(pixel_values) as x, frozen(classifier):
        with balanced:
            embeddings = attend(classifier, x, layout, hooks()).embeddings
            constants = list(balanced.constants)  # without the head's
            logits = classifier.head(embeddings)
        parts = [(embeddings, embeddings), *((given, given) for given in tokens), *constants]
        evidence = class_evidence(logits, class_idx)
        slopes = torch.autograd.grad(evidence, [at for at, _ in parts], allow_unused=True)
    output, *shares = (
        (value.detach().float() * slope.float()).sum(-1)  # over channels
        for (_, value), slope in zip(parts, slopes, strict=True)
        if slope is not None  # as that of queries and keys
    )
    _check(classifier.name, [shares[0], *shares[len(tokens) :]], output, embeddings.dtype)
    at_tokens = [share for share in shares if share.shape == shares[0].shape]  # (B, T)
    return layout.on_grid(torch.stack(at_tokens).sum(0), grid_size)


def _check(name: str, shares: list[Tensor], output: Tensor, dtype: torch.dtype) -> None:
    """Check that the contributions to each image's output, (B, ...) each, sum to it, (B,), as in Definition 1."""
    rows = torch.cat([share.reshape(len(output), -1) for share in shares if len(share) == len(output)], 1)
    residual, eps = (rows.sum(1) - output).abs(), max(torch.finfo(dtype).eps, torch.finfo(rows.dtype).eps)
    if (residual > TOLERANCE * output.abs() + ROUNDINGS * eps * rows.abs().sum(1)).any():
        worst = (residual / output.abs()).max().item()
        raise ValueError(
            f"LibraGrad's contributions miss the output of {name} by {worst:.0%}: it computes what LibraGrad has no "
            "rule for, such as another activation than ReLU, GELU and SiLU; use another method, such as chefer_cam."
        )
