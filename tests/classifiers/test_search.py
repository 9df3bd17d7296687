"""What one pass tells: heads that are summed, maps among several outputs, and models that cannot be looked at."""

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTImageProcessor
from untouched import left_as_found

from tve_hf import split_classifier
from tve_hf.classifiers.search import differ
from tve_hf.pretrain.model import config_for


class Stages(nn.Module):
    """Logits are a softmax-weighted sum over eight heads, two for each of four stages."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        sides = [3, 4, 5, 6, 7]
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip(sides[:-1], sides[1:], strict=True)
        )
        self.heads = nn.ModuleList(nn.Linear(side, num_labels) for side in sides[1:] * 2)
        self.weights = nn.Parameter(torch.zeros(8))

    def forward(self, pixel_values: Tensor) -> Tensor:
        pooled = []
        for stage in self.stages:
            pixel_values = stage(pixel_values).tanh()
            pooled.append(pixel_values.mean((2, 3)))
        shares = [head(x) for head, x in zip(self.heads, pooled * 2, strict=True)]
        return (self.weights.softmax(0)[:, None, None] * torch.stack(shares)).sum(0)


@pytest.mark.parametrize(("num_labels", "passes"), [(1, 3), (2, 3), (4, 3), (5, 2), (20, 2)])
@torch.no_grad()
def test_eight_weighted_heads_are_told_apart_whatever_the_number_of_classes(
    randomized, processor_of, images, num_labels, passes
) -> None:
    model = randomized(Stages(num_labels)).eval()
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with left_as_found(model):
        classifier = split_classifier(model, processor_of(3, 32, 32))
    handle.remove()
    assert len(calls) == passes  # where two images give no more logits than heads, a third pass looks at more
    assert [part.name for part in classifier.backbone.parts] == [f"heads.{i}" for i in range(8)]
    found = torch.tensor([part.scale for part in classifier.backbone.parts])
    torch.testing.assert_close(found, model.weights.softmax(0), atol=1e-4, rtol=0)
    assert classifier.embedding_dim == 4 + 5 + 6 + 7  # both heads of a stage are given the same
    x = images(3, 32)
    torch.testing.assert_close(classifier.head(classifier.embed(x)), model(x), atol=1e-5, rtol=1e-5)


class Pooled(nn.Module):
    """Blocks, a last convolution that is none of them, its mean, and a head."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1, stride=2) for i in range(3))
        self.widen = nn.Conv2d(4, 6, 1)
        self.order = nn.Identity()
        self.head = nn.Linear(6, 5)
        self.channels_last = channels_last

    def forward(self, pixel_values: Tensor) -> Tensor:
        for block in self.blocks:
            pixel_values = block(pixel_values).tanh()
        wide = self.widen(pixel_values).tanh()
        seen = self.order(wide.movedim(1, -1) if self.channels_last else wide)
        return self.head(seen.mean((1, 2) if self.channels_last else (2, 3)))


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_the_map_that_the_head_reads_the_mean_of_is_among_the_features(randomized, images, channels_last) -> None:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    classifier = split_classifier(randomized(Pooled(channels_last)).eval(), processor)
    assert classifier.backbone.feature_names == ("blocks.0", "blocks.1", "blocks.2", "order")
    config = config_for(classifier, 4, 1)
    assert config.pooled_feature == "order" and config.feature_dims == [4, 4, 4, 6]
    out = classifier(images(2, 32))
    torch.testing.assert_close(out.features[-1].mean((2, 3)), out.embeddings)


class Tokens(nn.Module):
    """Blocks that give, like TNT's, the pixels of every patch first, and then the patches."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, pixels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
            return pixels, patches + self.fc(patches).tanh()

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, stride=8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.embed(pixel_values).flatten(2).transpose(1, 2)
        pixels = pixel_values.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).permute(0, 2, 3, 4, 1).flatten(0, 2)
        for block in self.blocks:
            pixels, patches = block(pixels, patches)  # (B N, 64, 3), which is 8 x 8 too, and (B, N, 8)
        return self.head(patches.mean(1))


@torch.no_grad()
def test_the_map_among_several_outputs_is_the_one_with_a_row_for_each_image(randomized, processor_of, images) -> None:
    model = randomized(Tokens()).eval()
    classifier = split_classifier(model, processor_of(3, 64, 64))
    assert classifier.backbone.feature_names == ("blocks.0", "blocks.1", "blocks.2")
    x = images(3, 64)
    first = model.embed(x)
    expected = first + model.blocks[0].fc(first.movedim(1, -1)).tanh().movedim(-1, 1)
    features = classifier(x).features
    assert [f.shape for f in features] == [(3, 8, 8, 8)] * 3
    torch.testing.assert_close(features[0], expected)


def test_a_model_that_asserts_another_size_raises_with_what_it_was_given(shared_model, processor_of) -> None:
    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = shared_model("cnn")

        def forward(self, pixel_values: Tensor) -> Tensor:
            assert pixel_values.shape[-1] == 32
            return self.inner(pixel_values)

    model = Asserting().eval()
    with left_as_found(model), pytest.raises(AssertionError) as caught:
        split_classifier(model, processor_of(3, 48, 48))
    (note,) = caught.value.__notes__
    assert "Asserting was given noise of shape (2, 3, 48, 48)" in note
    assert "image_processor=" in note


def test_a_model_that_says_it_has_no_classes_is_refused(shared_model, build) -> None:
    model = build("cnn")
    model.num_classes = 0
    with pytest.raises(ValueError, match=r"Cannot split TinyCNN: it has no head \(num_classes=0\)"):
        split_classifier(model)


@pytest.mark.parametrize(
    ("dtype", "share", "tolerance", "expected"),
    [
        (torch.float32, 5e-6, 1e-5, False),
        (torch.float32, 5e-5, 1e-5, True),
        (torch.float32, 5e-5, 1e-4, False),
        (torch.float64, 5e-5, 1e-5, True),
        (torch.bfloat16, 5e-3, 1e-5, False),
        (torch.bfloat16, 3e-2, 1e-4, True),
    ],
)
def test_results_differ_by_more_than_rounding_of_the_largest(dtype, share, tolerance, expected) -> None:
    theirs = torch.tensor([[-4.0, 1e-3]], dtype=dtype)
    ours = torch.tensor([[-4.0 * (1 + share), 1e-3]], dtype=dtype)
    assert differ(ours, theirs, tolerance) is expected
    assert differ(theirs * float("nan"), theirs, tolerance)
