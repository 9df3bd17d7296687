"""ViT-Shapley: Shapley values of all patches from one pass of an explainer of this classifier (arXiv 2206.05282)."""

import torch
from torch import Tensor

from ..attribution import of_class
from ..classifiers import SplitClassifier
from ..vit_shapley.coalitions import check_head
from ..vit_shapley.modeling import ShapleyExplainer
from ._fitting import fitted


@torch.no_grad()
def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    shapley_explainer: ShapleyExplainer,
) -> Tensor:
    """Predicted Shapley values in the game v(s) = f(s; y), one pass of the classifier and one of the explainer.

    They add up to f(x; y) - f(nothing; y). Where the explainer learnt from a surrogate, f(nothing; y) is that of the
    surrogate, which moves all patches of a map by the same amount.

    Args:
        shapley_explainer: trained for this classifier, head included.

    Returns:
        scores (B, rows, cols), differences of probability.

    Raises:
        ValueError: If the explainer has another grid, or was trained for another backbone or head.
    """
    reading = fitted(shapley_explainer, classifier, pixel_values, grid_size)
    check_head(shapley_explainer, classifier)
    seen = reading(pixel_values)
    values = shapley_explainer(
        pixel_values=pixel_values,
        features=seen.features,
        embeddings=seen.embeddings,
        probabilities=classifier.log_prob(seen.embeddings).exp(),
    ).shapley_values  # (B, N, C)
    return of_class(values, class_idx).unflatten(1, grid_size)
