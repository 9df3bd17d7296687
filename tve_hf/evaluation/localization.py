"""Does a map lie on the object? Pointing game, pixel accuracy, IoU and average precision against masks or points.

Plausibility, not faithfulness: a classifier may well look at what is not the object.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patches import min_max


@dataclass
class Localization:
    """How well maps lie on masks, for each image.

    Args:
        pointing: share of the map's highest pixels that lie in the mask, (B,): 1 or 0 where one pixel is the highest;
            for a constant map the share of the mask in the image, which is chance. No margin around the mask.
        pixel_accuracy: share of the pixels whose binarised map is the mask, (B,).
        intersection, union: pixels of background and object in both, and in either, of binarised map and mask, (B, 2).
        average_precision: of all pixels, (B,); see `localization`.
    """

    pointing: Tensor
    pixel_accuracy: Tensor
    intersection: Tensor
    union: Tensor
    average_precision: Tensor

    @property
    def iou(self) -> Tensor:
        """Mean IoU of background and object in each image, (B,); what neither map nor mask has does not count."""
        return _mean_iou(self.intersection, self.union)

    @property
    def mean_iou(self) -> Tensor:
        """mIoU of a data set, a scalar: pixels are summed over images before the two IoUs are averaged."""
        return _mean_iou(self.intersection.sum(0), self.union.sum(0))

    @property
    def mean_average_precision(self) -> Tensor:
        """mAP of a data set, a scalar: the mean over images."""
        return self.average_precision.mean()


def _mean_iou(intersection: Tensor, union: Tensor) -> Tensor:
    present = (union > 0).float()
    return (intersection / union.clamp(min=1)).sum(-1) / present.sum(-1)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of n scores against n boolean labels, a scalar; ties share a threshold.

        AP = sum over thresholds of (recall - recall before) * precision = mean over positives of the precision at
             their own score

    0 where no label is true.
    """
    positives = scores[labels].sort().values
    above = len(scores) - torch.searchsorted(scores.sort().values, positives)  # scores at least as high
    true_above = len(positives) - torch.searchsorted(positives, positives)
    return (true_above / above).sum() / max(1, len(positives))


def _normalized(scores: Tensor) -> Tensor:
    """Scale each map, (B, rows, cols), to [0, 1]; a constant one becomes zeros."""
    if len(scores) == 0:
        raise ValueError("scores holds no map; pass a batch of at least one.")
    if not torch.isfinite(scores).all():
        raise ValueError("The scores hold NaN or infinity, so there is no map to compare.")
    return min_max(scores.detach().float().cpu())


@torch.no_grad()
def localization(scores: Tensor, masks: Tensor) -> Localization:
    """Compare maps with masks of the object.

    Each map is min-max normalised, then resized bilinearly to the masks' size. Above 0.5 it says object. A constant
    map normalises to zeros: it says background everywhere.

    Average precision is that of the attention explainability literature: a pixel is scored m for the object and 1 - m
    for the background by the normalised map m, each score is right or wrong by the mask, and all 2 H W scores of an
    image form one ranking. A constant map, or any that does not depend on the mask, is near 0.5. mAP is the mean over
    images.

    Args:
        scores: maps (B, rows, cols), which cover the same region as the masks: what the image processor shows.
        masks: boolean (B, H, W), True on the object.

    Raises:
        ValueError: If scores are not finite, masks are not boolean, or shapes do not fit.
    """
    if scores.ndim != 3 or masks.ndim != 3 or len(scores) != len(masks):
        raise ValueError(
            f"Maps of shape {tuple(scores.shape)} and masks of shape {tuple(masks.shape)} do not fit; pass (B, rows, "
            "cols) and (B, H, W), one mask for each map."
        )
    if masks.dtype != torch.bool:
        raise ValueError(f"masks are of {masks.dtype}; pass boolean ones, such as masks > 0.")
    if masks.shape[1] < scores.shape[1] or masks.shape[2] < scores.shape[2]:
        raise ValueError(
            f"Masks of {masks.shape[1]} x {masks.shape[2]} pixels are smaller than the maps, {scores.shape[1]} x "
            f"{scores.shape[2]}; pass masks of the image's size."
        )
    normalized = _normalized(scores).to(masks.device)
    maps = F.interpolate(normalized.unsqueeze(1), size=masks.shape[1:], mode="bilinear", align_corners=False)
    maps, masks = maps.flatten(1), masks.flatten(1)  # (B, H W)
    highest = maps == maps.amax(1, keepdim=True)
    on_object = maps > 0.5
    intersection = torch.stack([(~on_object & ~masks).sum(1), (on_object & masks).sum(1)], 1)
    union = torch.stack([(~on_object | ~masks).sum(1), (on_object | masks).sum(1)], 1)
    # An image at a time, since sorting takes many times the memory of its pixels.
    precisions = [
        average_precision(torch.cat([m, 1 - m]), torch.cat([mask, ~mask])) for m, mask in zip(maps, masks, strict=True)
    ]
    return Localization(
        pointing=(highest & masks).sum(1) / highest.sum(1),
        pixel_accuracy=(on_object == masks).float().mean(1),
        intersection=intersection,
        union=union,
        average_precision=torch.stack(precisions),
    )


