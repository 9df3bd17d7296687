"""Methods that mask: against enumeration, and toys worked out by hand."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from untouched import left_as_found

from tve_hf import methods
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.methods.rise import random_masks

CLASS_IDX = torch.tensor([1, 0])


class Additive(nn.Module):
    """Two classes; the second one's logit is a weighted sum of pixels, so that its probability is known by hand."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.pixels = nn.Parameter(weight)  # (H, W)
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight.data = torch.tensor([[0.0], [1.0]])

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head((pixel_values[:, 0] * self.pixels).sum((1, 2)).unsqueeze(1))


@pytest.fixture
def additive(processor_of) -> SplitClassifier:
    """Four patches of 2 x 2 pixels, which add 0.5, -1, 2 and 0 to the logit of class 1 for an image of ones."""
    of_patch = torch.tensor([[0.5, -1.0], [2.0, 0.0]]) / 4
    weight = of_patch.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return split_classifier(Additive(weight).eval(), processor_of(3, 4, 4))


# --- occlusion ------------------------------------------------------------------------------------------------------


def test_occlusion_by_hand(additive) -> None:
    scores = methods.explain("occlusion", additive, torch.ones(2, 3, 4, 4), CLASS_IDX, 2)

    def prob(logit: float) -> float:
        return 1 / (1 + math.exp(-logit))

    whole = prob(1.5)
    expected = torch.tensor([[whole - prob(1.0), whole - prob(2.5)], [whole - prob(-0.5), 0.0]])
    torch.testing.assert_close(scores[0], expected)
    torch.testing.assert_close(scores[1], -expected)  # of two classes, one loses what the other wins


def test_occlusion_fills_with_the_removal(shared_model, images) -> None:
    classifier, pixel_values = split_classifier(shared_model("cnn")), images(2, 32)
    blurred = methods.explain("occlusion", classifier, pixel_values, CLASS_IDX, 4, removal="blur")
    assert not torch.allclose(blurred, methods.explain("occlusion", classifier, pixel_values, CLASS_IDX, 4))


# --- RISE -----------------------------------------------------------------------------------------------------------


def test_rise_masks_are_shifted_bilinear_grids() -> None:
    generator = torch.Generator().manual_seed(5)
    masks = random_masks(3000, (8, 12), 4, 0.3, generator)
    assert masks.shape == (3000, 1, 8, 12)
    assert masks.min() >= 0 and masks.max() <= 1
    deviation = 5 * (0.3 * 0.7 / 3000) ** 0.5
    assert (masks.mean(0) - 0.3).abs().max() < deviation  # every pixel is seen in a share p of the masks
    # One mask by a loop: cells of 2 x 3 pixels, each pixel's centre between the centres of the cells around it.
    generator = torch.Generator().manual_seed(7)
    (mask,) = random_masks(1, (8, 12), 4, 0.5, generator)
    generator = torch.Generator().manual_seed(7)
    small = (torch.rand(4, 4, generator=generator) < 0.5).double()
    row_shift = int(torch.randint(2, (), generator=generator))
    column_shift = int(torch.randint(3, (), generator=generator))

    def between(position: int, length: int) -> tuple[int, int, float]:
        centre = min(max((position + 0.5) * 4 / length - 0.5, 0), 3)
        low = min(int(centre), 2)
        return low, low + 1, centre - low

    for row, column in itertools.product(range(8), range(12)):
        top, bottom, down = between(row + row_shift, 10)
        left, right, across = between(column + column_shift, 15)
        upper = small[top, left] * (1 - across) + small[top, right] * across
        lower = small[bottom, left] * (1 - across) + small[bottom, right] * across
        assert abs(mask[0, row, column] - (upper * (1 - down) + lower * down)) < 1e-6


