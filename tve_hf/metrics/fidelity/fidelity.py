"""Fidelity+ and Fidelity- as an `evaluate` module: an adapter of `tve_hf.fidelity.Fidelity`."""

from typing import Any

import datasets
import evaluate
import torch

from tve_hf.fidelity import Fidelity

_DESCRIPTION = """
Fidelity of an explanation: what a class loses without the most important patches S*, and with them alone.

    Fidelity+ = f(Z; y) - f(Z \\ S*; y)        Fidelity- = f(Z; y) - f(S*; y)

Each is averaged over the sparsity of S* in [0, 1], by the trapezoidal rule.
"""
_INPUTS = """
Args:
    full: f(Z; y), the class's probability for each whole image.
    kept: f(S*; y) of each image at K evenly spaced sparsities, from all patches to none.
    removed: f(Z \\ S*; y) at the same sparsities.

Returns:
    plus_auc (higher is better), minus_auc (lower is better) and gap, their difference: means over the images; and
    plus_auc_std, minus_auc_std and gap_std, standard deviations over the images (NaN of one image).
"""
_CITATION = """
@article{wang2023transferable,
  title = {Learning Meta-attribution for Transferable Vision Explainer},
  journal = {arXiv preprint arXiv:2312.15359},
  year = {2023}
}
"""


class FidelityMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float32")
        features = {"full": number, "kept": datasets.Sequence(number), "removed": datasets.Sequence(number)}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, full: list[float], kept: list[list[float]], removed: list[list[float]]) -> dict[str, Any]:
        lengths = {len(curve) for curve in (*kept, *removed)}
        if len(lengths) != 1 or min(lengths) < 2:
            raise ValueError(f"The curves have {sorted(lengths)} points; pass as many for each image, at least 2.")
        curves = Fidelity.from_probabilities(torch.tensor(full), torch.tensor(kept), torch.tensor(removed))
        areas = {"plus_auc": curves.plus_auc, "minus_auc": curves.minus_auc, "gap": curves.gap}
        return {name: values.mean().item() for name, values in areas.items()} | {
            f"{name}_std": values.std().item() if len(values) > 1 else float("nan") for name, values in areas.items()
        }
