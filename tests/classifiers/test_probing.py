"""Noise of the size that a model takes, where no image processor says it."""

import pytest
import torch
from torch import Tensor, nn
from untouched import left_as_found

from tve_hf import exact_meta_attribution, split_classifier
from tve_hf.pretrain import config_for


class Embed(nn.Module):
    """Patches as timm embeds them: images of another size are an assert without a sentence."""

    def __init__(self, height: int, width: int, patch: int, tells: bool) -> None:
        super().__init__()
        self.size = (height, width)
        if tells:
            self.img_size = (height, width)
        self.conv = nn.Conv2d(3, 8, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        assert tuple(x.shape[-2:]) == self.size
        return self.conv(x).flatten(2).transpose(1, 2)


class Fixed(nn.Module):
    def __init__(self, height: int, width: int, patch: int = 8, tells: bool = True) -> None:
        super().__init__()
        self.patch_embed = Embed(height, width, patch, tells)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.patch_embed(pixel_values)
        for block in self.blocks:
            tokens = block(tokens).tanh()
        return self.head(tokens.mean(1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("height", "width", "patch", "tells"),
    [(64, 64, 8, True), (40, 64, 8, True), (40, 40, 8, False), (98, 98, 14, False), (96, 96, 4, False)],
)
def test_the_size_is_found_by_looking_at_the_model(randomized, height, width, patch, tells) -> None:
    model = randomized(Fixed(height, width, patch, tells)).eval()
    with left_as_found(model):
        classifier = split_classifier(model)
    assert classifier.probe().shape == (2, 3, height, width)
    x = classifier.probe()
    torch.testing.assert_close(classifier(x).logits, model(x))
    cells = (height // patch, width // patch)
    assert [feature.shape[2:] for feature in classifier(x).features] == [cells] * 3
    kept, _ = exact_meta_attribution(classifier.reading(()), x[:1], (2, 2), hops=1)
    torch.testing.assert_close(kept[:, 0], classifier.embed(x[:1]))  # every neighbourhood is the whole image


class UpTo(Fixed):
    """As a table of relative positions does, it refuses what is larger than it was made for, and nothing else."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        assert pixel_values.shape[-1] <= 64
        self.patch_embed.size = tuple(pixel_values.shape[-2:])
        return super().forward(pixel_values)


@pytest.mark.parametrize("model_class", [Fixed, UpTo])
def test_a_model_whose_size_cannot_be_told_is_refused_in_a_sentence(randomized, model_class) -> None:
    model = randomized(model_class(1001, 1001, tells=False)).eval()
    message = r" does not take pixel_values of shape \(2, 3, 224, 224\).*, and does not tell .*; pass image_processor="
    with left_as_found(model), pytest.raises(ValueError, match=message):
        split_classifier(model)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error"), KeyError("x")]
)
def test_no_size_is_looked_for_after_another_failure(randomized, error) -> None:
    model = randomized(Fixed(224, 224)).eval()
    passes: list[int] = []

    def fail(module: nn.Module, args: tuple) -> None:
        passes.append(1)
        raise error

    model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(type(error)) as caught:
        split_classifier(model)
    assert passes == [1]
    assert not getattr(caught.value, "__notes__", ())  # nothing is said of the image's size


def test_an_explainer_cannot_be_described_without_an_image_processor(randomized) -> None:
    classifier = split_classifier(randomized(Fixed(32, 32)).eval())
    with pytest.raises(ValueError, match=r"^Fixed came without an image processor, .*; pass split_classifier\("):
        config_for(classifier, 4, 1)
