"""Grids, sizes, padding and rows of patches, from the processor to the map, against loops over patches."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_explainer
from torch import Tensor, nn
from transformers import (
    DetrImageProcessorPil,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2ImageProcessorPil,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import tve_hf
from tve_hf import exact_meta_attribution, fidelity, methods, split_classifier, transfer, verify
from tve_hf.compatibility import fit
from tve_hf.pretrain import config_for

VIT = {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


# --- the default grid -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("vit", (4, 4)),
        ("deit", (4, 4)),  # two prefix tokens
        ("dinov2_with_registers", (4, 4)),  # five
        ("swin", (16, 16)),  # maps that shrink: from the 64 pixels of the image
        ("convnext", (16, 16)),
        ("mobilenet_v2", (16, 16)),
    ],
)
def test_the_default_is_the_grid_of_the_patch_tokens_or_divides_the_image(shared_model, name, grid) -> None:
    assert split_classifier(shared_model(name)).default_grid() == grid


@pytest.mark.parametrize(("size", "patch", "grid"), [((16, 40), 8, (2, 5)), (64, 2, (16, 16)), (40, 8, (5, 5))])
def test_the_default_grid_of_a_vit(randomized, size, patch, grid) -> None:
    config = ViTConfig(image_size=size, num_labels=5, **(VIT | {"patch_size": patch}))
    assert split_classifier(randomized(ViTForImageClassification(config)).eval()).default_grid() == grid


@pytest.mark.parametrize(("height", "width", "grid"), [(160, 160, (16, 16)), (384, 384, (12, 12)), (96, 224, (6, 14))])
@torch.no_grad()
def test_exact_attribution_of_sizes_that_14_does_not_divide(shared_model, images, height, width, grid) -> None:
    classifier = split_classifier(shared_model("cnn"))
    pixel_values, patch_idx = images(2, height, width), torch.tensor([[0, 20], [7, 33]])
    assert classifier.default_grid(pixel_values) == grid
    found = exact_meta_attribution(classifier, pixel_values, patch_idx=patch_idx)
    expected = exact_meta_attribution(classifier, pixel_values, grid, patch_idx=patch_idx)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_methods_use_the_default_grid_or_the_explainers(shared_model, images) -> None:
    classifier = split_classifier(shared_model("vit"), ViTImageProcessorPil(size={"height": 32, "width": 32}))
    class_idx = torch.tensor([1, 2])
    for name in ("exact", "rollout", "random"):
        assert methods.explain(name, classifier, images(2, 32), class_idx).shape == (2, 4, 4)
    config = config_for(classifier, (2, 4), 1, hidden_size=16, num_attention_heads=2)
    assert config.grid_size == [2, 4]
    explainer = tve_hf.TVEExplainer(config).eval()
    assert methods.explain("tve", classifier, images(2, 32), class_idx, explainer=explainer).shape == (2, 2, 4)
    assert config_for(classifier, None, 1, hidden_size=16, num_attention_heads=2).grid_size == 4


def test_verify_derives_a_square_grid(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    kept, removed = exact_meta_attribution(classifier, images(1, 32), 4, 1)
    (found,) = verify(classifier, images(1, 32), kept, removed, torch.tensor([1]), 16, hops=1)
    assert found.kept_error == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="15 patches do not fill a grid of 4 x 4; pass grid_size"):
        verify(classifier, images(1, 32), kept[:, :15], removed[:, :15], torch.tensor([1]))


def test_an_option_that_a_method_does_not_take_is_named(shared_model, images) -> None:
    classifier = split_classifier(shared_model("vit"))
    with pytest.raises(TypeError, match="rollout takes no 'spatial_shapes', nor any other option"):
        methods.explain("rollout", classifier, images(1, 32), torch.tensor([0]), 4, spatial_shapes=torch.ones(1, 2))


# --- other sizes ----------------------------------------------------------------------------------------------------


class Interpolating(nn.Module):
    """A ViT that is told to stretch its position embeddings to the size of the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values, interpolate_pos_encoding=True).logits


