"""Meta-attribution and transfer against loops and formulas."""

import itertools
import math

import numpy as np
import pytest
import torch
from formulas import formula, window
from torch import Tensor, nn

from tve_hf.attribution import DEFAULT_RULE, RULES, exact_meta_attribution, transfer
from tve_hf.classifiers import SplitClassifier, split_classifier


def _kept_alone(image: Tensor, patches: list[int], rows: int, columns: int) -> Tensor:
    """An image (C, H, W) of which only some patches are left, copied rectangle by rectangle."""
    height, width = image.shape[1] // rows, image.shape[2] // columns
    result = torch.zeros_like(image)
    for patch in patches:
        top, left = patch // columns * height, patch % columns * width
        result[:, top : top + height, left : left + width] = image[:, top : top + height, left : left + width]
    return result


def _states(image: Tensor, patch: int, rows: int, columns: int, hops: int) -> tuple[Tensor, Tensor]:
    """The image with only a patch's neighbourhood, and without it."""
    near = window(patch, rows, columns, hops)
    far = [other for other in range(rows * columns) if other not in near]
    return _kept_alone(image, near, rows, columns), _kept_alone(image, far, rows, columns)


@pytest.fixture(scope="module")
def cnn(shared_model) -> SplitClassifier:
    return split_classifier(shared_model("cnn"))


# --- Definition 1 ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("height", "width", "grid_size", "hops"),
    [(32, 32, 4, 1), (24, 40, (3, 5), 1), (24, 40, (3, 5), 2), (16, 16, 2, 0)],
)
def test_exact_meta_attribution_equals_a_loop(cnn, images, height, width, grid_size, hops) -> None:
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    pixel_values = images(2, height, width)
    kept, removed = exact_meta_attribution(cnn, pixel_values, grid_size, hops)
    assert kept.shape == removed.shape == (2, rows * columns, 8)
    for b, patch in itertools.product(range(2), range(rows * columns)):
        near, far = _states(pixel_values[b], patch, rows, columns, hops)
        torch.testing.assert_close(kept[b, patch], cnn.embed(near.unsqueeze(0))[0])
        torch.testing.assert_close(removed[b, patch], cnn.embed(far.unsqueeze(0))[0])


def test_a_window_over_the_whole_image_keeps_and_removes_all(cnn, images) -> None:
    pixel_values = images(1, 32)
    kept, removed = exact_meta_attribution(cnn, pixel_values, 4, hops=3)
    torch.testing.assert_close(kept[0], cnn.embed(pixel_values).expand(16, -1).detach())
    torch.testing.assert_close(removed[0], cnn.embed(0 * pixel_values).expand(16, -1).detach())


def test_only_some_patches_in_any_order_and_chunks(cnn, images) -> None:
    pixel_values = images(2, 32)
    everything = exact_meta_attribution(cnn, pixel_values, 4, 1)
    patch_idx = torch.tensor([[5, 0, 15], [3, 3, 9]])
    for chunk_size in (1, 5, 128):
        some = exact_meta_attribution(cnn, pixel_values, 4, 1, patch_idx, chunk_size=chunk_size)
        for part, whole in zip(some, everything, strict=True):
            assert part.shape == (2, 3, 8)
            for b, k in itertools.product(range(2), range(3)):
                torch.testing.assert_close(part[b, k], whole[b, patch_idx[b, k]])


def test_exact_meta_attribution_with_blur(cnn, images) -> None:
    from tve_hf.patches import REMOVALS

    pixel_values = images(1, 32)
    kept, removed = exact_meta_attribution(cnn, pixel_values, 4, 0, torch.tensor([[6]]), removal="blur")
    blurred = REMOVALS["blur"](pixel_values, torch.ones(1))[:, 0]
    alone, without = blurred.clone(), pixel_values.clone()
    alone[..., 8:16, 16:24] = pixel_values[..., 8:16, 16:24]  # patch 6 is row 1, column 2
    without[..., 8:16, 16:24] = blurred[..., 8:16, 16:24]
    torch.testing.assert_close(kept[0], cnn.embed(alone).detach())
    torch.testing.assert_close(removed[0], cnn.embed(without).detach())


def test_no_gradients_and_no_change_of_the_image(cnn, images) -> None:
    pixel_values = images(1, 32).requires_grad_()
    before = pixel_values.detach().clone()
    kept, removed = exact_meta_attribution(cnn, pixel_values, 4, 1)
    assert not kept.requires_grad and not removed.requires_grad
    assert torch.equal(pixel_values, before)


