"""Verification against numbers worked out with scipy, and Theorem 1 where its bound is reached."""

import copy
import math

import numpy as np
import pytest
import torch
from formulas import formula
from scipy import stats
from torch import Tensor, nn

from tve_hf.attribution import exact_meta_attribution
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.patches import sample_patches
from tve_hf.verification import Verification, pearson, relative_error, spearman, verify


@pytest.fixture(scope="module")
def cnn(shared_model) -> SplitClassifier:
    return split_classifier(shared_model("cnn"))


def test_relative_error_by_hand() -> None:
    exact = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    predicted = torch.tensor([[[1.0, 1.0], [3.0, 2.0]]])
    centre = torch.tensor([[[1.0, 1.0]]])
    # (0 + 1 + 0 + 4) / (0 + 1 + 4 + 9)
    assert relative_error(predicted, exact, centre).tolist() == pytest.approx([5 / 14])
    assert relative_error(exact, exact, centre).tolist() == [0]
    assert relative_error(centre.expand(1, 2, 2), exact, centre).tolist() == pytest.approx([1])


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
    patch_idx = sample_patches(1, 16, n, torch.Generator().manual_seed(3)).expand(2, -1)
    full, empty = (cnn.embed(x).detach().numpy() for x in (pixel_values, 0 * pixel_values))
    for b in range(2):
        assert found[b].num_patches == n
        g, h, g_hat, h_hat = (e[b, patch_idx[b]] for e in (*exact, *predicted))
        y = int(class_idx[b])
        scores = [formula(pointwise, *pair, cnn.head.module, y, (4, 4)) for pair in ((g, h), (g_hat, h_hat))]
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
    kept, removed = torch.randn(2, 1, 16, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    one = verify(cnn, pixel_values, kept, removed, torch.tensor([0]), 5, grid_size=4)
    torch.manual_seed(1)
    assert one == verify(cnn, pixel_values, kept, removed, torch.tensor([0]), 5, grid_size=4)


def test_an_image_is_verified_alike_alone_and_at_any_place_of_any_batch(cnn, images) -> None:
    pixel_values, class_idx = images(3, 32), torch.tensor([0, 2, 4])
    generator = torch.Generator().manual_seed(2)
    kept, removed = (part + torch.randn(part.shape, generator=generator) for part in _exact(cnn, pixel_values))
    alone = [
        verify(cnn, *(x[i : i + 1] for x in (pixel_values, kept, removed, class_idx)), 5, "logit", 4, 1)[0]
        for i in range(3)
    ]
    assert len({round(v.spearman, 3) for v in alone}) > 1
    for order in ([0, 1, 2], [2, 1, 0], [1, 2], [1, 0, 1]):
        batch = verify(cnn, *(x[order] for x in (pixel_values, kept, removed, class_idx)), 5, "logit", 4, 1)
        for v, i in zip(batch, order, strict=True):
            assert _numbers(v) == pytest.approx(_numbers(alone[i]), rel=1e-3, abs=1e-5)


def _numbers(verification: Verification) -> dict[str, float]:
    return {name: value for name, value in vars(verification).items() if name != "rule"}


def _exact(classifier: SplitClassifier, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    return exact_meta_attribution(classifier, pixel_values, 4, 1)


def test_several_classes_share_the_exact_passes(build, images) -> None:
    model = build("cnn")
    classifier, pixel_values = split_classifier(model), images(2, 32)
    kept, removed = (part + 0.3 for part in _exact(classifier, pixel_values))
    classes = torch.tensor([[0, 3, 1], [4, 2, 0]])
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    several = verify(classifier, pixel_values, kept, removed, classes, 4, "logit", 4, 1)
    handle.remove()
    # For each image 4 patches kept and removed and the whole image, and for all images the empty one.
    assert sum(seen) == 2 * (2 * 4 + 1) + 1
    one_by_one = [verify(classifier, pixel_values, kept, removed, column, 4, "logit", 4, 1) for column in classes.T]
    assert [len(row) for row in several] == [3, 3]
    for i, row in enumerate(several):
        for k, v in enumerate(row):
            assert _numbers(v) == pytest.approx(_numbers(one_by_one[k][i]), rel=1e-5, abs=1e-6)


# Correlations


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 2.7, -1e6, 1e-20])
@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_a_constant_map_correlates_with_nothing(value, correlation) -> None:
    other = torch.randn(196, generator=torch.Generator().manual_seed(0))
    constant = torch.full((196,), value)
    # Means over windows of a constant differ by rounding, which is no map either.
    window = torch.rand(196, 196, generator=torch.Generator().manual_seed(1))
    averaged = constant @ (window / window.sum(1, keepdim=True)).T
    for flat in (constant, averaged):
        assert correlation(flat, other).isnan() and correlation(other, flat).isnan()
        both = correlation(torch.stack([flat, other]), torch.stack([other, other]))
        assert both[0].isnan() and both[1].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1.0, 1e-4), (-300.0, 0.01), (0.0, 1e-24), (0.0, 1e18)])
def test_small_differences_that_are_real_correlate_as_scipy_says(offset, scale) -> None:
    generator = torch.Generator().manual_seed(0)
    one = offset + scale * torch.randn(3, 50, generator=generator)
    other = one / scale + torch.randn(3, 50, generator=generator)
    for i in range(3):
        pair = one[i].double().numpy(), other[i].double().numpy()
        assert pearson(one, other)[i].item() == pytest.approx(stats.pearsonr(*pair).statistic, abs=1e-4)
        assert spearman(one, other)[i].item() == pytest.approx(stats.spearmanr(*pair).statistic, abs=1e-4)


def test_double_precision_is_kept() -> None:
    one = 1 + 1e-12 * torch.arange(5, dtype=torch.float64)
    assert pearson(one, torch.arange(5)).item() == pytest.approx(1, abs=1e-3)
    assert spearman(one, torch.arange(5)).item() == pytest.approx(1)


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
