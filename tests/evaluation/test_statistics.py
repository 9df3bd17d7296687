"""Statistics against closed forms and scipy."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from tve_hf.evaluation import statistics
from tve_hf.evaluation.statistics import bootstrap_interval, holm, kendall, sign_flip_test
from tve_hf.verification import pearson, spearman


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


def test_bootstrap_interval_is_that_of_the_normal_approximation():
    values = torch.arange(100, dtype=torch.float64)
    low, high = bootstrap_interval(values)
    error = values.std().item() / 10
    assert low == pytest.approx(49.5 - 1.96 * error, abs=0.5) and high == pytest.approx(49.5 + 1.96 * error, abs=0.5)
    assert bootstrap_interval(torch.full((5,), 2.0)) == (2.0, 2.0)


def test_bootstrap_interval_is_scipys():
    values = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3  # skewed
    low, high = bootstrap_interval(values)
    expected = stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=10_000, method="percentile", random_state=0
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.003)
    assert high - low > 0.1


def test_many_images_are_drawn_in_pieces_that_make_the_same_numbers(monkeypatch):
    requests, randint = [], torch.randint

    def counted(high, size, **options):
        requests.append(size[0] * size[1])
        return randint(high, size, **options)

    monkeypatch.setattr(statistics.torch, "randint", counted)
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(values, samples=200)
    p_value = sign_flip_test(values + 0.005, samples=200)
    assert sum(requests) == 2 * 200 * 50_000 and max(requests) <= statistics.DRAWS_AT_ONCE  # 32 MiB
    index = randint(50_000, (200, 50_000), generator=torch.Generator().manual_seed(0))
    ends = values[index].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert [low, high] == ends.tolist()
    signs = 2.0 * randint(2, (200, 50_000), generator=torch.Generator().manual_seed(0)).double() - 1
    as_far = (signs @ (values + 0.005)).abs() >= (values + 0.005).sum().abs()
    assert p_value == (1 + int(as_far.sum())) / 201


def test_sign_flip_test_is_the_share_of_all_sign_patterns():
    differences = torch.tensor([0.3, -0.1, 0.5, 0.2, 0.4, 0.25], dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    exact = ((signs @ differences).abs() >= differences.sum().abs() - 1e-12).double().mean().item()
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(torch.zeros(5)) == 1.0
    assert sign_flip_test(torch.ones(40)) == pytest.approx(1e-4, rel=0.01)  # as small as 10,000 flips can show


def test_sign_flip_test_agrees_with_the_paired_t_test_on_many_images():
    differences = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    assert sign_flip_test(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=0.2)


def test_holm_by_hand():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, each at least the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_kendall_is_scipys():
    one, other = [0.3, 0.1, 0.8, 0.5, 0.2], [1.0, 2.0, 5.0, 3.0, 0.5]
    assert kendall(one, other) == pytest.approx(stats.kendalltau(one, other).statistic)
    assert kendall(one, one) == 1.0
    with pytest.raises(ValueError, match="compare at least two"):
        kendall([1.0], [1.0])
