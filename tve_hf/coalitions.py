"""Random sets of patches S, "coalitions", over whose backgrounds meta-attributions are averaged (Eq. 3).

"Learning Meta-attribution for Transferable Vision Explainer", arXiv 2312.15359. A distribution is a function that
draws pairs: each coalition comes with an antithetic one, its complement wherever patches are kept as often as removed.
Pairs leave a distribution as it is, and lower the variance of what is learnt from it. Random through a generator on
the CPU alone.

The additive form. An embedding with only the patches in S kept is taken for a sum over the patches,

    G(S) ~ base + sum over z of (1[z in S] - p) phi_z,        phi_z in R^D, p = P(z in S).

Where patches are kept independently of each other, the means over backgrounds are then

    kept_z = E[G(S) | z in S] = base + (1 - p) phi_z        removed_z = E[G(S) | z not in S] = base - p phi_z.

Where they are kept together, phi is the coefficient of least squares, and the same formulas say what z alone changes.
For a linear head w_y the score w_y . phi_z is the Banzhaf value of the class's logit (p = 1/2), or its Shapley value
(Shapley kernel, efficiency).

Shapes: B images, K coalitions of each, N = rows * cols patches (row-major), D = embedding_dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Coalitions(NamedTuple):
    """A distribution of coalitions, by its name and what it needs besides.

    Args:
        name: a key of `COALITIONS`.
        prob: of "independent": with which each patch is kept.
        scale: of "smooth": standard deviation of the blur, in patches; by default a tenth of the grid's shorter side.
            Near it maps of CNNs were more faithful than at half or at twice of it: `examples/study_backgrounds.py`.
    """

    name: str = "smooth"
    prob: float = 0.5
    scale: float | None = None

    @property
    def keep_prob(self) -> float:
        """P(z in S), the same for every patch z: `prob` where it is asked for, one half by symmetry elsewhere."""
        return self.prob if self.name == "independent" else 0.5

    def scale_on(self, grid: tuple[int, int]) -> float:
        """The blur of "smooth" on a grid (rows, cols), in patches."""
        return min(grid) / 10 if self.scale is None else self.scale

    def check(self, grid: tuple[int, int]) -> None:
        """Refuse what cannot be drawn on a grid (rows, cols).

        Raises:
            ValueError: Naming the setting and what to do.
        """
        rows, columns = grid
        if self.name not in COALITIONS:
            raise ValueError(
                f"Unknown distribution of coalitions {self.name!r}; choose one of {', '.join(COALITIONS)}."
            )
        if rows * columns < 2:
            raise ValueError(
                f"Coalitions on a grid of {rows} x {columns} patches are empty or full; choose a finer grid."
            )
        if self.name == "independent" and not 0 < self.prob < 1:
            raise ValueError(f"coalition_prob is {self.prob}, which is always or never; choose one between 0 and 1.")
        if self.name == "smooth" and not 0 < self.scale_on(grid) < max(grid):
            raise ValueError(
                f"coalition_scale is {self.scale}, which does not fit a grid of {rows} x {columns} patches; choose "
                f"one above 0 and below {max(grid)}."
            )

    def draw(self, batch_size: int, number: int, grid: tuple[int, int], generator: Generator) -> Tensor:
        """Draw `number` = K coalitions for each image, boolean (batch_size, K, N): one, its antithetic, the next, ...

        Raises:
            ValueError: If K is odd or below 2, or the distribution does not fit the grid.
        """
        check_number(number)
        self.check(grid)
        pairs = COALITIONS[self.name](self, batch_size * number // 2, grid, generator)  # (B K / 2, 2, N)
        return pairs.view(batch_size, number, -1)


def check_number(number: int, name: str = "coalitions_per_image") -> None:
    """Raise ValueError unless so many coalitions make pairs."""
    if number < 2 or number % 2:
        raise ValueError(f"{name} is {number}, but coalitions come in pairs; choose an even number from 2 on.")


def independent(how: Coalitions, pairs: int, grid: tuple[int, int], generator: Generator) -> Tensor:
    """Keep each patch with probability p by itself: where u < p, and where 1 - u <= p, u uniform, (pairs, 2, N)."""
    u = torch.rand(pairs, grid[0] * grid[1], generator=generator, dtype=torch.float64)
    return torch.stack([u < how.prob, u >= 1 - how.prob], 1)


def uniform(how: Coalitions, pairs: int, grid: tuple[int, int], generator: Generator) -> Tensor:
    """Draw the size from 0, ..., N uniformly, then a set of that size uniformly, (pairs, 2, N)."""
    num_patches = grid[0] * grid[1]
    sizes = torch.randint(num_patches + 1, (pairs,), generator=generator)
    return _with_complements(random_coalitions(sizes, num_patches, generator))


def shapley(how: Coalitions, pairs: int, grid: tuple[int, int], generator: Generator) -> Tensor:
    """Draw by the Shapley kernel: never empty, never full, more of very small and very large sets, (pairs, 2, N)."""
    num_patches = grid[0] * grid[1]
    sizes = 1 + torch.multinomial(size_distribution(num_patches), pairs, True, generator=generator)
    return _with_complements(random_coalitions(sizes, num_patches, generator))


def smooth(how: Coalitions, pairs: int, grid: tuple[int, int], generator: Generator) -> Tensor:
    """Keep where blurred normal noise lies below a random level: neighbours share their fate, (pairs, 2, N).

    Each patch's value is standard normal, also at the border, and the level has a uniform quantile, so a patch is kept
    with probability one half, and every share of patches occurs.
    """
    rows, columns = grid
    noise = torch.randn(pairs, rows, columns, generator=generator, dtype=torch.float64)
    scale = how.scale_on(grid)
    field = _blur(rows, scale) @ noise @ _blur(columns, scale).T
    level = torch.special.ndtri(torch.rand(pairs, 1, generator=generator, dtype=torch.float64))
    return _with_complements(field.flatten(1) < level)


def _blur(length: int, scale: float) -> Tensor:
    """Gaussian weights of each cell of a line for each cell, whose squares sum to 1, (length, length) float64."""
    place = torch.arange(length, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((place[:, None] - place) / scale) ** 2)
    return weights / weights.norm(dim=1, keepdim=True)


# Name -> how pairs of coalitions are drawn, boolean (pairs, 2, N).
COALITIONS: dict[str, Callable[[Coalitions, int, tuple[int, int], Generator], Tensor]] = {
    "smooth": smooth,
    "independent": independent,
    "uniform": uniform,
    "shapley": shapley,
}


def _with_complements(keep: Tensor) -> Tensor:
    return torch.stack([keep, ~keep], 1)


def size_distribution(num_patches: int) -> Tensor:
    """Probabilities of the coalition sizes 1 ... N - 1 under the Shapley kernel, (N - 1,) float64.

    The kernel weighs one coalition of k patches by (N - 1) / (binomial(N, k) k (N - k)); there are binomial(N, k) of
    them, so a size has the probability 1 / (k (N - k)), up to a factor.

    Raises:
        ValueError: If there are fewer than two patches.
    """
    if num_patches < 2:
        raise ValueError(f"Coalitions of {num_patches} patches are all empty or full; choose a grid of at least two.")
    sizes = torch.arange(1, num_patches, dtype=torch.float64)
    weights = 1 / (sizes * (num_patches - sizes))
    return weights / weights.sum()


def random_coalitions(sizes: Tensor, num_patches: int, generator: Generator | None = None) -> Tensor:
    """Draw a uniform one among the sets of so many patches, sizes (...) -> boolean (..., N)."""
    order = torch.rand(*sizes.shape, num_patches, generator=generator).argsort(-1)
    return order < sizes.unsqueeze(-1)
