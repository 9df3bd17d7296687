"""A pass of the backbone: layouts of maps are known from the split, and maps are held only where they are read."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tve_hf import split_classifier
from tve_hf.classifiers import parts


@torch.no_grad()
def test_no_pass_looks_for_layouts_whatever_the_size(shared_model, images, specs, monkeypatch) -> None:
    classifiers = {
        name: split_classifier(shared_model(name)) for name in ("vit", "dinov2_with_registers", "swin", "cnn")
    }

    def refuse(*args: object) -> None:
        raise AssertionError("looked for a layout")

    monkeypatch.setattr(parts, "find_layout", refuse)
    for name, classifier in classifiers.items():
        side = specs[name].side if name in specs else 32
        classifier(images(2, side))
        if name != "vit":  # which takes images of one size alone
            classifier(images(1, 2 * side, 3 * side))
    (feature,) = classifiers["vit"].reading(("vit.layers.0",))(images(2, 32)).features
    model = shared_model("vit")
    tokens = model.vit.layers[0](model.vit.embeddings(images(2, 32)))
    torch.testing.assert_close(feature, tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))


@torch.no_grad()
def test_a_map_that_only_larger_images_have_is_read_there(shared_model, images, processor_of) -> None:
    model = shared_model("cnn")
    classifier = split_classifier(model, processor_of(3, 8, 8)).reading(("stages.2",))  # of 1 x 1 cells
    assert "stages.2" not in classifier.backbone.layouts
    with pytest.raises(ValueError, match=r"'stages.2' gives no embedding or feature map of images of \(8, 8\)"):
        classifier(images(1, 8))
    (feature,) = classifier(images(1, 32)).features
    expected = images(1, 32)
    for stage in model.stages:
        expected = stage(expected)
    assert torch.equal(feature, expected)


class Padded(nn.Module):
    """Patches of 16 pixels of an image that is padded to whole ones, and a token before them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, stride=16)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def cells(self, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[-2:]
        return self.patches(F.pad(pixel_values, (0, -width % 16, 0, -height % 16)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.cells(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens).tanh()
        return self.head(tokens.mean(1))


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(33, 64), (64, 33), (48, 50), (100, 30)])
def test_tokens_before_the_patches_are_as_many_as_the_split_saw(
    randomized, processor_of, images, height, width
) -> None:
    model = randomized(Padded()).eval()
    classifier = split_classifier(model, processor_of(3, 64, 64))
    pixel_values = images(2, height, width)
    feature = classifier(pixel_values).features[0]
    cells = model.cells(pixel_values)
    assert feature.shape == cells.shape
    for row, column in itertools.product(range(cells.shape[2]), range(cells.shape[3])):
        torch.testing.assert_close(feature[..., row, column], model.blocks[0](cells[..., row, column]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_maps_are_held_only_where_they_are_read(build, images, name) -> None:
    model = build(name)
    classifier = split_classifier(model)
    hooks: list[int] = []
    for module in classifier.backbone.feature_names:
        model.get_submodule(module).register_forward_pre_hook(lambda m, _: hooks.append(len(m._forward_hooks)))
    pixel_values = images(2, 32)
    embeddings = classifier(pixel_values).embeddings
    assert hooks == [1, 1, 1]
    hooks.clear()
    torch.testing.assert_close(classifier.embed(pixel_values), embeddings)
    keep = torch.ones(2, 3, 16, dtype=torch.bool)
    for removal in ("zero", "token_drop") if name == "vit" else ("zero",):
        masked = classifier.embed_masked(pixel_values, keep, 4, removal)
        if removal == "token_drop":  # the first time it watches all modules, to find where tokens start
            hooks.clear()
            masked = classifier.embed_masked(pixel_values, keep, 4, removal)
        torch.testing.assert_close(masked, embeddings.unsqueeze(1).expand(-1, 3, -1), rtol=1e-4, atol=1e-5)
    assert set(hooks) == {0}
