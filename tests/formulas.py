"""Neighbourhoods and the rules of transfer, by numpy and loops."""

import itertools

import numpy as np
from torch import Tensor, nn


def window(patch: int, rows: int, columns: int, hops: int) -> list[int]:
    """The neighbourhood of a patch, by comparing with every cell."""
    return [
        row * columns + column
        for row, column in itertools.product(range(rows), range(columns))
        if abs(row - patch // columns) <= hops and abs(column - patch % columns) <= hops
    ]


def formula(rule: str, kept: Tensor, removed: Tensor, head: nn.Linear, y: int, grid: tuple[int, int]) -> np.ndarray:
    """Scores of one image by numpy and loops: (N, D) twice -> (N,)."""
    weight, bias = head.weight.detach().double().numpy(), head.bias.detach().double().numpy()

    def logit(embeddings: Tensor) -> np.ndarray:
        return (embeddings.double().numpy() @ weight.T + bias)[:, y]

    def log_prob(embeddings: Tensor) -> np.ndarray:
        logits = embeddings.double().numpy() @ weight.T + bias
        return logits[:, y] - np.log(np.exp(logits).sum(1))

    def standardized(values: np.ndarray) -> np.ndarray:
        return (values - np.mean(values)) / np.sqrt(np.mean((values - np.mean(values)) ** 2))

    def averaged(values: np.ndarray) -> np.ndarray:
        return np.array([np.mean(values[window(z, *grid, hops=1)]) for z in range(len(values))])

    def prob(embeddings: Tensor) -> np.ndarray:
        return np.exp(log_prob(embeddings))

    match rule:
        case "log_prob":
            return log_prob(kept) - log_prob(removed)
        case "log_prob_averaged":
            return averaged(log_prob(kept) - log_prob(removed))
        case "logit":
            return logit(kept) - logit(removed)
        case "logit_averaged":
            return averaged(logit(kept) - logit(removed))
        case "removed_averaged":
            return averaged(-log_prob(removed))
        case "standardized_logit":
            return standardized(logit(kept)) - standardized(logit(removed))
        case "prob":
            return prob(kept) - prob(removed)
        case "prob_averaged":
            return averaged(prob(kept) - prob(removed))
        case "standardized_logit_averaged":
            return averaged(standardized(logit(kept)) - standardized(logit(removed)))
        case "standardized_prob_averaged":
            return averaged(standardized(prob(kept)) - standardized(prob(removed)))
    raise AssertionError(f"{rule} has no formula here; write one.")
