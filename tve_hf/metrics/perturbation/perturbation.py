"""Positive and negative perturbation as an `evaluate` module: an adapter of `tve_hf.evaluation.Perturbation`."""

from typing import Any

import datasets
import evaluate
import torch

from tve_hf.evaluation import Perturbation

_DESCRIPTION = """
Area under the accuracy curve while 0 to 90 % of the patches are deleted, the most relevant first (positive; lower is
better) or the least relevant first (negative; higher is better). At most 0.9.
"""
_INPUTS = """
Args:
    positive: whether the prediction is right, 1 or 0, for each image at K shares evenly spaced from 0 to 0.9, when the
        most relevant patches go first.
    negative: the same when the least relevant go first.

Returns:
    positive_auc and negative_auc; positive_accuracy and negative_accuracy, the K points of each accuracy curve.
"""
_CITATION = """
@article{bousselham2024legrad,
  title = {LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity},
  journal = {arXiv preprint arXiv:2404.03214},
  year = {2024}
}
"""


class PerturbationMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        curve = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"positive": curve, "negative": curve}),
        )

    def _compute(self, positive: list[list[float]], negative: list[list[float]]) -> dict[str, Any]:
        lengths = {len(curve) for curve in (*positive, *negative)}
        if len(lengths) != 1 or min(lengths) < 2:
            raise ValueError(f"The curves have {sorted(lengths)} points; pass as many for each image, at least 2.")
        curves = Perturbation.from_correct(torch.tensor(positive), torch.tensor(negative))
        return {
            "positive_auc": curves.positive_auc.mean().item(),
            "negative_auc": curves.negative_auc.mean().item(),
            "positive_accuracy": curves.positive.mean(0).tolist(),
            "negative_accuracy": curves.negative.mean(0).tolist(),
        }