@torch.no_grad()
def test_rise_weighs_masks_by_probability(shared_model, images) -> None:
    model, pixel_values = shared_model("cnn"), images(2, 32)
    options = {"n_samples": 7, "cells": 3, "p": 0.4, "chunk_size": 4}
    scores = methods.explain("rise", split_classifier(model), pixel_values, CLASS_IDX, 4, **options)
    masks = random_masks(7, (32, 32), 3, 0.4, torch.Generator().manual_seed(0))
    for b in range(2):
        expected = torch.zeros(4, 4)
        for mask in masks:
            prob = model(pixel_values[b : b + 1] * mask).softmax(-1)[0, CLASS_IDX[b]]
            for row, column in itertools.product(range(4), range(4)):
                patch = mask[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                expected[row, column] += prob * patch.mean() / (7 * 0.4)
        torch.testing.assert_close(scores[b], expected)


def test_rise_is_unbiased(processor_of) -> None:
    """A classifier of constant probability 1/2 has, in expectation, the same 1/2 everywhere."""
    classifier = split_classifier(Additive(torch.full((4, 4), 1e-9)).eval(), processor_of(3, 4, 4))
    scores = methods.explain("rise", classifier, torch.ones(2, 3, 4, 4), CLASS_IDX, 2, n_samples=2000, p=0.25, cells=2)
    assert (scores - 0.5).abs().max() < 5 * 0.5 * (0.75 / 0.25 / 2000) ** 0.5


# --- Eq. 3 with sampled backgrounds ---------------------------------------------------------------------------------


@torch.no_grad()
def test_exact_sampled_nears_the_mean_over_all_backgrounds(shared_model, images) -> None:
    model, pixel_values = shared_model("cnn"), images(1, 32)

    def log_prob(kept: set[int]) -> float:
        x = torch.zeros_like(pixel_values)
        for patch in kept:
            row, column = 16 * (patch // 2), 16 * (patch % 2)
            x[..., row : row + 16, column : column + 16] = pixel_values[..., row : row + 16, column : column + 16]
        return model(x).log_softmax(-1)[0, 2].item()

    scores = methods.explain(
        "exact_sampled", split_classifier(model), pixel_values, torch.tensor([2]), 2, hops=0, n_samples=1500
    )
    for patch in range(4):
        others = [other for other in range(4) if other != patch]
        subsets = [set(s) for size in range(4) for s in itertools.combinations(others, size)]
        assert len(subsets) == 8
        gains = torch.tensor([log_prob({patch} | subset) - log_prob(subset) for subset in subsets])
        error = abs(scores[0, patch // 2, patch % 2] - gains.mean())
        assert error < 5 * gains.std(correction=0) / 1500**0.5


def test_exact_sampled_with_no_background_left_is_the_whole_image(additive) -> None:
    x = torch.ones(1, 3, 4, 4)
    scores = methods.explain("exact-sampled", additive, x, CLASS_IDX[:1], 2, hops=1, n_samples=2)
    expected = math.log(1 / (1 + math.exp(-1.5))) - math.log(0.5)  # log f(Z) - log f(nothing)
    torch.testing.assert_close(scores, torch.full((1, 2, 2), expected))


def test_exact_sampled_follows_its_generator(shared_model, images) -> None:
    classifier, pixel_values = split_classifier(shared_model("cnn")), images(1, 32)

    def draw(seed: int) -> Tensor:
        options = {"hops": 0, "n_samples": 2, "generator": torch.Generator().manual_seed(seed)}
        return methods.explain("exact_sampled", classifier, pixel_values, CLASS_IDX[:1], 4, **options)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


# --- all of them ----------------------------------------------------------------------------------------------------


def test_centre_falls_off_from_the_middle(shared_model, images) -> None:
    scores = methods.explain("centre", split_classifier(shared_model("cnn")), images(2, 32), CLASS_IDX, (3, 4))
    for row, column in itertools.product(range(3), range(4)):
        y, x = (row + 0.5) / 3 - 0.5, (column + 0.5) / 4 - 0.5
        assert abs(scores[1, row, column] - math.exp(-(y**2 + x**2) / (2 * 0.25**2))) < 1e-6


@pytest.mark.parametrize("name", ["rise", "occlusion", "exact_sampled"])
def test_the_model_is_left_as_found_and_chunks_do_not_matter(build, images, name) -> None:
    model = build("vit")
    classifier, pixel_values = split_classifier(model), images(2, 32)
    options = {} if name == "occlusion" else {"n_samples": 3}
    with left_as_found(model):
        scores = methods.explain(name, classifier, pixel_values, CLASS_IDX, 4, **options)
    small = methods.explain(name, classifier, pixel_values, CLASS_IDX, 4, chunk_size=1, **options)
    torch.testing.assert_close(small, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rise", "occlusion", "exact_sampled"])
def test_a_grid_that_does_not_divide_the_image_is_refused(shared_model, images, name) -> None:
    with pytest.raises(ValueError, match="A grid of 5 x 5 patches does not divide an image of 32 x 32"):
        methods.explain(name, split_classifier(shared_model("cnn")), images(2, 32), CLASS_IDX, 5)
