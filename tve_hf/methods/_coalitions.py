"""LIME and KernelSHAP by captum: a linear model of the class's probability over which patches are kept."""

from typing import Any

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from . import not_finite
from ._captum import patch_numbers, seed_of, seeded


@torch.no_grad()
def explain_images(
    attribution: type,
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    n_samples: int,
    generator: torch.Generator | None,
    chunk_size: int | None,
    **options: Any,
) -> Tensor:
    """Run a method of captum image by image, which is how it works; the coefficients as scores (B, rows, cols)."""
    numbers = patch_numbers(pixel_values, grid_size)
    seed = seed_of(generator)
    scores = []
    for image, index in zip(pixel_values, class_idx.tolist(), strict=True):

        def prob(masked: Tensor, index: int = index) -> Tensor:
            values = classifier.log_prob(classifier.embed(masked))[:, index].exp()
            if not torch.isfinite(values).all():  # of which scikit-learn would speak without saying whose they are
                raise not_finite(attribution.__name__, classifier)
            return values

        with seeded(seed):  # for each image, so that a batch gives what its images give alone
            coefficients = attribution(prob, **options).attribute(
                image.unsqueeze(0),
                baselines=0,
                feature_mask=numbers,
                n_samples=n_samples,
                perturbations_per_eval=classifier.images_per_pass(pixel_values, chunk_size),
                return_input_shape=False,
            )
        scores.append(coefficients.reshape(grid_size).float())
    return torch.stack(scores).to(pixel_values.device)