@dataclass
class PointIoU:
    """How well the maps of each label tell points on it from others, over a data set.

    Args:
        classes: the labels, (L,), ascending.
        iou: of each label, (L,): points on it above 0.5 in its maps, as a share of those on it or above 0.5.
    """

    classes: Tensor
    iou: Tensor

    @property
    def mean_iou(self) -> Tensor:
        """p-mIoU, a scalar: the mean over labels; one with no point on it and none above 0.5 does not count."""
        return self.iou.nanmean()


@torch.no_grad()
def point_iou(scores: Tensor, points: Tensor, inside: Tensor, class_idx: Tensor) -> PointIoU:
    """Compare maps with points of which it is known whether they lie on the label: open-vocabulary p-mIoU.

    As on OpenImages V7 (Benenson & Ferrari, arXiv 2210.14142): each image has a map for every label present in it, and
    a label's points are counted over all its images. Maps are min-max normalised, resized bilinearly and binarised at
    0.5, as in `localization`.

    Args:
        scores: a map for each pair of an image and a label present in it, (M, rows, cols).
        points: (M, K, 2), x and y in what the map covers, from its upper left corner, as shares of width and height.
        inside: (M, K) integers, 1 where the point lies on the label, 0 where not, -1 in the place of a missing one:
            pairs have different numbers of points.
        class_idx: the label of each pair, (M,).

    Raises:
        ValueError: If scores are not finite, shapes do not fit, `inside` holds another number, or a point lies beyond
            the map.
    """
    pairs = len(scores)
    if (
        scores.ndim != 3
        or points.shape != (*inside.shape, 2)
        or inside.shape[:1] != (pairs,)
        or class_idx.shape != (pairs,)
    ):
        raise ValueError(
            f"Maps {tuple(scores.shape)}, points {tuple(points.shape)}, inside {tuple(inside.shape)} and class_idx "
            f"{tuple(class_idx.shape)} do not fit; pass (M, rows, cols), (M, K, 2), (M, K) and (M,)."
        )
    maps = _normalized(scores).to(points.device)
    exists = inside >= 0
    if not torch.isin(inside, torch.tensor([-1, 0, 1], device=inside.device)).all():
        raise ValueError("inside must hold 1 for a point on the label, 0 for another, and -1 for a missing one.")
    if not ((points >= 0) & (points <= 1))[exists].all():
        raise ValueError("A point lies beyond its map; pass x and y in [0, 1], shares of what the map covers.")
    place = (2 * points.float() - 1).nan_to_num().unsqueeze(1)  # (M, 1, K, 2)
    values = F.grid_sample(maps.unsqueeze(1), place, mode="bilinear", padding_mode="border", align_corners=False)
    above = (values[:, 0, 0] > 0.5) & exists
    on = inside == 1
    both, either = (above & on).sum(1).float(), (above | on).sum(1).float()
    classes, label = class_idx.to(points.device).unique(return_inverse=True)
    total = torch.zeros(2, len(classes), device=points.device).index_add_(1, label, torch.stack([both, either]))
    return PointIoU(classes, total[0] / total[1])  # 0 / 0 is NaN
