"""Coalitions by the Shapley kernel, whose game it is, and a trained explainer against all coalitions, enumerated."""

import copy
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import SIDE, make_explainer, make_shapley_explainer, save_classifier
from torch import Tensor, nn

import tve_hf
from tve_hf import methods
from tve_hf.vit_shapley.coalitions import (
    check_head,
    coalition_values,
    fit_shapley,
    head_fingerprint,
    random_coalitions,
    sample_coalitions,
    size_distribution,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def enumerated(num_patches: int) -> Tensor:
    """All 2^N coalitions; number i holds patch z if bit z of i is set."""
    numbers = torch.arange(2**num_patches)
    return (numbers[:, None] >> torch.arange(num_patches)) % 2 == 1


def exact_shapley_values(values: Tensor) -> Tensor:
    """Average, over all orders in which patches can join, what each adds: values (2^N, C) -> (N, C)."""
    num_patches = round(math.log2(len(values)))
    total = torch.zeros(num_patches, values.shape[1], dtype=values.dtype)
    orders = list(itertools.permutations(range(num_patches)))
    for order in orders:
        present = 0
        for patch in order:
            total[patch] += values[present | 1 << patch] - values[present]
            present |= 1 << patch
    return total / len(orders)


def least_squares(keep: Tensor, values: Tensor, null: Tensor, grand: Tensor) -> Tensor:
    """The phi (N, C) with sum phi = grand - null that fits null + keep phi to values best, by its normal equations."""
    x = keep.double()
    n = x.shape[1]
    system = torch.ones(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[n, n] = x.T @ x, 0
    right = torch.cat([x.T @ (values - null), (grand - null)[None]])
    return torch.linalg.solve(system, right)[:n]


# --- the kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_patches", [2, 3, 9, 196])
def test_size_distribution_is_the_kernel_times_the_number_of_coalitions(num_patches) -> None:
    def kernel(k: int) -> float:
        return (num_patches - 1) / (math.comb(num_patches, k) * k * (num_patches - k))

    weights = [math.comb(num_patches, k) * kernel(k) for k in range(1, num_patches)]
    expected = np.array(weights) / sum(weights)
    np.testing.assert_allclose(size_distribution(num_patches).numpy(), expected, rtol=1e-12)


def test_sampled_sizes_follow_it() -> None:
    keep = sample_coalitions(500, 9, 200, seeded())
    assert keep.shape == (500, 200, 9) and keep.dtype == torch.bool
    independent = keep[:, ::2].sum(-1).flatten()  # one of each pair
    counts = torch.bincount(independent, minlength=10).double()
    assert counts[0] == counts[9] == 0  # they would teach nothing
    p = size_distribution(9)
    deviation = (counts[1:9] / len(independent) - p) / (p * (1 - p) / len(independent)).sqrt()
    assert deviation.abs().max() < 4.5
    assert torch.equal(keep[:, 1::2], ~keep[:, ::2])


def test_coalitions_of_a_size_are_equally_likely() -> None:
    keep = random_coalitions(torch.full((30_000,), 2), 5, seeded())
    counts = Counter(tuple(row.nonzero().flatten().tolist()) for row in keep)
    assert len(counts) == 10
    assert all(abs(count - 3000) < 4.5 * math.sqrt(3000 * 0.9) for count in counts.values())
    sizes = torch.tensor([[0, 5], [3, 1]])
    assert torch.equal(random_coalitions(sizes, 5, seeded()).sum(-1), sizes)


def test_coalitions_depend_on_the_generator_alone() -> None:
    first = sample_coalitions(3, 9, 4, seeded(5))
    torch.manual_seed(1)
    assert torch.equal(sample_coalitions(3, 9, 4, seeded(5)), first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(sample_coalitions(3, 9, 4, seeded(6)), first)


@pytest.mark.parametrize(("masks", "patches", "message"), [(3, 9, "even"), (0, 9, "even"), (2, 1, "at least two")])
def test_impossible_coalitions_are_refused(masks, patches, message) -> None:
    with pytest.raises(ValueError, match=message):
        sample_coalitions(1, patches, masks)


def test_least_squares_recovers_a_linear_game() -> None:
    worth = torch.randn(7, 3, generator=seeded(), dtype=torch.float64)
    null = torch.randn(3, generator=seeded(1), dtype=torch.float64)
    keep = sample_coalitions(1, 7, 32, seeded(2))[0]
    found = least_squares(keep, null + keep.double() @ worth, null, null + worth.sum(0))
    torch.testing.assert_close(found, worth, rtol=0, atol=1e-9)


def test_least_squares_approaches_the_shapley_values_of_any_game() -> None:
    """Which only the right sizes do: coalitions that are uniform among all give other values."""
    values = torch.rand(2**5, 4, generator=seeded(), dtype=torch.float64)
    exact = exact_shapley_values(values)

    def error(keep: Tensor) -> float:
        number = (keep * 2 ** torch.arange(5)).sum(-1)
        found = least_squares(keep, values[number], values[0], values[-1])
        return (found - exact).abs().max().item()

    assert error(sample_coalitions(1, 5, 200_000, seeded(1))[0]) < 0.005
    assert error(torch.rand(200_000, 5, generator=seeded(1)) < 0.5) > 0.02


# --- the game of a classifier ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_classifier(tmp_path_factory):
    return tve_hf.split_classifier(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture
def classifier(shared_classifier):
    return copy.deepcopy(shared_classifier)


@torch.no_grad()
def test_coalition_values_are_probabilities_of_zeroed_images(classifier, images) -> None:
    pixel_values = images(2, SIDE)
    keep = torch.rand(2, 3, 4, generator=seeded()) < 0.5
    found = coalition_values(classifier, pixel_values, keep, 2)
    for b in range(2):
        for k in range(3):
            masked = pixel_values[b].clone()
            for patch in range(4):
                row, column = divmod(patch, 2)
                if not keep[b, k, patch]:
                    masked[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 0
            expected = classifier.backbone.model(masked[None]).logits.softmax(-1)[0]
            torch.testing.assert_close(found[b, k], expected, rtol=1e-4, atol=1e-6)


def trained_explainer(classifier, pixel_values: Tensor, grid: tuple[int, int], steps: int):
    """A few steps on a few images, which it may learn by heart: the objective is tested, not what it generalises."""
    explainer = make_shapley_explainer(classifier, grid, spread=False).train()
    with torch.no_grad():
        seen = classifier(pixel_values)
    inputs = {
        "pixel_values": pixel_values,
        "features": seen.features,
        "embeddings": seen.embeddings,
        "probabilities": seen.logits.softmax(-1),
    }
    optimizer = torch.optim.Adam(explainer.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = seeded(3)
    for _ in range(steps):
        keep = sample_coalitions(len(pixel_values), grid[0] * grid[1], 8, generator)
        values = coalition_values(classifier, pixel_values, keep, grid)
        explainer(**inputs, keep=keep, coalition_values=values).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return explainer.eval()


def test_a_trained_explainer_approaches_the_shapley_values_of_all_classes(classifier, images) -> None:
    grid, pixel_values = (2, 2), images(4, SIDE)
    every = enumerated(4).expand(4, -1, -1)
    exact = torch.stack([exact_shapley_values(v) for v in coalition_values(classifier, pixel_values, every, grid)])

    def found(explainer) -> Tensor:
        options = {"shapley_explainer": explainer}
        maps = [
            methods.explain("vit_shapley", classifier, pixel_values, torch.full((4,), c), **options) for c in range(7)
        ]
        return torch.stack(maps, -1).flatten(1, 2)

    def error(explainer) -> float:
        """Relative to sharing out evenly, which any new explainer does."""
        return ((found(explainer) - exact).square().sum() / (exact - exact.mean(1, True)).square().sum()).item()

    assert error(make_shapley_explainer(classifier, grid, spread=False)) == pytest.approx(1, abs=1e-3)
    assert error(trained_explainer(classifier, pixel_values, grid, 60)) < 0.03


# --- whose game it is -----------------------------------------------------------------------------------------------


def test_the_method_reads_its_own_features_and_adds_up(classifier, images) -> None:
    pixel_values, class_idx = images(2, SIDE), torch.tensor([6, 0])
    explainer = make_shapley_explainer(classifier)
    scores = methods.explain("vit_shapley", classifier, pixel_values, class_idx, shapley_explainer=explainer)
    assert scores.shape == (2, 4, 4)
    with torch.no_grad():
        prob = classifier(pixel_values).logits.softmax(-1)
    expected = (prob - explainer.null)[[0, 1], class_idx].tolist()
    assert scores.sum((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)
    other = classifier.reading(classifier.backbone.feature_names[:1])
    again = methods.explain("vit-shapley", other, pixel_values, class_idx, shapley_explainer=explainer)
    assert torch.equal(again, scores)
    with pytest.raises(ValueError, match=r"grid is \(4, 4\), not \(2, 2\)"):
        methods.explain("vit_shapley", classifier, pixel_values, class_idx, 2, shapley_explainer=explainer)


def nudged(classifier, share: float):
    head = copy.deepcopy(classifier.head.module)
    with torch.no_grad():
        head.weight.add_(share * head.weight.std() * torch.randn(head.weight.shape, generator=seeded()))
    return classifier.with_head(head, classifier.id2label)


def permuted(classifier):
    return classifier.with_head(lambda e: classifier.head(e)[..., [1, 0, 2, 3, 4, 5, 6]], classifier.id2label)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: nudged(c, 0.1),
        lambda c: c.with_head(lambda e: 1.1 * c.head(e), c.id2label),
        permuted,
        lambda c: c.with_head(c.head, c.id2label, multi_label=True),
        lambda c: c.with_head(torch.randn(7, c.embedding_dim, generator=seeded()), c.id2label),
    ],
    ids=["other weights", "other temperature", "other order", "sigmoid", "prototypes"],
)
def test_another_head_is_refused(classifier, images, change) -> None:
    explainer = make_shapley_explainer(classifier)
    other = change(classifier)
    with pytest.raises(ValueError, match=r"bound to the head of tiny, and .* has another; train one for this head"):
        methods.explain("vit_shapley", other, images(1, SIDE), torch.tensor([0]), 4, shapley_explainer=explainer)
    with pytest.raises(ValueError, match="bound to the head"):
        fit_shapley(explainer, other)
    check_head(make_shapley_explainer(other), other)


def test_another_number_of_classes_is_refused(classifier) -> None:
    explainer = make_shapley_explainer(classifier)
    with pytest.raises(ValueError, match="bound to a head of 7 classes, but .* has 2; train one"):
        check_head(explainer, classifier.with_head(nn.Linear(classifier.embedding_dim, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_head_in_half_precision_is_known_again(classifier, dtype) -> None:
    explainer = make_shapley_explainer(classifier)
    fit_shapley(explainer, copy.deepcopy(classifier).to(dtype))
    wrapped = classifier.with_head(lambda e: classifier.head(e), classifier.id2label)  # without weights of its own
    assert head_fingerprint(wrapped) == pytest.approx(head_fingerprint(classifier), rel=1e-3, abs=1e-4)


def test_another_backbone_is_refused_and_a_tuned_one_warned_of(classifier, tmp_path, caplog) -> None:
    explainer = make_shapley_explainer(classifier)
    assert fit_shapley(explainer, classifier).backbone.feature_names == classifier.backbone.feature_names
    other = tve_hf.split_classifier(save_classifier(tmp_path, num_hidden_layers=3))
    with pytest.raises(ValueError, match="pre-trained for the backbone 'tiny', which is not that of"):
        fit_shapley(explainer, other)
    options = {"explainer": make_explainer(classifier), "shapley_explainer": explainer}
    with pytest.raises(TypeError, match="takes no 'explainer': did you mean 'shapley_explainer'"):
        methods.explain("vit_shapley", classifier, classifier.probe(), torch.tensor([0, 1]), **options)
