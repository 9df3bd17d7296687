"""Methods that captum computes, against closed forms."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from untouched import left_as_found

from tve_hf import methods
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.verification import pearson

CLASS_IDX = torch.tensor([1, 3])
NAMES = ["deep_lift", "grad_shap", "ig", "kernel_shap", "lime", "saliency"]
FAST = {
    "kernel_shap": {"n_samples": 20},
    "lime": {"n_samples": 20},
    "ig": {"n_steps": 4},
    "grad_shap": {"n_samples": 3},
}


def _patches(pixels: Tensor, side: int) -> Tensor:
    """Sum over channels and the pixels of each of the side x side patches, by loops."""
    size = pixels.shape[-1] // side
    return torch.tensor(
        [
            [
                pixels[:, size * row : size * row + size, size * column : size * column + size].sum().item()
                for column in range(side)
            ]
            for row in range(side)
        ]
    )


def _logit_change(model: nn.Module, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        both = model(pixel_values), model(torch.zeros_like(pixel_values))
    logits, empty = (getattr(output, "logits", output) for output in both)
    return (logits - empty).gather(1, CLASS_IDX.unsqueeze(1)).squeeze(1)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_saliency_is_the_size_of_the_gradient(shared_model, images, name) -> None:
    model, pixel_values = shared_model(name), images(2, 32)
    scores = methods.explain("saliency", split_classifier(model), pixel_values, CLASS_IDX, 4)
    for b in range(2):
        x = pixel_values[b : b + 1].clone().requires_grad_()
        output = model(x)
        (slope,) = torch.autograd.grad(getattr(output, "logits", output)[0, CLASS_IDX[b]], x)
        torch.testing.assert_close(scores[b], _patches(slope[0].abs(), 4))


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_ig_is_complete(shared_model, images, name) -> None:
    model, pixel_values = shared_model(name), images(2, 32)
    scores = methods.explain(
        "ig", split_classifier(model), pixel_values, CLASS_IDX, 4, n_steps=300, multiply_by_inputs=True
    )
    change = _logit_change(model, pixel_values)
    assert (scores.sum((1, 2)) - change).abs().max() < 1e-2 * change.abs().max()


def test_ig_without_inputs_is_the_mean_gradient_at_the_nodes_of_gauss(shared_model, images) -> None:
    model, pixel_values = shared_model("vit"), images(2, 32)
    scores = methods.explain("ig", split_classifier(model), pixel_values, CLASS_IDX, 4, n_steps=5, chunk_size=3)
    nodes, weights = np.polynomial.legendre.leggauss(5)
    for b in range(2):
        expected = torch.zeros(4, 4)
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            x = (float(node) * pixel_values[b : b + 1]).requires_grad_()
            (slope,) = torch.autograd.grad(model(x).logits[0, CLASS_IDX[b]], x)
            expected += float(weight) * _patches(slope[0], 4)
        torch.testing.assert_close(scores[b], expected, rtol=1e-3, atol=1e-4)


def test_grad_shap_nears_integrated_gradients(shared_model, images) -> None:
    classifier, pixel_values = split_classifier(shared_model("vit")), images(2, 32)
    ig = methods.explain("ig", classifier, pixel_values, CLASS_IDX, 4, multiply_by_inputs=True)
    maps = [
        methods.explain(
            "grad_shap",
            classifier,
            pixel_values,
            CLASS_IDX,
            4,
            generator=torch.Generator().manual_seed(seed),
            n_samples=40,
            multiply_by_inputs=True,
        )
        for seed in range(10)
    ]
    spread = torch.stack(maps).std(0) / 10**0.5
    assert ((torch.stack(maps).mean(0) - ig).abs() < 5 * spread + 1e-4).all()
    assert not torch.equal(maps[0], maps[1])


class Rectified(nn.Module):
    """One hidden unit, ReLU(w . x + b), whose multiplier is known: its change over that of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.relu, self.head = nn.Conv2d(3, 1, 4), nn.ReLU(), nn.Linear(1, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.relu(self.unit(pixel_values)).flatten(1))


class Twice(Rectified):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.relu(self.relu(self.unit(pixel_values)) - 0.1).flatten(1))


def test_deep_lift_by_hand(fitted, processor_of, images) -> None:
    model, pixel_values = fitted(Rectified(), 4), images(2, 4)
    classifier = split_classifier(model, processor_of(3, 4, 4))
    with torch.no_grad():
        given = (pixel_values * model.unit.weight).sum((1, 2, 3))
        model.unit.bias.copy_(-given.max() / 2)  # ReLU cuts the way from the zero image to the first image in two
        before, after = model.unit.bias, given + model.unit.bias
        slopes = (after.relu() - before.relu()) / (after - before)
    assert 0.3 < slopes.max() < 0.7
    scores = methods.explain("deep_lift", classifier, pixel_values, CLASS_IDX, 2)
    for b in range(2):
        expected = slopes[b] * model.head.weight[CLASS_IDX[b], 0] * _patches(model.unit.weight[0], 2)
        torch.testing.assert_close(scores[b], expected.detach(), rtol=1e-4, atol=1e-6)


def test_deep_lift_is_complete(shared_model, images) -> None:
    model, pixel_values = shared_model("cnn"), images(2, 32)
    classifier = split_classifier(model)
    scores = methods.explain("deep_lift", classifier, pixel_values, CLASS_IDX, 4, multiply_by_inputs=True)
    torch.testing.assert_close(scores.sum((1, 2)), _logit_change(model, pixel_values), rtol=1e-3, atol=1e-5)
    other = classifier.with_head(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))
    assert methods.explain("deep_lift", other, pixel_values, CLASS_IDX, 4).shape == (2, 4, 4)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_deep_lift_is_refused_where_it_would_be_a_gradient(build, images, specs, name) -> None:
    model = build(name)
    with left_as_found(model), pytest.raises(ValueError, match="miss the change of the logit by .*; use another meth"):
        methods.explain("deep_lift", split_classifier(model), images(2, specs[name].side), CLASS_IDX, 4)


