"""Sampled meta-attribution against brute-force Banzhaf and Shapley values, for several heads."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tve_hf
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.coalitions import Coalitions
from tve_hf.sampling import Regression, sampled_meta_attribution

ROWS, COLUMNS = 2, 3
PATCHES = ROWS * COLUMNS
SETS = torch.tensor(list(itertools.product([False, True], repeat=PATCHES)))  # all, (64, N)


@pytest.fixture(scope="module")
def cnn(shared_model) -> SplitClassifier:
    return split_classifier(shared_model("cnn"))


@pytest.fixture(scope="module")
def game(cnn, images) -> tuple[Tensor, Tensor]:
    """Two images, and G of every coalition of their patches, (2, 64, D)."""
    pixel_values = images(2, 24, 36)
    rows = []
    for image in pixel_values:
        for kept in SETS.tolist():
            masked = torch.zeros_like(image)
            for z in (z for z in range(PATCHES) if kept[z]):
                top, left = z // COLUMNS * 12, z % COLUMNS * 12
                masked[:, top : top + 12, left : left + 12] = image[:, top : top + 12, left : left + 12]
            rows.append(masked)
    with torch.no_grad():
        return pixel_values, cnn.embed(torch.stack(rows)).unflatten(0, (2, -1))


def heads(dim: int) -> list[nn.Linear]:
    torch.manual_seed(3)
    return [nn.Linear(dim, classes) for classes in (2, 3, 5)]


def marginal_values(values: Tensor, weight: Callable[[int], float]) -> Tensor:
    """sum over S without z of weight(|S|) (v(S + z) - v(S)), by loops, (64,) -> (N,)."""
    number = {frozenset(row.nonzero().flatten().tolist()): i for i, row in enumerate(SETS)}
    found = []
    for z in range(PATCHES):
        others = [y for y in range(PATCHES) if y != z]
        total = 0.0
        for size in range(PATCHES):
            for chosen in itertools.combinations(others, size):
                gain = values[number[frozenset({*chosen, z})]] - values[number[frozenset(chosen)]]
                total += weight(size) * gain.item()
        found.append(total)
    return torch.tensor(found)


def banzhaf(size: int) -> float:
    return 1 / 2 ** (PATCHES - 1)


def shapley(size: int) -> float:
    return math.factorial(size) * math.factorial(PATCHES - size - 1) / math.factorial(PATCHES)


def fit(how: Coalitions, embeddings: Tensor, times: Callable[[int], int]) -> tuple[Tensor, Tensor]:
    """Regress on every coalition, as many times as its size says; phi and base."""
    pairs = torch.stack([torch.arange(64), 63 - torch.arange(64)], 1)[:32]  # a set and its complement
    order = torch.cat([pair.repeat(times(int(SETS[pair[0]].sum()))) for pair in pairs])
    regression = Regression(SETS[order], how, embeddings[:, 0], embeddings[:, 63])
    regression.add(slice(0, len(order)), embeddings[:, order])
    phi, base, _ = regression.solve(penalty=0.0)
    return phi, base


def test_independent_backgrounds_give_banzhaf_values_of_every_head(game) -> None:
    embeddings = game[1]
    phi, base = fit(Coalitions("independent"), embeddings, lambda size: 1)
    torch.testing.assert_close(base, embeddings.mean(1).double())
    for head in heads(embeddings.shape[-1]):
        for image, y in itertools.product(range(2), range(head.out_features)):
            expected = marginal_values(head(embeddings[image])[:, y], banzhaf)
            found = phi[image].float() @ head.weight[y]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_shapley_kernel_gives_shapley_values_of_every_head(game) -> None:
    embeddings = game[1]
    # The kernel's weights of a set, 1 / (binomial(6, k) k (6 - k)), are as 12 : 3 : 2 for k = 1, 2, 3.
    phi, _ = fit(Coalitions("shapley"), embeddings, lambda size: [0, 12, 3, 2, 3, 12, 0][size])
    for head in heads(embeddings.shape[-1]):
        for image, y in itertools.product(range(2), range(head.out_features)):
            expected = marginal_values(head(embeddings[image])[:, y], shapley)
            found = phi[image].float() @ head.weight[y]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_samples_converge_to_brute_force_within_their_standard_error(cnn, game) -> None:
    pixel_values, embeddings = game
    phi, _ = fit(Coalitions("independent"), embeddings, lambda size: 1)
    errors = []
    for number in (64, 1024):
        found = sampled_meta_attribution(cnn, pixel_values, (ROWS, COLUMNS), number, "independent")
        kept, removed = found  # unpacks
        off = (kept - removed).double() - phi
        errors.append(off.square().mean().item())
        z = off / found.standard_error
        assert 0.5 < z.square().mean().sqrt() < 1.5  # neither boasting nor too modest
    assert errors[1] < errors[0] / 4


def test_conditional_means_by_counting(cnn, game) -> None:
    """kept is the mean embedding over the coalitions with z, here by looking each of many draws up."""
    pixel_values, embeddings = game
    for how in (Coalitions("independent"), Coalitions("independent", prob=0.3)):
        chance = torch.where(SETS, how.prob, 1 - how.prob).prod(1)
        kept, removed = sampled_meta_attribution(cnn, pixel_values, (ROWS, COLUMNS), 4000, how)
        for z in range(PATCHES):
            for with_z, found in ((SETS[:, z], kept), (~SETS[:, z], removed)):
                weights = chance * with_z
                expected = (weights[:, None] * embeddings).sum(1) / weights.sum()
                scale = (embeddings - embeddings.mean(1, keepdim=True)).std()
                assert (found[:, z] - expected).abs().max() < 0.15 * scale


def test_shapley_scores_share_out_the_whole_logit(cnn, images) -> None:
    pixel_values = images(2, 32)
    found = sampled_meta_attribution(cnn, pixel_values, 4, 40, "shapley")
    total = (found.kept - found.removed).sum(1)
    with torch.no_grad():
        expected = cnn.embed(pixel_values) - cnn.embed(torch.zeros_like(pixel_values))
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["smooth", "independent", "uniform", "shapley"])
def test_an_image_is_answered_alike_alone_and_in_chunks(cnn, images, name) -> None:
    pixel_values = images(3, 32)
    whole = sampled_meta_attribution(cnn, pixel_values, 4, 24, name)
    for some in (
        sampled_meta_attribution(cnn, pixel_values, 4, 24, name, chunk_size=5),
        sampled_meta_attribution(cnn, pixel_values, 4, 24, Coalitions(name)),
    ):
        torch.testing.assert_close(some.kept, whole.kept, rtol=1e-3, atol=1e-4)
    alone = sampled_meta_attribution(cnn, pixel_values[1:2], 4, 24, name)
    torch.testing.assert_close(alone.kept, whole.kept[1:2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(alone.removed, whole.removed[1:2], rtol=1e-3, atol=1e-4)
    assert whole.standard_error.shape == whole.kept.shape and (whole.standard_error >= 0).all()


def test_fewer_samples_than_patches_still_give_finite_maps(cnn, images) -> None:
    kept, removed = sampled_meta_attribution(cnn, images(1, 32), 8, 10)
    assert torch.isfinite(kept).all() and torch.isfinite(removed).all()


def test_the_method_is_transfer_of_it(cnn, images) -> None:
    pixel_values, class_idx = images(2, 32), torch.tensor([1, 0])
    scores = tve_hf.methods.explain("sampled", cnn, pixel_values, class_idx, 4, n_samples=30)
    kept, removed = tve_hf.sampled_meta_attribution(cnn, pixel_values, 4, 30)
    expected = tve_hf.transfer(kept, removed, cnn, class_idx, "prob", 4)
    torch.testing.assert_close(scores, expected.unflatten(1, (4, 4)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 7}, "num_samples is 7, but coalitions come in pairs; choose an even number"),
        ({"num_samples": 0}, "num_samples is 0, but coalitions come in pairs"),
        ({"coalitions": "rough"}, "Unknown distribution of coalitions 'rough'; choose one of"),
        ({"coalitions": Coalitions("smooth", scale=9.0)}, "coalition_scale is 9.0.*choose one above 0 and below 4"),
        ({"pixel_values": torch.zeros(0, 3, 32, 32)}, "holds no image; pass a batch of at least one"),
    ],
)
def test_mistakes_are_named(cnn, images, changed, message) -> None:
    arguments = {"pixel_values": images(1, 32), "grid_size": 4} | changed
    with pytest.raises(ValueError, match=message):
        sampled_meta_attribution(cnn, **arguments)


def test_as_many_pairs_as_patches_are_not_fitted_to_the_last() -> None:
    """Equal pairs have equal embeddings; where all else is fitted, that looks like no error at all."""
    generator = torch.Generator().manual_seed(1)
    inner, outer = (
        torch.randn(100, 200, generator=generator).double(),
        torch.randn(200, 8, generator=generator).double(),
    )

    def phi(pairs: int) -> Tensor:
        keep = Coalitions("smooth").draw(1, 2 * pairs, (10, 10), torch.Generator().manual_seed(0))[0]
        values = ((keep.double() - 0.5) @ inner).tanh() @ outer  # far from additive
        zero = torch.zeros(1, 8, dtype=torch.float64)
        regression = Regression(keep, Coalitions("smooth"), zero, zero)
        regression.add(slice(0, len(keep)), values[None])
        return regression.solve()[0]

    truth = phi(5000)
    few, as_many, more = ((phi(pairs) - truth).square().mean().item() for pairs in (80, 100, 120))
    assert as_many <= 1.2 * max(few, more)
