"""Heads H_t for a backbone that one has already: class prototypes, nearest neighbours, fitted estimators, functions.

Each maps embeddings with any leading dimensions to logits, (..., D) -> (..., C), in float32 or better.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .estimators import LEAST_PROBABILITY, EstimatorHead

__all__ = [
    "LEAST_PROBABILITY",
    "METRICS",
    "AffineMap",
    "BinaryHead",
    "EstimatorHead",
    "NeighborsHead",
    "PrototypeHead",
    "RowsHead",
    "affine_map",
    "as_head",
    "tolerance",
    "try_head",
]

METRICS = ("cosine", "euclidean")


class PrototypeHead(nn.Module):
    """Compare an embedding with one prototype for each class, such as the mean embedding of its images.

    Under "cosine", logits are scale * cos(e, c); under "euclidean" -scale * |e - c|^2, which is the log-likelihood of
    equal round Gaussians of variance 1 / (2 * scale).

    Args:
        prototypes: (C, D), in the order of the classes.
        metric: one of `METRICS`.
        scale: 10 by default for "cosine", 1 for "euclidean".

    Raises:
        ValueError: If the prototypes are no finite matrix, or the metric is unknown.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor, metric: str = "cosine", scale: float | None = None):
        super().__init__()
        self.register_buffer("prototypes", _points(prototypes, "prototypes", "(classes, D)", metric))
        self.metric = metric
        self.scale = (10.0 if metric == "cosine" else 1.0) if scale is None else scale

    @property
    def embedding_dim(self) -> int:
        return self.prototypes.shape[1]

    def forward(self, embeddings: Tensor) -> Tensor:
        squared_distances = _squared_distances(embeddings, self.prototypes, self.metric)
        # |e - c|^2 = 2 - 2 cos(e, c) of unit vectors
        return self.scale * (1 - squared_distances / 2 if self.metric == "cosine" else -squared_distances)


class NeighborsHead(nn.Module):
    """Let the k nearest of stored embeddings vote for their classes, nearer ones more; logits are log-probabilities.

    A vote weighs 1 - d^2 / d_{k+1}^2: Epanechnikov's kernel, as wide as the distance of the next neighbour
    (Hechenbichler and Schliep, 2004), so that it fades before a neighbour leaves the k. The votes are scaled to k in
    all, and one more is spread evenly over the classes, so that no probability is below 1 / (C (k + 1)).

    Args:
        embeddings: (M, D).
        labels: their classes, (M,) integers; each of 0 ... C - 1 occurs.
        k: at least 1 and less than M.
        metric: one of `METRICS`.

    Raises:
        ValueError: If these do not fit together.
    """

    embeddings: Tensor
    labels: Tensor

    def __init__(self, embeddings: Tensor, labels: Tensor, k: int = 20, metric: str = "cosine"):
        super().__init__()
        self.register_buffer("embeddings", _points(embeddings, "embeddings", "(M, D)", metric))
        if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; pass one integer for each of the "
                f"{len(embeddings)} stored embeddings."
            )
        if not 1 <= k < len(embeddings):
            raise ValueError(
                f"k is {k}, but {len(embeddings)} embeddings are stored; choose k between 1 and {len(embeddings) - 1}."
            )
        classes = labels.unique().tolist()
        if classes != list(range(len(classes))):
            raise ValueError(
                f"labels hold {_shortened(classes)}; number the classes from 0 and store at least one embedding of "
                "each."
            )
        self.register_buffer("labels", labels.detach().long())
        self.num_labels = len(classes)
        self.k = k
        self.metric = metric

    @property
    def embedding_dim(self) -> int:
        return self.embeddings.shape[1]

    def forward(self, embeddings: Tensor) -> Tensor:
        distances = _squared_distances(embeddings, self.embeddings, self.metric)
        distances, index = distances.topk(self.k + 1, largest=False)
        width = distances[..., -1:].clamp(min=torch.finfo(distances.dtype).tiny)
        votes = (1 - distances[..., :-1] / width).clamp(min=1e-6)  # equal votes where all are equally far
        votes = self.k * votes / votes.sum(-1, keepdim=True)
        counts = votes.new_zeros(*votes.shape[:-1], self.num_labels)
        counts = counts.scatter_add(-1, self.labels[index[..., :-1]], votes)
        return ((counts + 1 / self.num_labels) / (self.k + 1)).log()


