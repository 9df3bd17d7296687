"""What an explanation computes beside one pass, against multiples of passes and of products."""

import pytest
import torch

from tve_hf import split_classifier
from tve_hf.benchmark.cost import own_share


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_own_share_is_in_passes_of_the_classifier(shared_model, name):
    classifier = split_classifier(shared_model(name))

    def explain(passes, rows):
        def run(pixel_values):
            for _ in range(passes):
                classifier(pixel_values)
            torch.ones(rows, 20) @ torch.ones(20, 30)

        return own_share(classifier, run)

    assert explain(1, 0) == 0
    assert explain(3, 0) == 2
    assert explain(1, 12) == pytest.approx(3 * explain(1, 4)) and explain(1, 4) > 0
