"""GradSHAP (Lundberg & Lee, arXiv 1705.07874; captum's GradientShap) from the zero (mean-pixel) image."""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ._captum import captum_attr, logits_of, patch_sums, seed_of, seeded
from ._gradients import differentiable


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    n_samples: int = 50,
    generator: torch.Generator | None = None,
    multiply_by_inputs: bool = False,
) -> Tensor:
    """Gradient of the class logit, averaged over random points between 0 and the image, summed over each patch.

    Args:
        n_samples: points, a pass and a backward pass each, all of an image in one batch; captum's default is 5.
        generator: draws the points, the same for all images of the batch; on the CPU, seeded with 0 if None.
        multiply_by_inputs: multiply by the pixels first; off, as in the TVE paper's comparison.

    Returns:
        Signed scores (B, rows, cols).

    Raises:
        ImportError: Without captum.
        ValueError: If the grid does not divide the image, or under inference mode.
    """
    method = captum_attr().GradientShap(logits_of(classifier), multiply_by_inputs=multiply_by_inputs)
    attributions, seed = [], seed_of(generator)
    with differentiable(pixel_values) as x:
        for image, index in zip(x.detach().split(1), class_idx.tolist(), strict=True):
            with seeded(seed):  # for each image, so that a batch gives what its images give alone
                slopes = method.attribute(image, torch.zeros_like(image), n_samples=n_samples, target=index)
            attributions.append(slopes.detach())
    return patch_sums(torch.cat(attributions), grid_size)
