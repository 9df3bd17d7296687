"""Sanity checks of a method: does its map hold still under noise, and move with the weights and the class?

A method is a callable (classifier, pixel_values, class_idx) -> scores (B, rows, cols), such as
`functools.partial(methods.explain, "grad_cam", grid_size=14)`.
"""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ..verification import spearman

Explain = Callable[[SplitClassifier, Tensor, Tensor], Tensor]


def _maps(explain: Explain, classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor) -> Tensor:
    """Maps as (B, N), checked: a NaN would pass as no correlation."""
    if len(pixel_values) == 0:
        raise ValueError("pixel_values holds no image; pass a batch of at least one.")
    scores = explain(classifier, pixel_values, class_idx).detach().flatten(1)
    if not torch.isfinite(scores).all():
        raise ValueError("The method's scores hold NaN or infinity, so its maps cannot be compared.")
    return scores


def sensitivity_max(
    explain: Explain,
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    radius: float = 0.02,
    num_samples: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the largest relative change of the map under small noise in the image, (B,); lower is better.

        max over noise d, |d| <= radius, of  || phi(x + d) - phi(x) || / || phi(x) ||

    Yeh et al., arXiv 1901.09392, with uniform noise. A map of zeros that stays one has not changed, 0; one that does
    not has changed infinitely. A constant map is insensitive too: read this with the other metrics.

    Args:
        explain: the method.
        pixel_values: (B, 3, H, W).
        class_idx: the class explained in each image, (B,), with and without noise.
        radius: of the noise in each pixel, in normalised space.
        num_samples: calls of the method on a batch, besides one without noise.
        generator: of the noise, on the CPU; seeded with 0 if None, so that the same call gives the same answer.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples} gives nothing to compare; pass at least 1.")
    generator = generator or torch.Generator().manual_seed(0)
    scores = _maps(explain, classifier, pixel_values, class_idx)
    largest = torch.zeros_like(scores[:, 0])
    for _ in range(num_samples):
        noise = radius * (2 * torch.rand(pixel_values.shape, generator=generator) - 1)
        noisy = _maps(explain, classifier, pixel_values + noise.to(pixel_values), class_idx)
        largest = torch.maximum(largest, (noisy - scores).norm(dim=1))
    return torch.where(largest == 0, 0, largest / scores.norm(dim=1))


def randomized(
    classifier: SplitClassifier, part: Literal["head", "backbone"], generator: torch.Generator | None = None
) -> SplitClassifier:
    """Return a copy of a classifier with the weights of one part drawn anew; the other part's stay.

    Every tensor of weights is redrawn from the normal distribution of its own mean and deviation, so that signals keep
    about their size in any architecture. Statistics of batch normalisation stay.

    Args:
        part: "head", H_t, or "backbone", G.
        generator: of the weights, on the CPU; seeded with 0 if None.

    Raises:
        ValueError: If there is no such part, or it has no weights.
    """
    if part not in ("head", "backbone"):
        raise ValueError(f"Unknown part {part!r}; choose head or backbone.")
    generator = generator or torch.Generator().manual_seed(0)
    classifier = copy.deepcopy(classifier)
    model = classifier.backbone.model
    heads = [model.get_submodule(name) for name in classifier.backbone.head_names]
    of_heads = {id(weight) for module in heads for weight in module.parameters()}
    # A head may hold its weights as buffers, as one made of text embeddings does.
    head = classifier.head
    weights: list[Tensor] = [*head.parameters()] or [b for b in head.buffers() if b.is_floating_point()]
    if part == "backbone":
        weights = [weight for weight in model.parameters() if id(weight) not in of_heads]
    if not weights:
        raise ValueError(
            f"The {part} of {classifier.name} is a function without weights of its own, so there is nothing to "
            "randomise; pass it as an nn.Module that holds them."
        )
    with torch.no_grad():
        for weight in weights:
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(weight.mean() + weight.std(correction=0) * drawn)
    return classifier


def randomization(
    explain: Explain,
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    part: Literal["head", "backbone"],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the rank correlation of the maps before and after a part's weights are drawn anew, (B,).

    Near 0 for a method that reads this part; 1 for one that does not look at it (Adebayo et al., arXiv 1810.03292).
    Head and backbone are checked by themselves, for a map may depend on one alone. To be passed, not to rank methods
    by. The classifier is left as it is: a copy is randomised. NaN where one of the maps is constant.

    Args:
        explain: the method.
        pixel_values: (B, 3, H, W).
        class_idx: the class explained in each image, (B,).
        part: "head", H_t, or "backbone", G.
        generator: of the weights, on the CPU; seeded with 0 if None.

    Raises:
        ValueError: If no part has this name, it has no weights, a map is not finite, or there is no image.
    """
    before = _maps(explain, classifier, pixel_values, class_idx)
    return spearman(before, _maps(explain, randomized(classifier, part, generator), pixel_values, class_idx))


def class_sensitivity(explain: Explain, classifier: SplitClassifier, pixel_values: Tensor) -> Tensor:
    """Return the rank correlation of the maps of the predicted class and of the runner-up, (B,).

    1 for a method whose map does not depend on the class that it is asked for; lower is better, as far as the two
    classes are not recognised by the same patches. NaN where one of the maps is constant.

    Args:
        explain: the method.
        pixel_values: (B, 3, H, W).

    Raises:
        ValueError: If the classifier has one class only, or there is no image.
    """
    if len(classifier.id2label) < 2:
        raise ValueError(f"{classifier.name} has one class, so there is no runner-up to compare with.")
    if len(pixel_values) == 0:
        raise ValueError("pixel_values holds no image; pass a batch of at least one.")
    with torch.no_grad():
        first, second = classifier(pixel_values).logits.topk(2).indices.unbind(1)
    return spearman(_maps(explain, classifier, pixel_values, first), _maps(explain, classifier, pixel_values, second))
