"""A fitted classifier of scikit-learn as a head H_t, (..., D) -> (..., C)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# A probability of 0 counts as this much, or as the least of the row's other probabilities if that is less.
LEAST_PROBABILITY = float(np.finfo(np.float32).eps)


class EstimatorHead(nn.Module):
    """A fitted classifier of scikit-learn, or one with its methods, as a head.

    Logits are its log-probabilities, or its decision values if it gives no log-probabilities, or else the logarithms
    of its probabilities. A probability of exactly 0 counts as `LEAST_PROBABILITY`, or as the smallest other one of
    the same embedding if that is less. For multi-label heads, logits are decision values or log-odds.

    It computes in float64 on the CPU and passes on no gradients.

    Args:
        estimator: fitted on embeddings of the backbone; its `classes_` are the classes.
        multi_label: whether it decides on each class by itself.

    Raises:
        ValueError: If it is no fitted classifier, or has several outputs.
    """

    def __init__(self, estimator: Any, multi_label: bool = False):
        super().__init__()
        self.estimator = estimator
        self.multi_label = multi_label
        self.name = type(estimator).__name__
        methods = ("predict_log_proba", "decision_function", "predict_proba")[multi_label:]
        method = next((name for name in methods if hasattr(estimator, name)), None)
        if method is None:
            raise ValueError(
                f"{self.name} has none of {', '.join(methods)}, so it scores no classes; pass a classifier, not a "
                "regressor."
            )
        self.method = method
        classes = getattr(estimator, "classes_", None)
        if classes is None:
            raise ValueError(
                f"{self.name} has no classes_: it is not fitted, or no classifier; call its fit(embeddings, labels) "
                "with embeddings of this backbone."
            )
        if isinstance(classes, (list, tuple)):
            raise ValueError(
                f"{self.name} has {len(classes)} outputs; pass a classifier of one, or for multi_label=True one such "
                "as OneVsRestClassifier that gives a column for each class."
            )
        self.id2label = {index: str(label) for index, label in enumerate(classes)}
        if getattr(estimator, "multilabel_", False) and not multi_label:
            raise ValueError(f"{self.name} was fitted on several labels for each image; pass multi_label=True.")

    @property
    def embedding_dim(self) -> int | None:
        """D, where the estimator says."""
        return getattr(self.estimator, "n_features_in_", None)

    def forward(self, embeddings: Tensor) -> Tensor:
        return _WithoutGradient.apply(embeddings, self._logits, self.name)

    def _logits(self, embeddings: Tensor) -> Tensor:
        rows = embeddings.detach().reshape(-1, embeddings.shape[-1]).to("cpu", torch.float64).numpy()
        with np.errstate(divide="ignore"):  # zero probabilities
            values = np.asarray(getattr(self.estimator, self.method)(rows), dtype=np.float64)
        if values.ndim == 1:  # of the second of two classes
            values = values[:, None] if self.multi_label else np.stack([np.zeros_like(values), values], 1)
        if values.shape != (len(rows), len(self.id2label)):
            raise ValueError(
                f"{self.method} of {self.name} gives {values.shape[1:]} values for an embedding, but classes_ names "
                f"{len(self.id2label)}; an SVC needs decision_function_shape='ovr'."
            )
        if self.method != "decision_function":
            values = self._from_probabilities(values)
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        return torch.from_numpy(values).to(embeddings.device, dtype).reshape(*embeddings.shape[:-1], -1)

    def _from_probabilities(self, values: np.ndarray) -> np.ndarray:
        if self.multi_label:
            values = values.clip(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
            return np.log(values) - np.log1p(-values)
        with np.errstate(divide="ignore"):
            values = values if self.method == "predict_log_proba" else np.log(values)
        if np.abs(np.exp(values).sum(1) - 1).max() > 1e-3:
            raise ValueError(
                f"The probabilities of {self.name} do not sum to 1, so it decides on each class by itself; pass "
                "multi_label=True."
            )
        zero = np.isneginf(values)
        least = np.where(zero, 0, values).min(1, keepdims=True).clip(max=np.log(LEAST_PROBABILITY))
        return np.where(zero, least, values)


class _WithoutGradient(torch.autograd.Function):
    """A function of embeddings through which gradients are asked for in vain."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, function: Callable[[Tensor], Tensor], name: str) -> Tensor:
        ctx.name = name
        return function(embeddings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ValueError(f"{ctx.name} passes on no gradients; choose a method that needs none.")
