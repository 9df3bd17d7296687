"""TVE: one pass of a pre-trained explainer, then transfer by the classifier's head (arXiv 2312.15359, Eq. 10)."""

import torch
from torch import Tensor

from ..attribution import check_rule, rule_of
from ..classifiers import SplitClassifier
from ..folding import explain_pass
from ..modeling_tve import TVEExplainer
from ..refinement import Refinement
from ._fitting import fitted


@torch.no_grad()
def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    explainer: TVEExplainer,
    rule: str | None = None,
    refine: int = 0,
) -> Tensor:
    """Scores of the explainer, on its own grid.

    Args:
        explainer: pre-trained for the classifier's backbone; it reads the feature maps that its config names.
        rule: how embeddings become scores, a key of `attribution.RULES`; by default the explainer's own.
        refine: masked passes of the classifier that correct the map, for explainers of random backgrounds.

    Returns:
        Signed scores (B, rows, cols), in the units of the rule.

    Raises:
        ValueError: If the explainer has another grid, was pre-trained for another backbone, or is not of the rule's
            kind.
    """
    if rule is not None:
        check_rule(explainer.config, rule)
    seen = fitted(explainer, classifier, pixel_values, grid_size)(pixel_values)
    rule = rule or rule_of(explainer.config)
    scores = explain_pass(explainer, classifier, pixel_values, seen, class_idx, rule)
    if refine:
        predicted = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
        refinement = Refinement(classifier, pixel_values, predicted.kept, predicted.removed, explainer.config, refine)
        scores = scores + refinement.correction(classifier, class_idx, rule).unflatten(-1, grid_size)
    return scores
