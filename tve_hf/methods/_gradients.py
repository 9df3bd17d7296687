"""What every method that differentiates the classifier needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def check_differentiable() -> None:
    """Raise ValueError under `torch.inference_mode()`, which nothing can lift."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "This method differentiates the classifier, which torch.inference_mode() rules out; use torch.no_grad()."
        )


@contextmanager
def differentiable(pixel_values: Tensor) -> Iterator[Tensor]:
    """Record gradients inside the block, also under `torch.no_grad()`, with respect to the copy that it yields.

    Raises:
        ValueError: Under `torch.inference_mode()`.
    """
    check_differentiable()
    with torch.enable_grad():
        yield pixel_values.detach().clone().requires_grad_()


def class_evidence(logits: Tensor, class_idx: Tensor) -> Tensor:
    """The logit of each image's class, summed over images: each image's gradient is that of its own logit."""
    return logits.gather(1, class_idx.unsqueeze(1)).sum()