@pytest.mark.parametrize(
    ("patch_idx", "message"),
    [
        ([[16]], r"patches between 0 and 15; got \[\[16\]\]"),
        ([[-1]], "patches between 0 and 15"),
        ([[]], r"shape \(1, 0\); pass \(B, k\) with B = 1"),
        ([[1], [2]], r"shape \(2, 1\); pass \(B, k\) with B = 1"),
        ([3], r"shape \(1,\); pass \(B, k\)"),
    ],
)
def test_bad_patches_are_refused(cnn, images, patch_idx, message) -> None:
    with pytest.raises(ValueError, match=message):
        exact_meta_attribution(cnn, images(1, 32), 4, 1, torch.tensor(patch_idx, dtype=torch.int64))


def test_an_empty_batch_and_a_grid_that_does_not_divide_are_refused(cnn, images) -> None:
    with pytest.raises(ValueError, match="holds no image; pass a batch of at least one"):
        exact_meta_attribution(cnn, images(0, 32), 4)
    with pytest.raises(ValueError, match="5 x 5 patches does not divide an image of 32 x 32"):
        exact_meta_attribution(cnn, images(1, 32), 5)
    with pytest.raises(ValueError, match="Unknown removal operator 'gray'"):
        exact_meta_attribution(cnn, images(1, 32), 4, removal="gray")


# --- Definition 2 ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_exact_embeddings_through_transfer_are_the_model_itself(shared_model, images, specs, architecture) -> None:
    """The oracle: log f of the masked images, by the untouched model, a loop and a softmax in float64."""
    model, pixel_values = shared_model(architecture), images(2, specs[architecture].side)
    classifier = split_classifier(model)
    kept, removed = exact_meta_attribution(classifier, pixel_values, grid_size=4, hops=1)
    class_idx = torch.tensor([1, 3])
    scores = transfer(kept, removed, classifier, class_idx, rule="log_prob")

    expected = torch.zeros(2, 16, dtype=torch.float64)
    for b in range(2):
        near, far = zip(*(_states(pixel_values[b], patch, 4, 4, 1) for patch in range(16)), strict=True)
        probabilities = model(torch.stack(near + far)).logits.double().softmax(-1)[:, class_idx[b]]
        expected[b] = probabilities[:16].log() - probabilities[16:].log()
    assert expected.std() > 0.01  # the window does matter
    assert scores.shape == (2, 16)
    assert (scores.double() - expected).abs().max() <= 1e-5


def _embeddings(batch: int = 2, num_patches: int = 15, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, num_patches, 8, generator=generator) for _ in range(2))


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_equals_itsformula(cnn, rule) -> None:
    kept, removed = _embeddings()
    class_idx = torch.tensor([4, 0])
    scores = transfer(kept, removed, cnn, class_idx, rule, grid_size=(3, 5), hops=1).detach()
    for b in range(2):
        expected = formula(rule, kept[b], removed[b], cnn.head.module, int(class_idx[b]), (3, 5))
        np.testing.assert_allclose(scores[b].numpy(), expected, rtol=0, atol=2e-5)


def test_the_default_rule_is_the_default(cnn) -> None:
    kept, removed = _embeddings(num_patches=16)
    scores = transfer(kept, removed, cnn, torch.tensor([1, 2]), hops=1)
    assert torch.equal(scores, transfer(kept, removed, cnn, torch.tensor([1, 2]), DEFAULT_RULE, 4, 1))


@pytest.mark.parametrize("rule", ["log_prob", "standardized_prob_averaged"])
def test_several_classes_at_once_are_one_at_a_time(cnn, rule) -> None:
    kept, removed = _embeddings()
    class_idx = torch.tensor([[4, 0, 2], [1, 1, 3]])
    scores = transfer(kept, removed, cnn, class_idx, rule, (3, 5), 1)
    assert scores.shape == (2, 3, 15)
    for k in range(3):
        torch.testing.assert_close(scores[:, k], transfer(kept, removed, cnn, class_idx[:, k], rule, (3, 5), 1))


@pytest.mark.parametrize("rule", ["prob", "standardized_logit_averaged"])
def test_logits_of_one_patch_at_a_time_are_those_of_all(monkeypatch, cnn, rule) -> None:
    asked = *_embeddings(), cnn, torch.tensor([[4, 0], [1, 2]]), rule, (3, 5), 1
    expected = transfer(*asked)
    monkeypatch.setattr("tve_hf.attribution.MOST_LOGITS", 1)
    torch.testing.assert_close(transfer(*asked), expected)


