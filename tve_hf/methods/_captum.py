"""What the methods of captum (BSD-3 licence; extra `tve_hf[methods]`) share here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ..patches import patch_means


def captum_attr() -> ModuleType:
    """Import captum when a method needs it.

    Raises:
        ImportError: If it, or scikit-learn, is not installed.
    """
    try:
        import_module("sklearn")  # which captum's regressions need, and do not install
        return import_module("captum.attr")
    except ImportError as error:
        raise ImportError("This method is captum's: pip install 'tve_hf[methods]'.") from error


def logits_of(classifier: SplitClassifier) -> Callable[[Tensor], Tensor]:
    """The classifier as captum's gradient methods take it: images (n, 3, H, W) to logits (n, C)."""

    def forward(pixel_values: Tensor) -> Tensor:
        return classifier(pixel_values).logits

    return forward


def patch_sums(attributions: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Sum attributions over channels and the pixels of each patch, (B, C, H, W) -> (B, rows, cols) float32."""
    pixels_of_patch = attributions.shape[-2] * attributions.shape[-1] / (grid_size[0] * grid_size[1])
    return patch_means(attributions.detach().float().sum(1), grid_size) * pixels_of_patch


def patch_numbers(pixel_values: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Number each pixel by its patch, row by row: captum's feature mask, (1, 1, H, W).

    Raises:
        ValueError: If the grid does not divide the image.
    """
    patch_means(pixel_values[:1], grid_size)  # refuses the grid
    rows, columns = (
        torch.arange(size, device=pixel_values.device) // (size // count)
        for size, count in zip(pixel_values.shape[-2:], grid_size, strict=True)
    )
    return (rows.unsqueeze(1) * grid_size[1] + columns).view(1, 1, *pixel_values.shape[-2:])


def seed_of(generator: torch.Generator | None) -> int:
    """Draw a seed for captum, which takes no generator, from one on the CPU; seeded with 0 if None."""
    generator = generator or torch.Generator().manual_seed(0)
    return int(torch.randint(2**32, (), generator=generator))  # the largest that numpy takes


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, from which alone captum draws, and put them back after the block."""
    before = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)
