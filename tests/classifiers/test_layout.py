"""Channels last: the same embeddings of models that can be laid out so, and no harm to those that cannot."""

import pytest
import torch
from tiny_models import NUM_LABELS, TinyCNN, randomize
from torch import nn

from tve_hf import split_classifier
from tve_hf.classifiers.layout import with_channels_last


class Flattened(TinyCNN):
    """Flattens its maps by `view`, as many a classifier does before its last layers: they have to be contiguous."""

    def forward(self, pixel_values):
        for stage in self.stages:
            pixel_values = stage(pixel_values)
        flat = pixel_values.view(len(pixel_values), -1)
        return self.fc(flat.view(*pixel_values.shape[:2], -1).mean(-1))


class InThreeDimensions(TinyCNN):
    """Holds a convolution whose weight has five dimensions, for which torch has no such layout."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv3d(1, 1, 1)

    def forward(self, pixel_values):
        return super().forward(self.last(pixel_values[:, None])[:, 0])


def layouts(classifier):
    """Whether each weight of a convolution that has more than one layout is channels last."""
    weights = [weight for weight in classifier.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    return {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}


@pytest.mark.parametrize(("model", "moved"), [(TinyCNN, True), (Flattened, False), (InThreeDimensions, False)])
def test_embeddings_stay_and_weights_are_laid_out_where_that_works(model, moved):
    classifier = split_classifier(randomize(model()).eval())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = classifier.embed(images)
    known = classifier.fingerprint(full=True)
    assert with_channels_last(classifier) is classifier
    assert layouts(classifier) == {moved}
    assert torch.allclose(classifier.embed(images), before, atol=1e-6)
    assert classifier.fingerprint(full=True) == known


def test_one_that_is_placed_by_its_device_map_is_left_alone():
    accelerate = pytest.importorskip("accelerate")
    model = randomize(TinyCNN()).eval()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    classifier = split_classifier(model)
    assert with_channels_last(classifier) is classifier
    assert layouts(classifier) == {False} and len(classifier.id2label) == NUM_LABELS
