"""Fidelity of a classifier whose every probability is known, and against a naive loop."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import tve_hf
from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.fidelity import Fidelity, fidelity
from tve_hf.patches import REMOVALS

# Four pixels, one for each patch of a 2 x 2 grid: the probability of class 0 is their sum.
PIXELS = torch.tensor([[[[0.1, 0.4], [0.2, 0.1]]]])


@pytest.fixture(scope="module")
def additive(processor_of) -> SplitClassifier:
    """p(class 0) = sum of the pixels of the image, p(class 1) the rest."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False), nn.Linear(1, 2)).eval()
    nn.init.ones_(model[1].weight)
    return split_classifier(model, processor_of(1, 2, 2)).with_head(lambda p: torch.cat([p, 1 - p], -1).log())


def test_the_true_ranking_by_hand(additive) -> None:
    found = fidelity(additive, PIXELS, PIXELS[:, 0], torch.tensor([0]), num_levels=5)
    # S* holds 4, 3, 2, 1, 0 patches, of which the sums are 0.8, 0.7, 0.6, 0.4 and 0.
    torch.testing.assert_close(found.sparsity, torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    torch.testing.assert_close(found.plus, torch.tensor([[0.8, 0.7, 0.6, 0.4, 0]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.minus, torch.tensor([[0, 0.1, 0.2, 0.4, 0.8]]), rtol=0, atol=1e-6)
    # Trapezes of width 1/4: (0.8 / 2 + 0.7 + 0.6 + 0.4 + 0) / 4 and (0 + 0.1 + 0.2 + 0.4 + 0.8 / 2) / 4.
    assert found.plus_auc.tolist() == pytest.approx([0.525])
    assert found.minus_auc.tolist() == pytest.approx([0.275])
    assert found.gap.tolist() == pytest.approx([0.25])


def test_the_package_exports_the_function_and_what_it_returns(additive) -> None:
    assert {"Fidelity", "fidelity"} <= set(tve_hf.__all__)
    curves = tve_hf.fidelity(additive, PIXELS, PIXELS[:, 0], torch.tensor([0]), num_levels=5)
    assert type(curves) is tve_hf.Fidelity is Fidelity
    # Areas follow from the curves, whoever makes them: a triangle of height 1, and of height 0.5.
    made = tve_hf.Fidelity(torch.tensor([0, 0.5, 1]), torch.tensor([[1, 0.5, 0]]), torch.tensor([[0, 0.25, 0.5]]))
    assert (made.plus_auc.item(), made.minus_auc.item(), made.gap.item()) == (0.5, 0.25, 0.25)


def test_the_reversed_ranking_by_hand(additive) -> None:
    found = fidelity(additive, PIXELS, -PIXELS[:, 0], torch.tensor([0]), num_levels=5)
    torch.testing.assert_close(found.plus, torch.tensor([[0.8, 0.4, 0.2, 0.1, 0]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.minus, torch.tensor([[0, 0.4, 0.6, 0.7, 0.8]]), rtol=0, atol=1e-6)
    assert found.gap.tolist() == pytest.approx([-0.25])


def test_the_other_class_by_hand(additive) -> None:
    found = fidelity(additive, PIXELS, PIXELS[:, 0], torch.tensor([1]), num_levels=5)
    # What speaks for class 0 speaks against class 1, as much.
    torch.testing.assert_close(found.plus, torch.tensor([[-0.8, -0.7, -0.6, -0.4, 0]]), rtol=0, atol=1e-6)
    assert found.gap.tolist() == pytest.approx([-0.25])


def test_fewer_levels_by_hand(additive) -> None:
    found = fidelity(additive, PIXELS, PIXELS[:, 0], torch.tensor([0]), num_levels=2)
    torch.testing.assert_close(found.plus, torch.tensor([[0.8, 0]]), rtol=0, atol=1e-6)
    assert found.plus_auc.tolist() == pytest.approx([0.4])
    found = fidelity(additive, PIXELS, PIXELS[:, 0], torch.tensor([0]), num_levels=3)
    torch.testing.assert_close(found.minus, torch.tensor([[0, 0.2, 0.8]]), rtol=0, atol=1e-6)
    assert found.minus_auc.tolist() == pytest.approx([0.3])


def test_ties_go_to_the_lower_patch_number(additive) -> None:
    found = fidelity(additive, PIXELS, torch.zeros(1, 2, 2), torch.tensor([0]), num_levels=5)
    # Patches 0, 1, 2, 3 hold 0.1, 0.4, 0.2, 0.1; S* is always the first few.
    torch.testing.assert_close(found.minus, torch.tensor([[0, 0.1, 0.3, 0.7, 0.8]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.plus, torch.tensor([[0.8, 0.7, 0.5, 0.1, 0]]), rtol=0, atol=1e-6)


def test_only_the_order_of_the_scores_counts(additive) -> None:
    one = fidelity(additive, PIXELS, torch.tensor([[1.0, 4, 3, 2]]), torch.tensor([0]), num_levels=5)
    other = fidelity(additive, PIXELS, torch.tensor([[-9.0, 1e4, 0.1, 0.0]]), torch.tensor([0]), num_levels=5)
    assert torch.equal(one.plus, other.plus)
    assert torch.equal(one.minus, other.minus)


def test_images_of_a_batch_have_their_own_ranking_and_class(additive) -> None:
    scores = torch.cat([PIXELS[:, 0], -PIXELS[:, 0]])
    found = fidelity(additive, PIXELS.expand(2, -1, -1, -1), scores, torch.tensor([0, 1]), num_levels=5)
    for b in range(2):
        alone = fidelity(additive, PIXELS, scores[b : b + 1], torch.tensor([b]), num_levels=5)
        torch.testing.assert_close(found.plus[b], alone.plus[0])
        torch.testing.assert_close(found.minus_auc[b], alone.minus_auc[0])


@torch.no_grad()
def _naive(
    model: nn.Module, image: Tensor, scores: Tensor, y: int, levels: int, removal: str
) -> tuple[list[float], list[float], float, float]:
    """Curves and areas of one image (3, H, W) and map (rows, cols), one masked image after the other."""
    rows, columns = scores.shape
    height, width = image.shape[1] // rows, image.shape[2] // columns
    cells = list(itertools.product(range(rows), range(columns)))
    ranked = sorted(cells, key=lambda cell: (-scores[cell].item(), cell))

    def probability(kept: list[tuple[int, int]]) -> float:
        keep = torch.zeros(1, 1, 1, *image.shape[1:], dtype=torch.bool)
        for row, column in kept:
            keep[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = True
        fill = REMOVALS[removal](image.unsqueeze(0), keep).expand(1, 1, *image.shape)[0, 0]
        masked = torch.where(keep[0, 0], image, fill)
        return model(masked.unsqueeze(0)).double().softmax(-1)[0, y].item()

    full = probability(cells)
    plus, minus = [], []
    for level in range(levels):
        size = round((1 - Fraction(level, levels - 1)) * len(cells))
        plus.append(full - probability(ranked[size:]))
        minus.append(full - probability(ranked[:size]))
    areas = [sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / (levels - 1) for curve in (plus, minus)]
    return plus, minus, *areas


@pytest.mark.parametrize("removal", sorted(REMOVALS))
@pytest.mark.parametrize(("height", "width", "grid", "levels"), [(32, 32, (4, 4), 7), (24, 40, (3, 5), 14)])
def test_fidelity_equals_a_loop(shared_model, images, removal, height, width, grid, levels) -> None:
    model = shared_model("cnn")
    pixel_values, class_idx = images(2, height, width), torch.tensor([1, 4])
    scores = images(2, *grid, channels=1, seed=3)[:, 0]
    scores[0, 0] = scores[0, 1]  # ties
    found = fidelity(split_classifier(model), pixel_values, scores, class_idx, levels, removal=removal, chunk_size=7)
    for b in range(2):
        plus, minus, plus_auc, minus_auc = _naive(
            model, pixel_values[b], scores[b], int(class_idx[b]), levels, removal
        )
        assert max(map(abs, plus)) > 0.01
        assert found.plus[b].tolist() == pytest.approx(plus, abs=1e-6)
        assert found.minus[b].tolist() == pytest.approx(minus, abs=1e-6)
        assert found.plus_auc[b].item() == pytest.approx(plus_auc, abs=1e-6)
        assert found.minus_auc[b].item() == pytest.approx(minus_auc, abs=1e-6)


def test_flat_scores_with_a_grid_are_a_map(shared_model, images) -> None:
    classifier = split_classifier(shared_model("cnn"))
    scores = images(1, 3, 5, channels=1)[:, 0]
    one = fidelity(classifier, images(1, 24, 40), scores, torch.tensor([0]), 5)
    other = fidelity(classifier, images(1, 24, 40), scores.flatten(1), torch.tensor([0]), 5, grid_size=(3, 5))
    assert torch.equal(one.plus, other.plus)


def test_a_multi_label_head_is_read_through_a_sigmoid(additive) -> None:
    several = additive.with_head(lambda p: torch.cat([p, 1 - p], -1), multi_label=True)
    found = fidelity(several, PIXELS, PIXELS[:, 0], torch.tensor([0]), num_levels=2)
    expected = torch.sigmoid(torch.tensor(0.8)) - 0.5
    torch.testing.assert_close(found.plus[0, 0], expected)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.full((1, 2, 2), torch.nan), {}, "scores hold NaN or infinity"),
        (torch.full((1, 2, 2), torch.inf), {}, "scores hold NaN or infinity"),
        (torch.zeros(2, 2, 2), {}, "2 maps were given for 1 images; pass one map for each"),
        (torch.zeros(1, 3), {}, "3 patches do not fill a grid of 2 x 2"),
        (torch.zeros(1, 6), {"grid_size": (2, 2)}, "6 patches do not fill a grid of 2 x 2"),
        (torch.zeros(1, 3, 3), {}, "3 x 3 patches does not divide an image of 2 x 2"),
        (torch.zeros(1, 2, 2), {"num_levels": 1}, "num_levels = 1 must lie between 2 .* 5"),
        (torch.zeros(1, 2, 2), {"num_levels": 6}, "num_levels = 6 must lie between 2 .* 5"),
        (
            torch.zeros(1, 2, 2),
            {"class_idx": 2},
            r"class_idx \[2\] must name, for each of 1 images, a class between 0 and 1",
        ),
        (torch.zeros(1, 2, 2), {"class_idx": -1}, r"class_idx \[-1\] must name, for each of 1 images, a class"),
        (torch.zeros(1, 2, 2), {"removal": "noise"}, "Unknown removal operator 'noise'"),
    ],
)
def test_bad_input_is_refused(additive, scores, options, message) -> None:
    options = {"class_idx": 0, "num_levels": 5} | options
    options["class_idx"] = torch.tensor([options["class_idx"]])
    with pytest.raises(ValueError, match=message):
        fidelity(additive, PIXELS, scores, **options)


def test_an_empty_batch_is_refused(additive) -> None:
    with pytest.raises(ValueError, match="holds no image; pass a batch of at least one"):
        fidelity(additive, PIXELS[:0], torch.zeros(0, 2, 2), torch.zeros(0, dtype=torch.int64), num_levels=5)