@torch.no_grad()
def test_a_vit_fed_with_another_size_is_refused_or_interpolates(build, images) -> None:
    model, processor = build("vit"), ViTImageProcessorPil(size={"height": 48, "width": 80})
    with pytest.raises(
        ValueError,
        match=r"does not take.*\(2, 3, 48, 80\).*size of its image proc.*pass interpolate_pos_encoding=True",
    ):
        split_classifier(model, processor)
    classifier = split_classifier(Interpolating(model).eval(), processor)
    assert classifier.default_grid() == (6, 10)
    pixel_values = images(2, 48, 80)
    out = classifier(pixel_values)
    assert torch.equal(out.logits, model(pixel_values, interpolate_pos_encoding=True).logits)
    assert [tuple(feature.shape) for feature in out.features] == [(2, 32, 6, 10)] * 3
    assert classifier.id2label == model.config.id2label


def test_an_explainer_of_another_size_of_the_same_model_is_refused(shared_model) -> None:
    model = shared_model("dinov2")  # always interpolates
    small, large = (
        split_classifier(model, ViTImageProcessorPil(size={"height": side, "width": side})) for side in (32, 48)
    )
    assert (small.default_grid(), large.default_grid()) == ((4, 4), (6, 6))
    explainer = make_explainer(small)
    fit(explainer, small)
    with pytest.raises(ValueError, match=r"made for images of \(32, 32\) pixels, but .* takes \(48, 48\)"):
        fit(explainer, large)


@torch.no_grad()
@pytest.mark.parametrize(
    ("height", "width", "shapes"),
    [(60, 60, [(8, 8), (4, 4), (4, 4), (4, 4)]), (52, 104, [(7, 13), (4, 7), (4, 7), (4, 7)])],
)
def test_windows_that_do_not_divide_the_image_are_padded(images, randomized, height, width, shapes) -> None:
    values = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1], "window_size": 4, "patch_size": 4}
    model = randomized(SwinForImageClassification(SwinConfig(image_size=64, num_labels=5, **values))).eval()
    classifier = split_classifier(model, ViTImageProcessorPil(size={"height": height, "width": width}))
    pixel_values = images(2, height, width)
    out = classifier(pixel_values)
    assert torch.equal(out.logits, model(pixel_values).logits)
    # halved behind each stage but the last, and rounded up
    assert [tuple(feature.shape[2:]) for feature in out.features] == shapes
    rows, columns = classifier.default_grid()
    assert height % rows == 0 and width % columns == 0
    assert height // rows == width // columns


# --- one pass -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_pass_runs_the_head_once_and_gives_the_models_own_logits(
    shared_model, images, specs, architecture
) -> None:
    model = shared_model(architecture)
    classifier = split_classifier(model)
    calls = []
    handle = classifier.head.heads[0].register_forward_hook(lambda *_: calls.append(1))
    pixel_values = images(2, specs[architecture].side)
    logits = classifier(pixel_values).logits
    assert len(calls) == 1
    handle.remove()
    assert torch.equal(logits, model(pixel_values).logits)


@torch.no_grad()
def test_the_models_logits_are_not_those_of_another_head(build, images) -> None:
    classifier, other = split_classifier(build("vit")), split_classifier(build("vit"))
    other.head.module.weight.neg_()
    pixel_values = images(2, 32)
    embeddings = classifier.embed(pixel_values)
    borrowed = classifier.with_head(other.head)
    assert torch.equal(borrowed(pixel_values).logits, other.head(embeddings))
    assert not torch.equal(borrowed(pixel_values).logits, classifier(pixel_values).logits)
    old = classifier.head
    classifier.backbone.model.classifier = nn.Linear(32, 3)  # behind the classifier's back
    assert torch.equal(classifier(pixel_values).logits, old(embeddings))


# --- rows of patches ------------------------------------------------------------------------------------------------

PATCH = 4


