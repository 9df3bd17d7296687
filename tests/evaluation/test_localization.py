"""Localisation by hand, and against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tve_hf.evaluation.localization import average_precision, localization, point_iou

metrics = pytest.importorskip("sklearn.metrics")


def _blobs(batch: int, height: int, width: int) -> Tensor:
    """A rectangle in each image, of another size and place in each."""
    masks = torch.zeros(batch, height, width, dtype=torch.bool)
    for i in range(batch):
        masks[i, i + 1 : i + 1 + height // 2, 2 : width // (i + 2) + 2] = True
    return masks


def test_a_map_at_the_masks_size_by_hand() -> None:
    scores = torch.tensor([[[0.0, 2.0, 6.0], [8.0, 5.0, 3.0]]])
    masks = torch.tensor([[[False, False, True], [False, True, True]]])
    found = localization(scores, masks)
    # Normalised, in eighths: 0, 2, 6 / 8, 5, 3. Above 0.5: the last of the first row, the first two of the second.
    assert found.pointing.tolist() == [0]
    assert found.pixel_accuracy.tolist() == pytest.approx([4 / 6])
    assert found.intersection.tolist() == [[2, 2]]
    assert found.union.tolist() == [[4, 4]]
    assert found.iou.tolist() == [0.5]
    # The scores of the 12, right ones marked: 8, 8* (background), 6*, 6*, 5*, 5, 3*, 3, 2, 2, 0, 0*
    # ties share a threshold: 8: 1/2, 6: 3/4 twice, 5: 4/6, 3: 5/8, 0: 6/12
    ranked = [1 / 2, 3 / 4, 3 / 4, 4 / 6, 5 / 8, 6 / 12]
    assert found.average_precision.tolist() == pytest.approx([sum(ranked) / 6])


def test_all_numbers_against_scikit_learn(images) -> None:
    scores, masks = images(4, 5, 7, channels=1)[:, 0], _blobs(4, 20, 30)
    scores[0, 2, 1] = 9  # inside its mask
    found = localization(scores, masks)
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    maps = torch.nn.functional.interpolate(((scores - low) / (high - low))[:, None], size=(20, 30), mode="bilinear")
    assert found.pointing[0] == 1
    for i in range(4):
        one, truth = maps[i, 0].flatten().numpy(), masks[i].flatten().numpy()
        assert found.pixel_accuracy[i].item() == pytest.approx(metrics.accuracy_score(truth, one > 0.5))
        iou = metrics.jaccard_score(truth, one > 0.5, average="macro")
        assert found.iou[i].item() == pytest.approx(iou, abs=1e-6)
        right = np.concatenate([truth, ~truth])
        expected = metrics.average_precision_score(right, np.concatenate([one, 1 - one]))
        assert found.average_precision[i].item() == pytest.approx(expected, abs=1e-6)
        best = np.flatnonzero(one == one.max())
        assert found.pointing[i].item() == pytest.approx(truth[best].mean())
    whole = metrics.jaccard_score(masks.flatten().numpy(), (maps > 0.5).flatten().numpy(), average="macro")
    assert found.mean_iou.item() == pytest.approx(whole, abs=1e-6)
    assert abs(whole - found.iou.mean().item()) > 1e-4  # which is another number
    assert found.mean_average_precision.item() == pytest.approx(found.average_precision.mean().item())


def test_average_precision_with_ties_against_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    for levels in (2, 5, 1000):
        scores = torch.randint(levels, (200,), generator=generator).float()
        labels = torch.rand(200, generator=generator) < 0.3
        expected = metrics.average_precision_score(labels.numpy(), scores.numpy())
        assert average_precision(scores, labels).item() == pytest.approx(expected, abs=1e-6)


def test_the_perfect_and_the_opposite_map() -> None:
    masks = _blobs(2, 12, 12)
    found = localization(masks.float(), masks)
    for name in ("pointing", "pixel_accuracy", "iou", "average_precision"):
        assert getattr(found, name).tolist() == pytest.approx([1, 1])
    assert found.mean_iou == 1 and found.mean_average_precision == 1
    opposite = localization(-masks.float(), masks)
    assert opposite.pointing.tolist() == [0, 0]
    assert opposite.iou.tolist() == [0, 0]
    assert opposite.average_precision.tolist() == pytest.approx([0.5, 0.5])  # all right ones below all wrong ones


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e20])
def test_a_constant_map_is_flat(value) -> None:
    masks = _blobs(2, 12, 12)
    found = localization(torch.full((2, 3, 3), value), masks)
    share = masks.float().mean((1, 2))
    torch.testing.assert_close(found.pointing, share)
    torch.testing.assert_close(found.pixel_accuracy, 1 - share)
    torch.testing.assert_close(found.iou, (1 - share) / 2)
    assert torch.isfinite(found.average_precision).all() and math.isfinite(found.mean_iou)


@pytest.mark.parametrize("full", [True, False])
def test_masks_with_one_class_only_are_no_nan(images, full) -> None:
    masks = torch.full((1, 8, 8), full)
    scores = images(1, 4, channels=1)[:, 0]
    found = localization(scores, masks)
    assert found.pointing.tolist() == [float(full)]
    assert torch.isfinite(found.average_precision).all()
    assert localization(torch.zeros(1, 4, 4), masks).iou.tolist() == [0.0 if full else 1.0]


def test_images_do_not_depend_on_their_batch_and_scores_may_carry_gradients(images) -> None:
    scores, masks = images(3, 4, channels=1)[:, 0].requires_grad_(), _blobs(3, 12, 12)
    together = localization(scores, masks)
    for i in range(3):
        alone = localization(scores[i : i + 1].double(), masks[i : i + 1])
        for name in ("pointing", "pixel_accuracy", "iou", "average_precision", "intersection", "union"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[i])


@pytest.mark.parametrize(
    ("scores", "masks", "message"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(1, 9, 9) > 0, r"\(2, 3, 3\) and masks of shape \(1, 9, 9\) do not fit"),
        (torch.zeros(1, 9), torch.zeros(1, 9, 9) > 0, r"\(1, 9\) and masks .* do not fit"),
        (torch.zeros(1, 3, 3), torch.zeros(9, 9) > 0, r"masks of shape \(9, 9\) do not fit"),
        (torch.zeros(0, 3, 3), torch.zeros(0, 9, 9) > 0, "holds no map; pass a batch of at least one"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 9, 9), r"masks are of torch.float32; .* masks > 0"),
        (torch.zeros(1, 3, 3), torch.full((1, 9, 9), 255), r"masks are of torch.int64; .* masks > 0"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 9, 2) > 0, "9 x 2 pixels are smaller than the maps, 3 x 3"),
        (torch.full((1, 3, 3), torch.nan), torch.zeros(1, 9, 9) > 0, "NaN or infinity, so there is no map"),
    ],
)
def test_bad_input_is_refused(scores, masks, message) -> None:
    with pytest.raises(ValueError, match=message):
        localization(scores, masks)


# --- points ---------------------------------------------------------------------------------------------------------


def test_point_iou_by_hand() -> None:
    scores = torch.tensor([[[0.0, 8.0], [0.0, 8.0]], [[3.0, 3.0], [-1.0, -1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    right, left, beyond = [0.9, 0.5], [0.1, 0.2], [-1.0, 7.0]
    points = torch.tensor([[right, left, right], [left, [0.5, 0.9], beyond], [left, beyond, beyond]])
    inside = torch.tensor([[1, 1, 0], [1, 0, -1], [0, -1, -1]])
    found = point_iou(scores, points, inside, torch.tensor([7, 7, 3]))
    # Label 7: one point on it is found and one missed, one beside it is found; then one found, one rightly not.
    assert found.classes.tolist() == [3, 7]
    assert found.iou[0].isnan()  # nothing of label 3 to find, and nothing found
    assert found.iou[1].item() == pytest.approx(2 / 4)
    assert found.mean_iou.item() == pytest.approx(2 / 4)


def test_point_iou_against_scikit_learn_on_the_resized_map(images) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, class_idx = images(6, 5, 7, channels=1)[:, 0], torch.tensor([4, 0, 4, 2, 0, 4])
    rows, columns = (torch.randint(side, (6, 40), generator=generator) for side in (20, 35))
    inside = torch.randint(-1, 2, (6, 40), generator=generator)
    points = torch.stack([(columns + 0.5) / 35, (rows + 0.5) / 20], -1)  # the centres of pixels
    found = point_iou(scores, points, inside, class_idx)
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    maps = torch.nn.functional.interpolate(((scores - low) / (high - low))[:, None], size=(20, 35), mode="bilinear")
    expected = []
    for label in (0, 2, 4):
        truth, said = [], []
        for pair in range(6):
            for k in range(40):
                if class_idx[pair] == label and inside[pair, k] >= 0:
                    truth.append(bool(inside[pair, k]))
                    said.append(bool(maps[pair, 0, rows[pair, k], columns[pair, k]] > 0.5))
        expected.append(metrics.jaccard_score(truth, said))
    assert found.classes.tolist() == [0, 2, 4]
    assert found.iou.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.mean_iou.item() == pytest.approx(np.mean(expected), abs=1e-6)
    assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": torch.zeros(1, 3, 2)}, r"points \(1, 3, 2\), inside \(1, 2\) .* do not fit"),
        ({"class_idx": torch.tensor([1, 2])}, r"class_idx \(2,\) do not fit"),
        ({"inside": torch.tensor([[1, 255]])}, "1 for a point on the label, 0 for another, and -1"),
        ({"points": torch.tensor([[[0.5, 0.5], [0.5, 50.0]]])}, r"beyond its map; pass x and y in \[0, 1\]"),
        ({"points": torch.full((1, 2, 2), torch.nan)}, "beyond its map"),
        ({"scores": torch.full((1, 3, 3), torch.nan)}, "NaN or infinity, so there is no map"),
    ],
)
def test_points_that_do_not_fit_are_refused(changes, message) -> None:
    given = {
        "scores": torch.zeros(1, 3, 3),
        "points": torch.full((1, 2, 2), 0.5),
        "inside": torch.tensor([[0, 1]]),
        "class_idx": torch.tensor([3]),
    }
    with pytest.raises(ValueError, match=message):
        point_iou(**(given | changes))
