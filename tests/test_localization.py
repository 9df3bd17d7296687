"""Localisation by hand, and against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tve_hf.localization import average_precision, localization

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