@pytest.fixture(scope="module")
def naflex(randomized) -> SimpleNamespace:
    """A classifier of images in rows of patches, its processor, and a batch of two images of 3 x 5 patches."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Siglip2Config(vision_config=vision | {"patch_size": PATCH, "num_patches": 16}, num_labels=5)
    model = randomized(Siglip2ForImageClassification(config)).eval()
    processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=18)
    noise = np.random.default_rng(0).integers(0, 256, (2, 30, 50, 3), np.uint8)
    inputs = dict(processor([Image.fromarray(image) for image in noise], return_tensors="pt"))
    assert inputs["spatial_shapes"].tolist() == [[3, 5], [3, 5]]
    assert inputs["pixel_values"].shape == (2, 18, 3 * PATCH**2)
    return SimpleNamespace(classifier=split_classifier(model, processor), processor=processor, inputs=inputs)


def _states(inputs: dict[str, Tensor], image: int, patch: int, hops: int) -> tuple[Tensor, Tensor]:
    """One image with only a neighbourhood kept, and with only it removed, patch by patch."""
    row, column = divmod(patch, 5)
    kept, removed = inputs["pixel_values"][image].clone(), inputs["pixel_values"][image].clone()
    for r, c in itertools.product(range(3), range(5)):
        near = max(abs(r - row), abs(c - column)) <= hops
        (removed if near else kept)[r * 5 + c] = 0
    return kept, removed


@torch.no_grad()
def test_exact_attribution_of_rows_of_patches_equals_a_loop(naflex) -> None:
    classifier, inputs = naflex.classifier, naflex.inputs
    model = classifier.backbone.model
    class_idx = torch.tensor([1, 3])
    expected = torch.zeros(2, 15)
    for b, patch in itertools.product(range(2), range(15)):
        states = torch.stack(_states(inputs, b, patch, 1))
        others = {
            name: value[b].expand(2, *value[b].shape) for name, value in inputs.items() if name != "pixel_values"
        }
        logits = model(states, **others).logits.log_softmax(-1)[:, class_idx[b]]
        expected[b, patch] = logits[0] - logits[1]
    assert expected.std() > 0.01
    kept, removed = exact_meta_attribution(classifier, hops=1, chunk_size=7, **inputs)
    torch.testing.assert_close(
        transfer(kept, removed, classifier, class_idx, "log_prob"), expected, rtol=1e-4, atol=1e-5
    )
    pixel_values = inputs["pixel_values"]
    others = {name: value for name, value in inputs.items() if name != "pixel_values"}
    scores = methods.explain("exact", classifier, pixel_values, class_idx, hops=1, rule="log_prob", **others)
    torch.testing.assert_close(scores, expected.view(2, 3, 5), rtol=1e-4, atol=1e-5)
    scores = methods.explain("exact", classifier, pixel_values, class_idx, (3, 1), hops=0, rule="log_prob", **others)
    assert scores.shape == (2, 3, 1)


@torch.no_grad()
def test_fidelity_of_rows_of_patches_equals_a_loop(naflex) -> None:
    classifier, inputs = naflex.classifier, naflex.inputs
    class_idx = torch.tensor([1, 3])
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    found = fidelity(classifier, scores=scores, class_idx=class_idx, num_levels=4, **inputs)

    def probability(b: int, kept: list[int]) -> float:
        pixels = torch.zeros_like(inputs["pixel_values"][b : b + 1])
        pixels[:, kept] = inputs["pixel_values"][b, kept]
        others = {name: value[b : b + 1] for name, value in inputs.items() if name != "pixel_values"}
        return classifier.backbone.model(pixels, **others).logits.softmax(-1)[0, class_idx[b]].item()

    for b in range(2):
        order = scores[b].flatten().argsort(descending=True).tolist()
        full = probability(b, order)
        for level, size in enumerate([15, 10, 5, 0]):
            assert found.plus[b, level].item() == pytest.approx(full - probability(b, order[size:]), abs=1e-5)
            assert found.minus[b, level].item() == pytest.approx(full - probability(b, order[:size]), abs=1e-5)


@torch.no_grad()
def test_verify_of_rows_of_patches(naflex) -> None:
    kept, removed = exact_meta_attribution(naflex.classifier, hops=1, **naflex.inputs)
    found = verify(
        naflex.classifier,
        kept=kept,
        removed=removed,
        class_idx=torch.tensor([0, 1]),
        hops=1,
        grid_size=(3, 5),
        **naflex.inputs,
    )
    assert all(v.error == pytest.approx(0, abs=1e-5) and v.num_patches == 15 for v in found)


def test_images_of_several_grids_are_explained_apart(naflex) -> None:
    pictures = [Image.new("RGB", size) for size in ((50, 30), (30, 50))]
    inputs = naflex.processor(pictures, return_tensors="pt")
    with pytest.raises(ValueError, match="grids of 3 x 5, 5 x 3 patches; explain those of one grid at a time"):
        exact_meta_attribution(naflex.classifier, **inputs)
    for picture, grid in zip(pictures, ((3, 5), (5, 3)), strict=True):
        inputs = naflex.processor(picture, return_tensors="pt")
        assert methods.explain("exact", naflex.classifier, class_idx=torch.tensor([0]), **inputs).shape == (1, *grid)


def test_what_cannot_serve_rows_of_patches_says_so(naflex, shared_model) -> None:
    classifier, inputs = naflex.classifier, naflex.inputs
    explainer = make_explainer(
        split_classifier(shared_model("vit"), ViTImageProcessorPil(size={"height": 32, "width": 32}))
    )
    explainer.config.embedding_dim = classifier.embedding_dim
    with pytest.raises(ValueError, match="takes rows of patches, whose grid depends on the image"):
        fit(explainer, classifier)
    with pytest.raises(ValueError, match="takes rows of patches, whose grid depends on the image"):
        config_for(classifier, None, 1)
    with pytest.raises(ValueError, match="rollout takes no pixel_attention_mask"):
        methods.explain("rollout", classifier, class_idx=torch.tensor([0, 1]), **inputs)
    with pytest.raises(ValueError, match="no neighbours for removal='blur'; pass \"zero\""):
        exact_meta_attribution(classifier, removal="blur", **inputs)


# --- what a classifier reads besides pixels -------------------------------------------------------------------------


class Masked(nn.Module):
    """A convolution, pooled over the pixels that a mask of padding leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        weight = nn.functional.avg_pool2d(pixel_mask.unsqueeze(1).to(pixel_values.dtype), 8)
        x = self.conv(pixel_values).relu() * weight
        return self.head(x.sum((2, 3)) / weight.sum((2, 3)))