def test_deep_lift_is_refused_where_a_module_runs_twice(fitted, processor_of, images) -> None:
    model = fitted(Twice(), 4)
    classifier = split_classifier(model, processor_of(3, 4, 4))
    noted = {name: set(vars(module)) for name, module in model.named_modules()}
    with left_as_found(model), pytest.raises(ValueError, match="runs a module twice in a pass"):
        methods.explain("deep_lift", classifier, images(2, 4), CLASS_IDX, 2)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == noted


# --- coalitions -----------------------------------------------------------------------------------------------------


class LinearProbability(nn.Module):
    """Two classes; the probability of the second one is 1/2 plus a weighted sum of the pixels."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.pixels = nn.Parameter(weight)  # (H, W)
        self.head = Logits()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head((pixel_values[:, 0] * self.pixels).sum((1, 2)).unsqueeze(1))


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.5))

    def forward(self, embeddings: Tensor) -> Tensor:
        prob = (self.offset + embeddings).clamp(1e-6, 1 - 1e-6)
        return torch.cat([(1 - prob).log(), prob.log()], -1)


@pytest.fixture
def linear_game(processor_of) -> tuple[SplitClassifier, Tensor]:
    """A classifier of 16 patches, each of which adds a known amount to the probability for an image of ones."""
    truth = 0.02 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    weight = truth.repeat_interleave(2, 0).repeat_interleave(2, 1) / 4
    return split_classifier(LinearProbability(weight).eval(), processor_of(3, 8, 8)), truth


def test_kernel_shap_finds_a_linear_game(linear_game) -> None:
    classifier, truth = linear_game
    class_idx = torch.tensor([1, 0])
    scores = methods.explain("kernel_shap", classifier, torch.ones(2, 3, 8, 8), class_idx, 4, n_samples=400)
    assert pearson(scores[0].flatten(), truth.flatten()) > 0.999
    torch.testing.assert_close(scores[0], truth, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(scores[1], -truth, rtol=1e-2, atol=1e-4)
    few = methods.explain("kernel_shap", classifier, torch.ones(1, 3, 8, 8), class_idx[:1], 4, n_samples=8)
    assert pearson(few[0].flatten(), truth.flatten()) < 0.99  # fewer samples than patches


def test_kernel_shap_finds_a_linear_game_of_196_patches(processor_of) -> None:
    """The papers' grid; at 25 samples, their setting, the regression is under-determined."""
    truth = 0.002 * torch.randn(14, 14, generator=torch.Generator().manual_seed(0))
    classifier = split_classifier(LinearProbability(truth).eval(), processor_of(3, 14, 14))
    found = {
        n: methods.explain("kernel_shap", classifier, torch.ones(1, 3, 14, 14), torch.tensor([1]), 14, n_samples=n)
        for n in (25, 400)
    }
    assert pearson(found[400].flatten(), truth.flatten()) > 0.999
    assert pearson(found[25].flatten(), truth.flatten()) < 0.7


def test_lime_finds_a_linear_game(linear_game) -> None:
    classifier, truth = linear_game
    scores = methods.explain("lime", classifier, torch.ones(1, 3, 8, 8), torch.tensor([1]), 4)
    assert pearson(scores[0].flatten(), truth.flatten()) > 0.999
    shrunk = scores[0].flatten() @ truth.flatten() / truth.square().sum()
    assert 0.9 < shrunk < 1  # by the ridge


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_model_and_the_generators_are_left_as_found(build, images, name) -> None:
    model, pixel_values = build("cnn"), images(2, 32)
    classifier = split_classifier(model)
    numpy_state = np.random.get_state()[1].copy()
    with left_as_found(model):
        scores = methods.explain(name, classifier, pixel_values, CLASS_IDX, 4, **FAST.get(name, {}))
        again = methods.explain(name, classifier, pixel_values.flip(0), CLASS_IDX.flip(0), 4, **FAST.get(name, {}))
    assert (np.random.get_state()[1] == numpy_state).all()
    assert not scores.requires_grad and scores.dtype == torch.float32
    torch.testing.assert_close(again.flip(0), scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_captum_names_the_extra(shared_model, images, monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"pip install 'tve_hf\[methods\]'"):
        methods.explain(name, split_classifier(shared_model("cnn")), images(2, 32), CLASS_IDX, 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_that_does_not_divide_the_image_is_refused(shared_model, images, name) -> None:
    with pytest.raises(ValueError, match="A grid of 5 x 5 patches does not divide an image of 32 x 32"):
        methods.explain(name, split_classifier(shared_model("cnn")), images(2, 32), CLASS_IDX, 5, **FAST.get(name, {}))


@pytest.mark.parametrize("name", ["saliency", "ig", "grad_shap", "deep_lift"])
def test_inference_mode_is_refused(shared_model, images, name) -> None:
    classifier, pixel_values = split_classifier(shared_model("cnn")), images(2, 32)
    with torch.inference_mode(), pytest.raises(ValueError, match="use torch.no_grad"):
        methods.explain(name, classifier, pixel_values, CLASS_IDX, 4)
    with torch.no_grad():
        assert methods.explain(name, classifier, pixel_values, CLASS_IDX, 4).any()
