"""LIME (Ribeiro, Singh & Guestrin, arXiv 1602.04938), by captum, with the linear model of the authors' code."""

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
    n_samples: int = 1000,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Coefficients of a ridge regression of f(S; y) on which patches are in S, weighted by closeness to the image.

    Each patch is kept with probability 1/2; closeness is exp(-d^2 / 2) with the cosine distance d of the pixels, as
    captum has it. captum's default is a Lasso whose penalty of 0.01 sets nearly all patches to 0 where the whole
    probability is shared among them; the authors' code has a ridge of penalty 1, which is used here.

    Args:
        n_samples: masked images, one pass each; the authors' code takes 1000, and the comparison in the TVE paper 25.
        generator: draws the masks, the same for all images of the batch; on the CPU, seeded with 0 if None.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.

    Returns:
        scores (B, rows, cols), in units of probability.

    Raises:
        ImportError: Without captum and scikit-learn.
        ValueError: If the grid does not divide the image.
    """
    attr = captum_attr()
    from captum._utils.models.linear_model import SkLearnRidge

    options = {"interpretable_model": SkLearnRidge(alpha=1.0)}
    return explain_images(
        attr.Lime, classifier, pixel_values, class_idx, grid_size, n_samples, generator, chunk_size, **options
    )
