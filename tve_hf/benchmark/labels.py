"""Is the classifier right? Labels of a data set, numbers or names, beside the classes that were predicted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_correct(
    class_idx: Tensor, labels: Sequence[Any], id2label: dict[int, str], names: Sequence[str] | None = None
) -> Tensor | None:
    """Compare predictions with labels, 1 where they are the same and 0 elsewhere, (n,).

    Names are compared with the classifier's own, whatever their case; numbers are those of its classes.

    Args:
        class_idx: predicted classes, (n,).
        labels: of the n images.
        id2label: the classifier's names.
        names: what numbers among the labels stand for, where the data set says so.

    Returns:
        None if that cannot be told: names are not the classifier's, or as many numbers have no class of it.
    """
    if all(isinstance(label, int) for label in labels):
        if names is None:
            return (class_idx.cpu() == torch.tensor(labels)).float()
        # Two numberings of the same names may differ; of other names only the numbers are left to compare.
        if not _are_known(names, id2label):
            return None if len(names) != len(id2label) else is_correct(class_idx, labels, id2label)
        labels = [names[label] if 0 <= label < len(names) else "" for label in labels]
    elif not all(isinstance(label, str) for label in labels) or not _are_known(labels, id2label):
        return None
    predicted = [id2label[index] for index in class_idx.tolist()]
    same = [_plain(one) == _plain(other) for one, other in zip(predicted, labels, strict=True)]
    return torch.tensor(same).float()


def _are_known(names: Sequence[str], id2label: dict[int, str]) -> bool:
    return {_plain(name) for name in names} <= {_plain(name) for name in id2label.values()}


def _plain(name: str) -> str:
    return name.strip().casefold()