class BinaryHead(nn.Module):
    """One logit z of a class y as logits (0, z) of the classes (not y, y), whose softmax is (1 - sigmoid, sigmoid)."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, embeddings: Tensor) -> Tensor:
        logit = self.head(embeddings)
        return torch.cat([torch.zeros_like(logit), logit], -1)


class RowsHead(nn.Module):
    """A function or module that takes embeddings as rows, (M, D) -> (M, C)."""

    def __init__(self, head: Callable[[Tensor], Tensor]):
        super().__init__()
        self.head = head

    def forward(self, embeddings: Tensor) -> Tensor:
        if embeddings.ndim == 2:
            return self.head(embeddings)
        return self.head(embeddings.reshape(-1, embeddings.shape[-1])).reshape(*embeddings.shape[:-1], -1)


def as_head(head: Any, embedding_dim: int, multi_label: bool) -> nn.Module:
    """Make a module of what users have for a head: modules, functions, prototypes (C, D) and fitted estimators.

    Raises:
        TypeError: If it is none of them.
        ValueError: If it was made for embeddings of other dimensions.
    """
    if isinstance(head, nn.Module):
        module = head
    elif isinstance(head, Tensor):
        module = PrototypeHead(head)
    elif hasattr(head, "fit"):
        module = EstimatorHead(head, multi_label)
    elif callable(head):
        module = RowsHead(head)
    else:
        raise TypeError(
            f"A {type(head).__name__} is no head; pass a module, a function, class prototypes as a tensor (C, D) or a "
            "fitted scikit-learn classifier."
        )
    reads = getattr(module, "embedding_dim", None)
    if reads not in (None, embedding_dim):
        raise ValueError(
            f"The head was made for embeddings of {reads} dimensions, but this backbone gives {embedding_dim}; make "
            "it from embeddings of this backbone, classifier.embed(pixel_values)."
        )
    return module


def try_head(head: nn.Module, probe: Tensor) -> tuple[nn.Module, int]:
    """Try a head on embeddings (A, B, D) and return it, made to take leading dimensions if it does not, and C.

    Raises:
        ValueError: If it does not accept them, or does not give finite logits, a row for each.
    """
    rows = probe.flatten(0, -2)
    with torch.no_grad():
        try:
            logits = head(rows)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The head does not accept embeddings of {probe.shape[-1]} dimensions ({error}); "
                f"pass one made for this backbone, in {probe.dtype} on {probe.device}."
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(rows) or not logits.shape[1]:
            returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"The head gives {returned} for embeddings of shape {tuple(rows.shape)}; it must give logits of shape "
                f"({len(rows)}, classes)."
            )
        if logits.isnan().all(0).any():
            raise ValueError(
                f"The head gives NaN for class {int(logits.isnan().all(0).nonzero()[0])}, whatever the embedding; "
                "train or load it again."
            )
        try:
            folded = head(probe)
            same = torch.allclose(folded, logits.unflatten(0, probe.shape[:-1]), 1e-2, 1e-2, equal_nan=True)
        except RuntimeError:  # such as batch normalisation, which takes the second dimension for channels
            same = False
    return (head if same else RowsHead(head)), logits.shape[1]


def _points(points: Tensor, name: str, shape: str, metric: str) -> Tensor:
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
    if points.ndim != 2 or not points.numel() or not points.is_floating_point() or not points.isfinite().all():
        raise ValueError(
            f"{name} have shape {tuple(points.shape)} and type {points.dtype}; pass finite numbers of shape {shape}."
        )
    return points.detach().clone()


def _squared_distances(embeddings: Tensor, points: Tensor, metric: str) -> Tensor:
    """(..., D) and (M, D) -> (..., M), in float32 at least."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    embeddings, points = embeddings.to(dtype), points.to(dtype)
    if metric == "cosine":
        embeddings, points = F.normalize(embeddings, dim=-1), F.normalize(points, dim=-1)
    squares = embeddings.square().sum(-1, keepdim=True) + points.square().sum(-1)
    return (squares - 2 * embeddings @ points.T).clamp(min=0)


def _shortened(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


class AffineMap(NamedTuple):
    """e -> W e + b, in float32.

    Args:
        weight: W, (C, D); or a row of it.
        bias: b, (C,); or a value of it.
    """

    weight: Tensor
    bias: Tensor


@torch.no_grad()
def affine_map(head: nn.Module, embedding_dim: int, dtype: torch.dtype, device: torch.device) -> AffineMap | None:
    """What an affine head does to an embedding, found by its derivatives; None if it is not affine, or has none."""
    generator = torch.Generator().manual_seed(0)
    # Short and long, since a head may be affine up to some length alone, as one that clamps is.
    lengths = torch.tensor([0.01, 1, 100, 10_000])[:, None]
    one, other = (lengths * torch.randn(4, embedding_dim, generator=generator) for _ in range(2))
    points = torch.stack([one, other, one + other, torch.zeros_like(one)]).to(device, dtype)
    logits = head(points).float()  # (4 points, 4 lengths, C)
    error = (logits[2] + logits[3] - logits[0] - logits[1]).abs().amax(-1)
    if not (error <= tolerance(dtype) * logits.abs().amax((0, 2))).all():
        return None
    columns: list[Any] = []
    try:
        for directions in torch.eye(embedding_dim, dtype=dtype, device=device).split(256):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(torch.zeros_like(directions), directions)
                columns.append(forward_ad.unpack_dual(head(dual)).tangent)
    except RuntimeError:  # torch's, of a function that has no derivative, such as an estimator's
        return None
    if any(column is None for column in columns):
        return None
    return AffineMap(torch.cat(columns).float().T.contiguous(), logits[3, 0])


def tolerance(dtype: torch.dtype) -> float:
    """The error of sums of products in a precision, relative to the largest."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)
