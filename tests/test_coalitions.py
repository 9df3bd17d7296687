"""Distributions of coalitions: how often each patch is kept, each size occurs, and neighbours share their fate."""

import itertools
import math

import pytest
import torch

from tve_hf.coalitions import COALITIONS, Coalitions

GRID = (3, 5)
PATCHES = 15
NUMBER = 40_000
ALL = [Coalitions(name) for name in COALITIONS] + [Coalitions("independent", prob=0.2), Coalitions("smooth", scale=2)]


def draws(how: Coalitions, seed: int = 0, grid: tuple[int, int] = GRID) -> torch.Tensor:
    """(M, N), in pairs."""
    return how.draw(1, NUMBER, grid, torch.Generator().manual_seed(seed))[0]


@pytest.mark.parametrize("how", ALL, ids=str)
def test_every_patch_is_kept_as_often_as_is_said(how) -> None:
    kept = draws(how).double()
    # Halves of pairs by themselves too, since each follows the distribution.
    for half in (kept[0::2], kept[1::2]):
        error = half.std(0) / math.sqrt(NUMBER / 2)
        assert ((half.mean(0) - how.keep_prob).abs() < 4.5 * error).all()


@pytest.mark.parametrize("how", ALL, ids=str)
def test_pairs_are_complements_where_patches_are_kept_half_the_time(how) -> None:
    kept = draws(how)
    complements = torch.equal(kept[0::2], ~kept[1::2])
    assert complements == (how.keep_prob == 0.5)
    if not complements:  # as far apart as the probability lets them be: never both kept
        assert not (kept[0::2] & kept[1::2]).any()


def test_independent_patches_are_independent() -> None:
    kept = draws(Coalitions("independent", prob=0.3))[0::2].double()
    covariance = torch.cov(kept.T)
    expected = 0.3 * 0.7 * torch.eye(PATCHES, dtype=torch.float64)
    assert (covariance - expected).abs().max() < 0.01


def test_uniform_sizes_are_uniform_and_sets_of_a_size_equally_likely() -> None:
    kept = draws(Coalitions("uniform"), grid=(2, 2))
    sizes = torch.bincount(kept.sum(1), minlength=5) / NUMBER
    assert (sizes - 1 / 5).abs().max() < 0.01
    of_two = kept[kept.sum(1) == 2]
    for pair in itertools.combinations(range(4), 2):
        share = of_two[:, list(pair)].all(1).double().mean().item()
        assert share == pytest.approx(1 / 6, abs=0.02)


def test_shapley_sizes_are_those_of_the_kernel() -> None:
    kept = draws(Coalitions("shapley"))
    # Lundberg & Lee 2017: a set of k of N weighs (N - 1) / (binomial(N, k) k (N - k)).
    weights = [math.comb(PATCHES, k) / (math.comb(PATCHES, k) * k * (PATCHES - k)) for k in range(1, PATCHES)]
    found = torch.bincount(kept.sum(1), minlength=PATCHES + 1) / NUMBER
    assert found[0] == found[PATCHES] == 0
    for k, weight in enumerate(weights, 1):
        assert found[k].item() == pytest.approx(weight / sum(weights), abs=0.01)


@pytest.mark.parametrize("grid", [(8, 8), (14, 20)])
def test_smooth_fields_are_blurred_by_a_tenth_of_the_shorter_side(grid) -> None:
    for how, other in ((Coalitions("smooth"), True), (Coalitions("smooth", scale=0.7), False)):
        same = Coalitions("smooth", scale=min(grid) / 10)
        drawn, expected = (c.draw(2, 4, grid, torch.Generator().manual_seed(0)) for c in (how, same))
        assert torch.equal(drawn, expected) == other


@pytest.mark.parametrize("scale", [0.7, 1.5])
def test_neighbours_of_smooth_fields_share_their_fate_as_the_blur_says(scale) -> None:
    """With f and g standard normal of correlation r: P(both below the level) in closed form.

    The level is standard normal too, h: f - h and g - h have the correlation (1 + r) / 2, so both are
    negative with probability 1/4 + asin((1 + r) / 2) / (2 pi).
    """
    kept = draws(Coalitions("smooth", scale=scale))
    places = torch.arange(5, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / scale) ** 2)
    for one, other in ((0, 1), (1, 2), (0, 4)):  # in the first row, so only columns differ
        r = (weights[one] @ weights[other] / weights[one].norm() / weights[other].norm()).item()
        both = (kept[:, one] & kept[:, other]).double().mean().item()
        assert both == pytest.approx(0.25 + math.asin((1 + r) / 2) / (2 * math.pi), abs=0.01)


@pytest.mark.parametrize("how", ALL, ids=str)
def test_draws_repeat_and_images_differ(how) -> None:
    one, again = (how.draw(3, 8, GRID, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.shape == (3, 8, PATCHES) and one.dtype == torch.bool
    assert torch.equal(one, again)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, how.draw(3, 8, GRID, torch.Generator().manual_seed(6)))


@pytest.mark.parametrize(
    ("how", "number", "grid", "message"),
    [
        (Coalitions(), 7, GRID, "coalitions_per_image is 7, but coalitions come in pairs; choose an even number"),
        (Coalitions(), 0, GRID, "is 0, but coalitions come in pairs; choose an even number from 2 on"),
        (Coalitions("independent", prob=0), 2, GRID, "coalition_prob is 0.*choose one between 0 and 1"),
        (Coalitions("independent", prob=1.0), 2, GRID, "coalition_prob is 1.0.*choose one between 0 and 1"),
        (Coalitions("independent", prob=math.nan), 2, GRID, "coalition_prob is nan.*choose one between 0 and 1"),
        (Coalitions("smooth", scale=0), 2, GRID, "coalition_scale is 0.*choose one above 0 and below 5"),
        (Coalitions("smooth", scale=5), 2, GRID, "coalition_scale is 5.*grid of 3 x 5 patches; choose"),
        (Coalitions("shapley"), 2, (1, 1), "grid of 1 x 1 patches are empty or full; choose a finer grid"),
        (Coalitions("rough"), 2, GRID, "Unknown distribution of coalitions 'rough'; choose one of smooth, "),
    ],
)
def test_what_cannot_be_drawn_is_named_with_the_remedy(how, number, grid, message) -> None:
    with pytest.raises(ValueError, match=message):
        how.draw(2, number, grid, torch.Generator())
