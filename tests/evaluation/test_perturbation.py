"""Perturbation, insertion, deletion and single deletion, by hand and against loops over masked images."""

import itertools
from fractions import Fraction

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from tve_hf.classifiers import SplitClassifier, split_classifier
from tve_hf.evaluation.perturbation import insertion_deletion, perturbation, single_deletion
from tve_hf.fidelity import fidelity, logger
from tve_hf.patches import REMOVALS

# Ten pixels in a row, one for each patch: the probability of class 0 is their sum.
PIXELS = torch.tensor([[[[0.15, 0.05, 0.05, 0.3, 0.1, 0.01, 0.04, 0.02, 0.02, 0.01]]]])


@pytest.fixture(scope="module")
def additive(processor_of) -> SplitClassifier:
    """p(class 0) = sum of the pixels of the image, p(class 1) the rest."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 1, bias=False), nn.Linear(1, 2)).eval()
    nn.init.ones_(model[1].weight)
    return split_classifier(model, processor_of(1, 1, 10)).with_head(lambda p: torch.cat([p, 1 - p], -1).log())


def test_perturbation_by_hand(additive) -> None:
    found = perturbation(additive, PIXELS, PIXELS[:, 0], torch.tensor([0]))
    torch.testing.assert_close(found.share, torch.arange(10) / 10)
    # Descending, p is .75, .45, .3, ...; ascending .75, .74, .73, .71, .69, .65, .6, .55, .45, .3.
    assert found.positive.tolist() == [[1] + [0] * 9]
    assert found.negative.tolist() == [[1] * 8 + [0] * 2]
    # Trapezes of width 1/10.
    assert found.positive_auc.tolist() == pytest.approx([0.05])
    assert found.negative_auc.tolist() == pytest.approx([0.75])
    other = perturbation(additive, PIXELS, PIXELS[:, 0], torch.tensor([1]))  # wins wherever class 0 loses
    assert torch.equal(other.positive, 1 - found.positive)
    assert other.negative_auc.tolist() == pytest.approx([0.15])


def test_insertion_and_deletion_by_hand(additive) -> None:
    found = insertion_deletion(
        additive, PIXELS, PIXELS[:, 0], torch.tensor([0]), num_levels=3, insertion_removal="zero"
    )
    # The best five patches hold .15 + .05 + .05 + .3 + .1.
    torch.testing.assert_close(found.insertion, torch.tensor([[0, 0.65, 0.75]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.deletion, torch.tensor([[0.75, 0.1, 0]]), rtol=0, atol=1e-6)
    assert found.insertion_auc.item() == pytest.approx((0.65 / 2 + 0.7) / 2)
    assert found.deletion_auc.item() == pytest.approx((0.85 / 2 + 0.05) / 2)


def test_single_deletion_by_hand(additive) -> None:
    found = single_deletion(
        additive, PIXELS.expand(2, -1, -1, -1), PIXELS[:, 0].expand(2, -1, -1), torch.tensor([0, 1])
    )
    torch.testing.assert_close(found.drop, torch.cat([PIXELS[0, 0], -PIXELS[0, 0]]), rtol=0, atol=1e-6)
    assert found.pearson.tolist() == pytest.approx([1, -1], abs=1e-5)


def test_single_deletion_of_a_constant_map_has_no_correlation(additive) -> None:
    found = single_deletion(additive, PIXELS, torch.ones(1, 1, 10), torch.tensor([0]))
    assert found.pearson.isnan().all() and found.spearman.isnan().all()
    assert torch.isfinite(found.drop).all()


class Naive:
    """One masked image after the other, of one image (3, H, W) and map (rows, cols)."""

    def __init__(self, model: nn.Module, image: Tensor, scores: Tensor) -> None:
        self.model, self.image = model, image
        self.rows, self.columns = scores.shape
        self.cells = list(itertools.product(range(self.rows), range(self.columns)))
        self.descending = sorted(self.cells, key=lambda cell: (-scores[cell].item(), cell))
        self.ascending = sorted(self.cells, key=lambda cell: (scores[cell].item(), cell))

    @torch.no_grad()
    def probabilities(self, kept: list[tuple[int, int]], removal: str) -> Tensor:
        height, width = self.image.shape[1] // self.rows, self.image.shape[2] // self.columns
        keep = torch.zeros(1, 1, 1, *self.image.shape[1:], dtype=torch.bool)
        for row, column in kept:
            keep[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = True
        fill = REMOVALS[removal](self.image.unsqueeze(0), keep).expand(1, 1, *self.image.shape)[0, 0]
        masked = torch.where(keep[0, 0], self.image, fill)
        return self.model(masked.unsqueeze(0)).double().softmax(-1)[0]


def _trapezes(curve: list[float], last: float) -> float:
    return last * sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / (len(curve) - 1)


@pytest.mark.parametrize(
    ("height", "width", "grid", "levels", "removal"),
    [(32, 32, (4, 4), 10, "zero"), (24, 40, (3, 5), 10, "blur"), (24, 40, (3, 5), 16, "road")],
)
def test_all_equal_a_loop(shared_model, images, height, width, grid, levels, removal) -> None:
    model = shared_model("cnn")
    pixel_values, class_idx = images(3, height, width), torch.tensor([1, 4, 2])
    scores = images(3, *grid, channels=1, seed=3)[:, 0]
    scores[0, 0] = scores[0, 1]  # ties
    with torch.no_grad():
        class_idx[0] = model(pixel_values).argmax(-1)[0]
    classifier = split_classifier(model)
    of = {"removal": removal, "chunk_size": 7}
    perturbed = perturbation(classifier, pixel_values, scores, class_idx, levels, **of)
    inserted = insertion_deletion(
        classifier, pixel_values, scores, class_idx, levels, insertion_removal=removal, chunk_size=7
    )
    single = single_deletion(classifier, pixel_values, scores, class_idx, **of)
    num_patches = grid[0] * grid[1]
    for b in range(3):
        naive, y = Naive(model, pixel_values[b], scores[b]), int(class_idx[b])
        sizes = [round(Fraction(9, 10) * level / (levels - 1) * num_patches) for level in range(levels)]
        for order, curve, auc in (
            (naive.descending, perturbed.positive, perturbed.positive_auc),
            (naive.ascending, perturbed.negative, perturbed.negative_auc),
        ):
            expected = [float(naive.probabilities(order[size:], removal).argmax() == y) for size in sizes]
            assert curve[b].tolist() == expected
            assert auc[b].item() == pytest.approx(_trapezes(expected, 0.9), abs=1e-6)
        sizes = [round(Fraction(level, levels - 1) * num_patches) for level in range(levels)]
        insertion = [naive.probabilities(naive.descending[:size], removal)[y].item() for size in sizes]
        deletion = [naive.probabilities(naive.descending[size:], "zero")[y].item() for size in sizes]
        assert inserted.insertion[b].tolist() == pytest.approx(insertion, abs=1e-6)
        assert inserted.deletion[b].tolist() == pytest.approx(deletion, abs=1e-6)
        assert inserted.insertion_auc[b].item() == pytest.approx(_trapezes(insertion, 1), abs=1e-6)
        assert inserted.deletion_auc[b].item() == pytest.approx(_trapezes(deletion, 1), abs=1e-6)
        full = naive.probabilities(naive.cells, removal)[y]
        drop = [
            (full - naive.probabilities([other for other in naive.cells if other != cell], removal)[y]).item()
            for cell in naive.cells
        ]
        assert single.drop[b].tolist() == pytest.approx(drop, abs=1e-6)
        flat = scores[b].flatten().double().numpy()
        assert single.pearson[b].item() == pytest.approx(pearsonr(flat, drop).statistic, abs=1e-4)
        assert single.spearman[b].item() == pytest.approx(spearmanr(flat, drop).statistic, abs=0.02)  # near ties
    assert 0 < perturbed.positive.mean() < 1 or 0 < perturbed.negative.mean() < 1


def test_no_pass_is_asked_twice(build, images) -> None:
    model = build("cnn")
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    classifier = split_classifier(model)
    inputs = classifier, images(2, 32), torch.arange(32.0).view(2, 4, 4), torch.tensor([0, 1])
    for metric, passes in ((fidelity, 26), (perturbation, 19), (insertion_deletion, 27), (single_deletion, 17)):
        seen.clear()
        metric(*inputs)
        assert sum(seen) == 2 * passes


def test_constant_maps_are_warned_of(additive, monkeypatch) -> None:
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    maps = torch.stack([PIXELS[0, 0], torch.full((1, 10), 0.5)])
    perturbation(additive, PIXELS.expand(2, -1, -1, -1), maps, torch.tensor([0, 0]))
    assert said == [
        "1 of 2 maps are constant and rank nothing: their patches are taken in the order of their numbers, so their "
        "results mean nothing."
    ]
    perturbation(additive, PIXELS, PIXELS[:, 0], torch.tensor([0]))
    assert len(said) == 1


@pytest.mark.parametrize("metric", [perturbation, insertion_deletion, single_deletion])
@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.full((1, 1, 10), torch.nan), {}, "scores hold NaN or infinity"),
        (torch.zeros(2, 1, 10), {}, "2 maps were given for 1 images"),
        (torch.zeros(1, 7), {"grid_size": (1, 10)}, "7 patches do not fill a grid of 1 x 10"),
        (
            torch.zeros(1, 1, 10),
            {"class_idx": torch.tensor([2])},
            r"class_idx \[2\] must name, for each of 1 images, a class between 0 and 1",
        ),
        (
            torch.zeros(1, 1, 10),
            {"class_idx": torch.tensor([0, 0])},
            r"class_idx \[0, 0\] must name, for each of 1 images",
        ),
    ],
)
def test_bad_input_is_refused(additive, metric, scores, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        metric(additive, PIXELS, scores, **({"class_idx": torch.tensor([0])} | options))


@pytest.mark.parametrize("metric", [perturbation, insertion_deletion])
@pytest.mark.parametrize("levels", [1, 12])
def test_too_few_and_too_many_levels_are_refused(additive, metric, levels) -> None:
    with pytest.raises(ValueError, match=f"num_levels = {levels} must lie between 2 .* 11"):
        metric(additive, PIXELS, PIXELS[:, 0], torch.tensor([0]), levels)


@pytest.mark.parametrize("metric", [perturbation, insertion_deletion, single_deletion])
def test_an_empty_batch_is_refused(additive, metric) -> None:
    with pytest.raises(ValueError, match="holds no image; pass a batch of at least one"):
        metric(additive, PIXELS[:0], torch.zeros(0, 1, 10), torch.zeros(0, dtype=torch.int64))
