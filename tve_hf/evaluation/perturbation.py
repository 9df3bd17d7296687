"""How a classifier's answer changes as patches go: perturbation, insertion, deletion, and patches one by one."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ..fidelity import area, check_scores, even_shares, log_prob_kept, most_important, prob_kept
from ..patches import GridSize
from ..verification import pearson, spearman

# The largest share of patches that `perturbation` deletes.
LAST = Fraction(9, 10)


@dataclass
class Perturbation:
    """Accuracy while patches are deleted, an image at a time: the mean over images is the accuracy curve.

    Args:
        share: of the patches that are deleted, (K,), from 0 to 0.9.
        positive: whether the class is still predicted, 1 or 0, when the most relevant patches go first, (B, K).
        negative: the same when the least relevant go first.
    """

    share: Tensor
    positive: Tensor
    negative: Tensor

    @property
    def positive_auc(self) -> Tensor:
        """Area under each curve, (B,), at most 0.9; lower is better. Its mean is that under the accuracy curve."""
        return area(self.positive, self.share)

    @property
    def negative_auc(self) -> Tensor:
        """The same when the least relevant go first; higher is better."""
        return area(self.negative, self.share)

    @classmethod
    def from_correct(cls, positive: Tensor, negative: Tensor) -> "Perturbation":
        """Curves of what is 1 where the prediction is right, (B, K), at shares evenly spaced to 0.9."""
        return cls(torch.linspace(0, float(LAST), positive.shape[1]), positive, negative)


@torch.no_grad()
def perturbation(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    scores: Tensor,
    class_idx: Tensor,
    num_levels: int = 10,
    grid_size: GridSize | None = None,
    removal: str = "zero",
    chunk_size: int | None = None,
    **inputs: Tensor,
) -> Perturbation:
    """Delete 0 to 90 % of the patches, by descending and by ascending score, and see whether the class survives.

    The positive and negative perturbation of the LeGrad paper (arXiv 2404.03214), of patches instead of pixels. For
    "the predicted class" pass the maps of the predicted class, for "the true class" those of the true one. The
    accuracy that the literature reports is on the true class in both; with the predicted class as `class_idx`, it is
    the share of images whose prediction stays. round(share * N) patches go; ties go to the lower patch number.

    Args:
        classifier: whose predictions are read.
        pixel_values: (B, 3, H, W).
        scores: (B, rows, cols), or (B, N) on the grid `grid_size` (a square one if None).
        class_idx: the class that counts as right, (B,): true or predicted.
        num_levels: points on each curve, both ends included: 2 num_levels - 1 passes an image.
        removal: how patches are deleted: a key of `patches.REMOVALS`, or "token_drop".
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Raises:
        ValueError: If the scores are not finite or do not fit the images, or there are more levels than patches + 1.
    """
    scores, grid = check_scores(classifier, pixel_values, scores, class_idx, grid_size)
    shares = even_shares(num_levels, scores.shape[1], LAST)
    descending, ascending = most_important(scores, shares), most_important(-scores, shares)
    keep = ~torch.cat([descending, ascending[:, 1:]], dim=1)  # nothing deleted is asked once
    log_prob = log_prob_kept(classifier, pixel_values, keep, grid, removal, chunk_size, **inputs)  # (B, 2K-1, C)
    correct = (log_prob.argmax(-1) == class_idx.to(log_prob.device).unsqueeze(1)).float()
    negative = torch.cat([correct[:, :1], correct[:, num_levels:]], dim=1)
    return Perturbation.from_correct(correct[:, :num_levels], negative)


@dataclass
class InsertionDeletion:
    """Probability of the class over the share of patches that is inserted or deleted, best first.

    Args:
        share: (K,), from 0 to 1.
        insertion: f of the most important patches alone, (B, K).
        deletion: f without them, (B, K).
    """

    share: Tensor
    insertion: Tensor
    deletion: Tensor

    @property
    def insertion_auc(self) -> Tensor:
        """Area under each curve, (B,); higher is better."""
        return area(self.insertion, self.share)

    @property
    def deletion_auc(self) -> Tensor:
        """Area under each curve, (B,); lower is better."""
        return area(self.deletion, self.share)


@torch.no_grad()
def insertion_deletion(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    scores: Tensor,
    class_idx: Tensor,
    num_levels: int = 14,
    grid_size: GridSize | None = None,
    insertion_removal: str = "blur",
    deletion_removal: str = "zero",
    chunk_size: int | None = None,
    **inputs: Tensor,
) -> InsertionDeletion:
    """Insert the most important patches into an image that has none, and delete them from the whole image.

    The curves of RISE (Petsiuk et al., arXiv 1806.07421), which inserts into the blurred image and deletes to the mean
    pixel. The two areas depend on these operators, so compare methods under several. 2 num_levels - 1 passes an image.

    Args:
        classifier: f, whose probability of the class is read.
        pixel_values: (B, 3, H, W).
        scores: (B, rows, cols), or (B, N) on the grid `grid_size` (a square one if None).
        class_idx: the class, (B,).
        num_levels: points on each curve, both ends included.
        insertion_removal: what stands for patches not yet inserted: a key of `patches.REMOVALS`, or "token_drop".
        deletion_removal: what stands for deleted ones, likewise.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Raises:
        ValueError: If the scores are not finite or do not fit the images, or there are more levels than patches + 1.
    """
    scores, grid = check_scores(classifier, pixel_values, scores, class_idx, grid_size)
    shares = even_shares(num_levels, scores.shape[1])
    important = most_important(scores, shares)

    def curve(keep: Tensor, removal: str) -> Tensor:
        return prob_kept(classifier, pixel_values, class_idx, keep, grid, removal, chunk_size, **inputs)

    deletion = curve(~important, deletion_removal)
    # All patches inserted is the whole image, which was asked with none deleted.
    insertion = torch.cat([curve(important[:, :-1], insertion_removal), deletion[:, :1]], dim=1)
    return InsertionDeletion(torch.tensor([float(s) for s in shares]), insertion, deletion)


@dataclass
class SingleDeletion:
    """How well scores tell what the class loses with each patch.

    Args:
        drop: f(Z; y) - f(Z \\ {z}; y) of each patch, (B, N).
        pearson: correlation of the scores with the drops, (B,); NaN where one of them is constant.
        spearman: their rank correlation, likewise.
    """

    drop: Tensor
    pearson: Tensor
    spearman: Tensor


@torch.no_grad()
def single_deletion(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    scores: Tensor,
    class_idx: Tensor,
    grid_size: GridSize | None = None,
    removal: str = "zero",
    chunk_size: int | None = None,
    **inputs: Tensor,
) -> SingleDeletion:
    """Delete each patch by itself, N + 1 passes an image, and correlate scores with the drops of the probability.

    No patch is ranked, so signs and sizes count, and an image with one patch missing is close to those that the
    classifier knows; after the single deletion score of Hesse et al. (IDSDS, arXiv 2407.11910), which fine-tunes the
    classifier on such images first.

    Args:
        classifier: f, whose probability of the class is read.
        pixel_values: (B, 3, H, W).
        scores: (B, rows, cols), or (B, N) on the grid `grid_size` (a square one if None).
        class_idx: the class, (B,).
        removal: how a patch is deleted: a key of `patches.REMOVALS`, or "token_drop".
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Raises:
        ValueError: If the scores are not finite or do not fit the images.
    """
    scores, grid = check_scores(classifier, pixel_values, scores, class_idx, grid_size)
    num_patches = scores.shape[1]
    alone = torch.eye(num_patches, dtype=torch.bool, device=scores.device)
    keep = ~torch.cat([torch.zeros_like(alone[:1]), alone]).expand(len(scores), -1, -1)  # (B, N+1, N)
    full, without = prob_kept(classifier, pixel_values, class_idx, keep, grid, removal, chunk_size, **inputs).split(
        [1, num_patches], dim=1
    )
    drop = full - without
    scores = scores.to(drop.device)
    return SingleDeletion(drop, pearson(scores, drop), spearman(scores, drop))
