"""Statistics over images: bootstrap intervals, sign-flip tests, Holm's correction, ranks."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Random numbers in memory at once: 8 bytes each, whatever the number of images.
DRAWS_AT_ONCE = 2**22


def _draws(high: int, samples: int, n: int, seed: int) -> Iterator[Tensor]:
    """Integers below `high`, (samples, n) in all, some rows at a time: as if they had been drawn at once."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, samples, rows):
        yield torch.randint(high, (min(rows, samples - start), n), generator=generator)


def bootstrap_interval(
    values: Tensor, samples: int = 10_000, seed: int = 0, statistic: Callable[[Tensor], Tensor] | None = None
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of per-image values, (n,).

    Args:
        statistic: of each row of values, (rows, n) -> (rows,); by default the mean.
    """
    of_rows = statistic or (lambda rows: rows.mean(1))
    found = torch.cat([of_rows(values[index]) for index in _draws(len(values), samples, len(values), seed)])
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def sign_flip_test(differences: Tensor, samples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of paired differences, (n,), under the hypothesis that each is as likely of either sign.

    The share of random sign flips whose mean is at least as far from 0 as the observed one, which counts too, so that
    p is never 0.
    """
    # A tolerance, for a mean of the same terms in another order is another number.
    observed = differences.mean().abs() * (1 - 1e-9)
    as_far = 0
    for flips in _draws(2, samples, len(differences), seed):
        means = (2.0 * flips.to(differences) - 1) @ differences / len(differences)
        as_far += int((means.abs() >= observed).sum())
    return (1 + as_far) / (samples + 1)


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