def test_a_constant_part_is_standardized_to_zero(cnn) -> None:
    kept, removed = _embeddings()
    kept = kept[:, :1].expand(-1, 15, -1)
    scores = transfer(kept, removed, cnn, torch.tensor([0, 0]), "standardized_logit").detach()
    logits = (removed @ cnn.head.module.weight.T).detach()[..., 0]
    expected = -(logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_another_head_on_the_same_embeddings(cnn) -> None:
    kept, removed = _embeddings()
    other = cnn.with_head(lambda e: e[..., :2], multi_label=True)
    scores = transfer(kept, removed, other, torch.tensor([1, 1]), "log_prob")
    expected = (1 + (-removed[..., 1].double()).exp()).log() - (1 + (-kept[..., 1].double()).exp()).log()
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_logits_in_half_precision_give_finite_exact_scores(processor_of, dtype) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Linear(2, 3)).eval().to(dtype)
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[3e4, 0.0], [0.0, 3e4], [-3e4, 1.0]]))
        model[2].bias.zero_()
    classifier = split_classifier(model, processor_of(3, 2, 2))
    kept = torch.tensor([[[1.0, -1.0], [0.5, 1.0], [0.0, 0.0], [1.0, 1.0]]])
    removed = torch.tensor([[[-1.0, 1.0], [1.0, -1.0], [1.0, 0.5], [-1.0, 0.0]]])
    weight = model[2].weight.detach().double()

    def log_prob(embeddings: Tensor) -> Tensor:
        logits = embeddings.double() @ weight.T
        return (logits - logits.logsumexp(-1, keepdim=True))[..., 2]

    scores = transfer(kept.to(dtype), removed.to(dtype), classifier, torch.tensor([2]), "log_prob").detach()
    assert scores.dtype == torch.float32
    expected = log_prob(kept) - log_prob(removed)
    assert expected.abs().max() > 5e4  # a softmax in half precision would give log 0
    torch.testing.assert_close(scores.double(), expected, rtol=0.02 if dtype == torch.bfloat16 else 2e-3, atol=1.0)


@pytest.mark.parametrize("shape", [(2, 15, 7), (2, 15, 9)])
def test_another_dimension_is_refused(cnn, shape) -> None:
    with pytest.raises(ValueError, match=f"D = {shape[-1]}, but the classifier's head reads 8"):
        transfer(torch.zeros(shape), torch.zeros(shape), cnn, torch.tensor([0, 0]))


def test_shapes_that_differ_are_refused(cnn) -> None:
    with pytest.raises(ValueError, match=r"kept \(2, 15, 8\) and removed \(2, 14, 8\) must both be \(B, N, D\)"):
        transfer(torch.zeros(2, 15, 8), torch.zeros(2, 14, 8), cnn, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="must both be"):
        transfer(torch.zeros(15, 8), torch.zeros(15, 8), cnn, torch.tensor([0]))


@pytest.mark.parametrize("class_idx", [[0, 5], [-1, 0], [0], [0, 1, 2], [[0], [7]]])
def test_classes_that_are_not_there_are_refused(cnn, class_idx) -> None:
    kept, removed = _embeddings()
    with pytest.raises(ValueError, match="for each of 2 images, a class between 0 and 4"):
        transfer(kept, removed, cnn, torch.tensor(class_idx))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", list(RULES))
def test_values_that_are_not_finite_are_refused(cnn, rule, value) -> None:
    kept, removed = _embeddings()
    removed[1, 3, 2] = value
    with pytest.raises(ValueError, match="not finite.*NaN"):
        transfer(kept, removed, cnn, torch.tensor([0, 0]), rule, (3, 5))


def test_weights_that_are_nan_are_refused(build) -> None:
    model = build("cnn")
    classifier = split_classifier(model)
    with torch.no_grad():
        model.fc.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="weights hold NaN"):
        transfer(*_embeddings(), classifier, torch.tensor([1, 1]), "log_prob")


def test_an_empty_batch_an_unknown_rule_and_another_grid_are_refused(cnn) -> None:
    with pytest.raises(ValueError, match="hold no image; pass a batch of at least one"):
        transfer(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), cnn, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="Unknown rule 'magic'; choose one of log_prob, "):
        transfer(*_embeddings(), cnn, torch.tensor([0, 0]), "magic")
    with pytest.raises(ValueError, match="15 patches do not fill a grid of 4 x 4; pass grid_size"):
        transfer(*_embeddings(), cnn, torch.tensor([0, 0]), "log_prob_averaged")
