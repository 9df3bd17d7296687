"""Pixel accuracy, mIoU, mAP and the pointing game as an `evaluate` module: an adapter of `localization`."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from tve_hf.evaluation import Localization, localization

_DESCRIPTION = """
How well maps lie on masks of the object. Maps are min-max normalised, resized bilinearly to the mask and binarised at
0.5. Plausibility, not faithfulness: a classifier may look at what is not the object.
"""
_INPUTS = """
Args:
    predictions: a map for each image, (rows, cols), of any size up to the mask's.
    references: a mask for each, (H, W), 1 on the object and 0 elsewhere; images may differ in size.

Returns:
    pixel_accuracy and pointing (means over images), mean_iou (pixels summed over images, then the mean of background
    and object) and mean_average_precision (mean over images of the AP of all 2 H W scores, m of each pixel for the
    object and 1 - m for the background).
"""
_CITATION = """
@article{bousselham2024legrad,
  title = {LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity},
  journal = {arXiv preprint arXiv:2404.03214},
  year = {2024}
}
"""


class SegmentationMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        def rows(dtype: str) -> datasets.Sequence:
            return datasets.Sequence(datasets.Sequence(datasets.Value(dtype)))

        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rows("float32"), "references": rows("uint8")}),
        )

    def _compute(self, predictions: list[list[list[float]]], references: list[list[list[int]]]) -> dict[str, Any]:
        each: list[Localization] = []
        for scores, reference in zip(predictions, references, strict=True):
            mask = torch.from_numpy(np.array(reference, np.uint8))
            if mask.max() > 1:
                raise ValueError(f"A mask holds {int(mask.max())}; pass 1 on the object and 0 elsewhere.")
            each.append(localization(torch.tensor([scores]), mask.bool().unsqueeze(0)))
        whole = Localization(*(torch.cat(parts) for parts in zip(*(vars(one).values() for one in each), strict=True)))
        return {
            "pixel_accuracy": whole.pixel_accuracy.mean().item(),
            "mean_iou": whole.mean_iou.item(),
            "mean_average_precision": whole.mean_average_precision.item(),
            "pointing": whole.pointing.mean().item(),
        }
