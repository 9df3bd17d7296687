"""Statistics over images: bootstrap intervals, sign-flip tests, Holm's correction, ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor


def bootstrap_interval(values: Tensor, samples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of per-image values, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (samples, len(values)), generator=generator)
    low, high = values[index].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def sign_flip_test(differences: Tensor, samples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of paired differences, (n,), under the hypothesis that each is as likely of either sign.

    The share of random sign flips whose mean is at least as far from 0 as the one found; the found one counts too, so
    that p is never 0.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (samples, len(differences)), generator=generator).to(differences) - 1
    means = (signs @ differences / len(differences)).abs()
    # A tolerance, for a mean of the same terms in another order is another number.
    found = differences.mean().abs() * (1 - 1e-9)
    return (1 + int((means >= found).sum())) / (samples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of m p-values for testing m hypotheses at once."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-a of two rankings of the same items: concordant less discordant pairs, as a share of all pairs."""
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    if len(a) < 2:
        raise ValueError(f"A ranking of {len(a)} items agrees with nothing; compare at least two.")
    signs = (a[:, None] - a[None]).sign() * (b[:, None] - b[None]).sign()
    return signs.sum().item() / (len(a) * (len(a) - 1))
