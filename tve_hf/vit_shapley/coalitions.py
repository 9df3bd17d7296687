"""Shapley values of patches: coalitions, their values, and whose game an explainer has learnt (arXiv 2206.05282)."""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ..coalitions import random_coalitions, size_distribution
from ..compatibility import fit
from ..patches import GridSize
from .modeling import ShapleyExplainer

# Root mean square of what a head's fingerprint may differ by, as a share of the fingerprint's own: half precision
# moves it by less, another training by more.
_HEAD_TOLERANCE = 0.01


def sample_coalitions(
    batch_size: int, num_patches: int, num_masks: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw coalitions by the Shapley kernel, in pairs of one and its complement, boolean (batch_size, num_masks, N).

    Pairs leave the distribution as it is, since sizes k and N - k are equally likely, and lower the variance.

    Raises:
        ValueError: If `num_masks` is odd or there are fewer than two patches.
    """
    if num_masks < 2 or num_masks % 2:
        raise ValueError(f"Coalitions come in pairs, but {num_masks} were asked for; choose an even number.")
    shape = batch_size, num_masks // 2
    sizes = 1 + torch.multinomial(size_distribution(num_patches), shape[0] * shape[1], True, generator=generator)
    keep = random_coalitions(sizes.view(shape), num_patches, generator)
    return torch.stack([keep, ~keep], 2).flatten(1, 2)


@torch.no_grad()
def coalition_values(classifier: SplitClassifier, pixel_values: Tensor, keep: Tensor, grid_size: GridSize) -> Tensor:
    """v(s): probabilities of all classes with only the patches in s kept, keep (B, K, N) -> (B, K, C)."""
    return classifier.log_prob(classifier.embed_masked(pixel_values, keep, grid_size)).exp()


@torch.no_grad()
def head_fingerprint(classifier: SplitClassifier) -> list[float]:
    """Recognise a head, whatever it is made of, by 16 sums over the log-probabilities that it gives fixed embeddings.

    They are sums of the deviations from the mean, each with weights between -1 and 1 of its own.
    """
    probe = _waves(8, classifier.embedding_dim).to(classifier.device, classifier.dtype)
    values = classifier.log_prob(probe).flatten().double().cpu()
    sums = _waves(16, len(values)) @ (values - values.mean()) / len(values) ** 0.5
    return [float(f"{value:.6g}") for value in sums.tolist()]


def _waves(rows: int, columns: int) -> Tensor:
    """Numbers in [-1, 1] without a pattern, the same on every platform, (rows, columns) float64."""
    return (torch.arange(1, 1 + rows * columns, dtype=torch.float64) ** 1.5).sin().view(rows, columns)


def check_head(explainer: ShapleyExplainer, classifier: SplitClassifier) -> None:
    """Refuse a ViT-Shapley explainer that was trained for another head.

    Raises:
        ValueError: If the numbers of classes differ, or the head's probabilities do.
    """
    config = explainer.config
    remedy = "train one for this head with examples/train_vit_shapley.py"
    named = f"The ViT-Shapley explainer {explainer.name_or_path or 'given'}"
    if config.num_labels != len(classifier.id2label):
        raise ValueError(
            f"{named} is bound to a head of {config.num_labels} classes, but {classifier.name} has "
            f"{len(classifier.id2label)}; {remedy}."
        )
    if config.head_fingerprint is not None:
        expected, actual = (torch.tensor(values) for values in (config.head_fingerprint, head_fingerprint(classifier)))
        if not (actual - expected).norm() <= _HEAD_TOLERANCE * expected.norm():  # NaN is no match
            raise ValueError(
                f"{named} is bound to the head of {config.backbone_name}, and {classifier.name} has another; {remedy}."
            )


def fit_shapley(explainer: ShapleyExplainer, classifier: SplitClassifier) -> SplitClassifier:
    """Refuse an explainer of another head or backbone, warn of changed weights; return what `compatibility.fit` does.

    Raises:
        ValueError: As `compatibility.fit`, and if the head is another one.
    """
    classifier = fit(explainer, classifier)
    check_head(explainer, classifier)
    return classifier