def test_the_pipeline_passes_on_all_that_the_classifier_reads(randomized) -> None:
    size = {"shortest_edge": 32, "longest_edge": 32}
    processor = DetrImageProcessorPil(size=size, do_pad=True, pad_size={"height": 32, "width": 32})
    classifier = split_classifier(randomized(Masked()).eval(), processor)
    assert classifier.backbone.other_inputs == ("pixel_mask",)
    explainer = tve_hf.TVEExplainer(config_for(classifier, 4, 1, hidden_size=16, num_attention_heads=2)).eval()
    with torch.no_grad():
        explainer.trunk.differences.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    explain = tve_hf.TransferableAttributionPipeline(explainer, classifier)
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 40, 3), np.uint8)
    pictures = [Image.fromarray(noise[0]), Image.fromarray(noise[1].swapaxes(0, 1)), Image.fromarray(noise[2])]
    together = explain(pictures, batch_size=3, verify=16, class_idx=2)
    for picture, (result,) in zip(pictures, together, strict=True):
        inputs = processor(picture, return_tensors="pt")
        with torch.no_grad():
            expected = classifier.backbone.model(**inputs).softmax(-1)[0, 2].item()
            kept, _ = exact_meta_attribution(classifier, **inputs, grid_size=4, hops=1)
        assert result["score"] == pytest.approx(expected, abs=1e-6)
        (alone,) = explain(picture, verify=16, class_idx=2)
        np.testing.assert_allclose(alone["attribution"], result["attribution"], rtol=1e-4, atol=1e-5)
        for name, value in alone["verification"].items():
            assert value == result["verification"][name] or value == pytest.approx(
                result["verification"][name], rel=1e-3, abs=1e-4
            )
        assert kept.shape == (1, 16, 8)
