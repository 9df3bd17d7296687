"""Labels beside predictions: by number, by name, or not at all."""

import pytest
import torch

from tve_hf.benchmark.labels import is_correct

ID2LABEL = {0: "tabby, tabby cat", 1: "Crane", 2: "crane", 3: "sports car"}
PREDICTED = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 2, 3], None, [1, 0, 1]),
        ([7, -1, 3], None, [0, 0, 1]),
        (["tabby, tabby cat", "crane ", "CRANE"], None, [1, 1, 0]),  # two classes have this name, and either is right
        (["tabby, tabby cat", "crane", "dog"], None, None),
        ([0, 1, 1], ["sports car", "crane"], [0, 1, 0]),  # another numbering of the same names
        ([-1, 1, 0], ["sports car", "crane"], [0, 1, 1]),
        ([0, 1, 3], ["n01", "n02", "n03", "n04"], [1, 1, 1]),  # other names, one for each class: by number
        ([0, 1, 1], ["n01", "n02"], None),  # numbers of other classes
        ([0, None, 3], None, None),
        ([[0], [1], [3]], None, None),
    ],
)
def test_labels_by_hand(labels, names, expected):
    found = is_correct(PREDICTED, labels, ID2LABEL, names)
    assert (None if found is None else found.tolist()) == expected
