"""Red supports the class: where a classifier is known, from its attribution to the colours of the picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tve_hf import methods, sampled_meta_attribution, split_classifier, transfer
from tve_hf.visualization import Explanation, Photograph

WEIGHTS = torch.tensor([[0.0, 2.0, 0.0, -1.5], [0.0, 1.0, 0.0, 0.0], [-2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.5]])


class Weighing(nn.Module):
    """Class 1 is for what is bright on some patches, and against what is bright on others."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Parameter(WEIGHTS.repeat_interleave(4, 0).repeat_interleave(4, 1) / 16)
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight.data = torch.tensor([[0.0], [1.0]])

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head((pixel_values[:, 0] * self.pixels).sum((1, 2)).unsqueeze(1))


def drop(model: nn.Module, row: int, col: int) -> float:
    """How much the probability falls when a patch is taken out of an image of ones, by hand."""
    image = torch.ones(1, 3, 16, 16)
    without = image.clone()
    without[:, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = 0
    with torch.no_grad():
        return (model(image).softmax(-1) - model(without).softmax(-1))[0, 1].item()


@pytest.mark.parametrize("name", ["sampled", "occlusion"])
def test_taking_out_a_red_patch_lowers_the_class_and_a_blue_one_raises_it(processor_of, name):
    model = Weighing().eval()
    classifier = split_classifier(model, processor_of(3, 16, 16))
    pixel_values, class_idx = torch.ones(1, 3, 16, 16), torch.tensor([1])
    if name == "sampled":
        generator = torch.Generator().manual_seed(0)
        kept, removed = sampled_meta_attribution(classifier, pixel_values, 4, 400, generator=generator)
        scores = transfer(kept, removed, classifier, class_idx, rule="prob").view(4, 4)
    else:
        scores = methods.explain(name, classifier, pixel_values, class_idx, 4)[0]
    photograph = Photograph(Image.new("RGB", (160, 160), (128, 128, 128)))
    found = Explanation({"label": "1", "score": 0.5, "attribution": scores.detach().numpy()}, photograph)
    middles = np.asarray(found["overlay"]).astype(int)[20::40, 20::40]
    heat = found["heatmap"][20::40, 20::40]
    for row, col in np.ndindex(4, 4):
        fall = drop(model, row, col)
        red_less_blue = middles[row, col, 0] - middles[row, col, 2]
        if abs(fall) > 0.01:
            assert np.sign(heat[row, col] - 0.5) == np.sign(red_less_blue) == np.sign(fall)
        else:
            assert abs(heat[row, col] - 0.5) < 0.1 and abs(red_less_blue) < 20
