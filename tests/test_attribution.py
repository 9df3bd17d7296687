"""Meta-attribution, transfer and verification against loops, formulas and scipy."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from tve_hf.attribution import (
    DEFAULT_RULE,
    RULES,
    exact_meta_attribution,
    pearson,
    relative_error,
    spearman,
    transfer,
    verify,
)
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.patches import sample_patches


def _window(patch: int, rows: int, columns: int, hops: int) -> list[int]:
    """The neighbourhood of a patch, by comparing with every cell."""
    return [
        row * columns + column
        for row, column in itertools.product(range(rows), range(columns))
        if abs(row - patch // columns) <= hops and abs(column - patch % columns) <= hops
    ]


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
    near = _window(patch, rows, columns, hops)
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


def _formula(rule: str, kept: Tensor, removed: Tensor, head: nn.Linear, y: int, grid: tuple[int, int]) -> np.ndarray:
    """Scores of one image by numpy and loops: (N, D) twice -> (N,)."""
    weight, bias = head.weight.detach().double().numpy(), head.bias.detach().double().numpy()

    def logit(embeddings: Tensor) -> np.ndarray:
        return (embeddings.double().numpy() @ weight.T + bias)[:, y]

    def log_prob(embeddings: Tensor) -> np.ndarray:
        logits = embeddings.double().numpy() @ weight.T + bias
        return logits[:, y] - np.log(np.exp(logits).sum(1))

    def standardized(values: np.ndarray) -> np.ndarray:
        return (values - np.mean(values)) / np.sqrt(np.mean((values - np.mean(values)) ** 2))

    def averaged(values: np.ndarray) -> np.ndarray:
        return np.array([np.mean(values[_window(z, *grid, hops=1)]) for z in range(len(values))])

    def prob(embeddings: Tensor) -> np.ndarray:
        return np.exp(log_prob(embeddings))

    match rule:
        case "log_prob":
            return log_prob(kept) - log_prob(removed)
        case "log_prob_averaged":
            return averaged(log_prob(kept) - log_prob(removed))
        case "logit":
            return logit(kept) - logit(removed)
        case "logit_averaged":
            return averaged(logit(kept) - logit(removed))
        case "removed_averaged":
            return averaged(-log_prob(removed))
        case "standardized_logit":
            return standardized(logit(kept)) - standardized(logit(removed))
        case "standardized_logit_averaged":
            return averaged(standardized(logit(kept)) - standardized(logit(removed)))
        case "standardized_prob_averaged":
            return averaged(standardized(prob(kept)) - standardized(prob(removed)))
    raise AssertionError(f"{rule} has no formula here; write one.")


def _embeddings(batch: int = 2, num_patches: int = 15, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, num_patches, 8, generator=generator) for _ in range(2))


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_equals_its_formula(cnn, rule) -> None:
    kept, removed = _embeddings()
    class_idx = torch.tensor([4, 0])
    scores = transfer(kept, removed, cnn, class_idx, rule, grid_size=(3, 5), hops=1).detach()
    for b in range(2):
        expected = _formula(rule, kept[b], removed[b], cnn.head.module, int(class_idx[b]), (3, 5))
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


# --- comparisons ----------------------------------------------------------------------------------------------------


def test_correlations_equal_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(3, 4, 20, generator=generator)
    other = (one + torch.randn(3, 4, 20, generator=generator)).mul(2).round()  # with ties
    for i, j in itertools.product(range(3), range(4)):
        x, y = one[i, j].numpy(), other[i, j].numpy()
        assert float(pearson(one, other)[i, j]) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-5)
        assert float(spearman(one, other)[i, j]) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-5)


def test_correlation_with_a_constant_is_undefined() -> None:
    assert pearson(torch.arange(4.0), torch.ones(4)).isnan()
    assert spearman(torch.arange(4.0), torch.ones(4)).isnan()


def test_relative_error_by_hand() -> None:
    exact = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    predicted = torch.tensor([[[1.0, 1.0], [3.0, 2.0]]])
    centre = torch.tensor([[[1.0, 1.0]]])
    # (0 + 1 + 0 + 4) / (0 + 1 + 4 + 9)
    assert relative_error(predicted, exact, centre).tolist() == pytest.approx([5 / 14])
    assert relative_error(exact, exact, centre).tolist() == [0]
    assert relative_error(centre.expand(1, 2, 2), exact, centre).tolist() == pytest.approx([1])


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["log_prob", "standardized_logit_averaged"])
def test_exact_predictions_verify_as_exact(cnn, images, rule) -> None:
    pixel_values = images(2, 32)
    kept, removed = exact_meta_attribution(cnn, pixel_values, 4, 1)
    verifications = verify(cnn, pixel_values, kept, removed, torch.tensor([1, 3]), 7, rule, 4, 1)
    assert len(verifications) == 2
    for v in verifications:
        assert v.num_patches == 7
        assert v.rule == rule
        assert v.pearson == pytest.approx(1, abs=1e-5)
        assert v.spearman == pytest.approx(1, abs=1e-5)
        for value in (v.kept_error, v.removed_error, v.epsilon, v.bound, v.error):
            assert value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("rule", "pointwise"), [("log_prob", "log_prob"), ("standardized_logit_averaged", "logit")])
@pytest.mark.parametrize("num_patches", [16, 6, 99])
def test_verify_equals_numbers_worked_out_with_scipy(cnn, images, rule, pointwise, num_patches) -> None:
    pixel_values = images(2, 32)
    class_idx = torch.tensor([2, 0])
    exact = exact_meta_attribution(cnn, pixel_values, 4, 1)
    generator = torch.Generator().manual_seed(5)
    predicted = tuple(e + 0.1 * torch.randn(e.shape, generator=generator) for e in exact)
    found = verify(cnn, pixel_values, *predicted, class_idx, num_patches, rule, 4, 1, torch.Generator().manual_seed(3))
    n = min(num_patches, 16)
    patch_idx = sample_patches(2, 16, n, torch.Generator().manual_seed(3))
    full, empty = (cnn.embed(x).detach().numpy() for x in (pixel_values, 0 * pixel_values))
    for b in range(2):
        assert found[b].num_patches == n
        g, h, g_hat, h_hat = (e[b, patch_idx[b]] for e in (*exact, *predicted))
        y = int(class_idx[b])
        scores = [_formula(pointwise, *pair, cnn.head.module, y, (4, 4)) for pair in ((g, h), (g_hat, h_hat))]
        assert found[b].pearson == pytest.approx(stats.pearsonr(*scores).statistic, abs=1e-4)
        assert found[b].spearman == pytest.approx(stats.spearmanr(*scores).statistic, abs=1e-4)

        def probability(embeddings: Tensor, y: int = y) -> np.ndarray:
            return torch.softmax(cnn.head(embeddings).detach().double(), -1)[:, y].numpy()

        ratios = np.stack([probability(g_hat) / probability(g), probability(h) / probability(h_hat)])
        epsilon = np.abs(ratios - 1).max()
        assert found[b].epsilon == pytest.approx(epsilon, rel=1e-3)
        assert found[b].bound == pytest.approx(-2 * np.log(1 - epsilon), rel=1e-3)
        nats = np.log(probability(g_hat) / probability(h_hat)) - np.log(probability(g) / probability(h))
        assert found[b].error == pytest.approx(np.abs(nats).mean(), rel=1e-3)
        g, h, g_hat, h_hat = (e.numpy() for e in (g, h, g_hat, h_hat))
        assert found[b].kept_error == pytest.approx(((g_hat - g) ** 2).sum() / ((g - empty[b]) ** 2).sum(), rel=1e-3)
        assert found[b].removed_error == pytest.approx(((h_hat - h) ** 2).sum() / ((h - full[b]) ** 2).sum(), rel=1e-3)


def test_verify_gives_the_same_answer_twice(cnn, images) -> None:
    pixel_values = images(1, 32)
    kept, removed = _embeddings(1, 16)
    torch.manual_seed(0)
    one = verify(cnn, pixel_values, kept, removed, torch.tensor([0]), 5, grid_size=4)
    torch.manual_seed(1)
    assert one == verify(cnn, pixel_values, kept, removed, torch.tensor([0]), 5, grid_size=4)


def test_a_useless_prediction_has_no_bound(cnn, images) -> None:
    pixel_values = images(1, 32)
    kept, removed = exact_meta_attribution(cnn, pixel_values, 4, 1)
    (v,) = verify(cnn, pixel_values, 50 * kept, -50 * removed, torch.tensor([0]), 16, "log_prob", 4, 1)
    assert v.epsilon >= 1
    assert v.bound == math.inf
    assert v.kept_error > 1


@pytest.mark.parametrize("seed", range(12))
def test_theorem_1_bounds_the_error(cnn, images, seed) -> None:
    pixel_values = images(2, 16, seed=seed)
    kept, removed = exact_meta_attribution(cnn, pixel_values, 2, 0)
    generator = torch.Generator().manual_seed(seed)
    bounded = 0
    for scale in (1e-3, 0.03, 0.1, 0.3, 1.0):
        noisy = [e + scale * torch.randn(e.shape, generator=generator) for e in (kept, removed)]
        for v in verify(cnn, pixel_values, *noisy, torch.tensor([seed % 5, 1]), 4, "log_prob", 2, 0):
            assert v.error > 0
            assert v.error <= v.bound + 1e-6
            bounded += math.isfinite(v.bound)
    assert bounded >= 4


def test_the_bound_of_theorem_1_is_reached(processor_of) -> None:
    """Probabilities chosen by hand: both ratios are 1 - epsilon at the only patch, the worst that can happen."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.fill_(0.25)
        model[1].bias.fill_(0.5)
    classifier = split_classifier(model, processor_of(1, 2, 2)).with_head(lambda p: torch.cat([p, 1 - p], -1).log())
    pixel_values = torch.full((1, 1, 2, 2), 0.1)
    kept, removed = exact_meta_attribution(classifier, pixel_values, 1, 0)
    torch.testing.assert_close(kept, torch.full((1, 1, 1), 0.6))
    torch.testing.assert_close(removed, torch.full((1, 1, 1), 0.5))
    # ratios 0.48 / 0.6 = 0.8 and 0.5 / 0.625 = 0.8
    (v,) = verify(
        classifier, pixel_values, torch.full((1, 1, 1), 0.48), torch.full((1, 1, 1), 0.625), torch.tensor([0]), 1,
        "log_prob", 1, 0,
    )  # fmt: skip
    assert v.epsilon == pytest.approx(0.2, abs=1e-5)
    assert v.error == pytest.approx(2 * math.log(1.25), abs=1e-5)
    assert v.bound == pytest.approx(v.error, abs=1e-5)


def test_a_classifier_is_not_changed_by_any_of_this(build, images) -> None:
    model = build("cnn")
    before = copy.deepcopy(model.state_dict())
    classifier = split_classifier(model)
    kept, removed = exact_meta_attribution(classifier, images(1, 32), 4, 1)
    verify(classifier, images(1, 32), kept, removed, torch.tensor([0]), 4, grid_size=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
