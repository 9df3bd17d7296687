"""Integrated gradients (Sundararajan, Taly & Yan, arXiv 1703.01365), by captum, from the zero (mean-pixel) image."""

from torch import Tensor

from ..classifiers import SplitClassifier
from ._captum import captum_attr, logits_of, patch_sums
from ._gradients import differentiable


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    n_steps: int = 50,
    multiply_by_inputs: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Gradient of the class logit, averaged along the line from 0 to the image, summed over each patch.

    Args:
        n_steps: points on the line (Gauss-Legendre), a pass and a backward pass each.
        multiply_by_inputs: multiply by the pixels first, as in the paper: the scores then sum to the logit of the
            image less that of the zero image. Off, as in the TVE paper's comparison.
        chunk_size: images in one pass; as `SplitClassifier.images_per_pass` by default.

    Returns:
        Signed scores (B, rows, cols).

    Raises:
        ImportError: Without captum.
        ValueError: If the grid does not divide the image, or under inference mode.
    """
    method = captum_attr().IntegratedGradients(logits_of(classifier), multiply_by_inputs=multiply_by_inputs)
    per_pass = max(classifier.images_per_pass(pixel_values, chunk_size), len(pixel_values))
    with differentiable(pixel_values) as x:
        attributions = method.attribute(
            x, baselines=0, target=class_idx, n_steps=n_steps, internal_batch_size=per_pass
        )
    return patch_sums(attributions, grid_size)
