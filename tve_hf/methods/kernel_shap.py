"""KernelSHAP (Lundberg & Lee, arXiv 1705.07874), by captum: Shapley values of patches by weighted regression."""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._captum import captum_attr
from ._coalitions import explain_images


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    n_samples: int = 400,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Coefficients of a regression of f(S; y) on which patches are in S, sampled by the Shapley kernel.

    Args:
        n_samples: masked images, one pass each. With fewer than N + 1 for N patches the regression is
            under-determined and the map mostly noise; captum's default, and the TVE paper's, is 25.
        generator: draws the coalitions, the same for all images of the batch; on the CPU, seeded with 0 if None.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.

    Returns:
        scores (B, rows, cols): differences of probability, whose sum is f(Z; y) - f(nothing; y).

    Raises:
        ImportError: Without captum and scikit-learn.
        ValueError: If the grid does not divide the image.
    """
    attribution = captum_attr().KernelShap
    return explain_images(
        attribution, classifier, pixel_values, class_idx, grid_size, n_samples, generator, chunk_size
    )
