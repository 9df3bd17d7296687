"""Saliency (Simonyan, Vedaldi & Zisserman, arXiv 1312.6034), by captum: the size of the gradient."""

from torch import Tensor

from ..classifiers import SplitClassifier
from ._captum import captum_attr, logits_of, patch_sums
from ._gradients import differentiable


def explain(
    classifier: SplitClassifier, pixel_values: Tensor, class_idx: Tensor, grid_size: tuple[int, int]
) -> Tensor:
    """Sum over a patch's pixels and channels of |gradient of the class logit|.

    Returns:
        scores (B, rows, cols), at least 0.

    Raises:
        ImportError: Without captum.
        ValueError: If the grid does not divide the image, or under inference mode.
    """
    method = captum_attr().Saliency(logits_of(classifier))
    with differentiable(pixel_values) as x:
        return patch_sums(method.attribute(x, target=class_idx, abs=True), grid_size)
