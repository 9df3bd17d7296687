"""Meta-attribution over random backgrounds by sampling them (Eq. 3): what random-background explainers predict.

Least squares of the embedding on which patches are kept, for all D dimensions at once; see `coalitions.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers.utils.logging import tqdm  # silent after `transformers.utils.logging.disable_progress_bar()`

from .classifiers.given import ClassifierInput, split_and_pixels
from .coalitions import Coalitions, check_number
from .inputs import whole_number
from .patches import GridSize, as_pair
from .trunk_backbone import efficient, kept_and_removed

# Masked passes for each image, where nothing else is asked for.
NUM_SAMPLES = 200
# Ridge penalties to choose from, as shares of the mean squared singular value of the design.
PENALTIES = torch.logspace(-6, 2, 33, dtype=torch.float64)


@dataclass
class SampledMetaAttribution:
    """Meta-attribution of some images, which unpacks as `kept, removed = ...`.

    Args:
        kept, removed: means of the embedding over backgrounds with and without each patch, (B, N, D), float32.
        standard_error: of phi = kept - removed, (B, N, D), from the sampling of the coalitions.
    """

    kept: Tensor
    removed: Tensor
    standard_error: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.kept, self.removed)


@torch.no_grad()
def sampled_meta_attribution(
    classifier: ClassifierInput,
    pixel_values: Any,
    grid_size: GridSize | None = None,
    num_samples: int = NUM_SAMPLES,
    coalitions: Coalitions | str = "smooth",
    removal: str = "zero",
    generator: Generator | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
    **inputs: Tensor,
) -> SampledMetaAttribution:
    """Estimate E[G(S) | z in S] and E[G(S) | z not in S] from `num_samples` masked passes an image, for every head.

    The same coalitions serve all images, so an image's answer does not depend on its batch. Where samples are few for
    many patches a ridge penalty shrinks phi; generalised cross-validation chooses it for each image, and it vanishes
    as samples grow. With "shapley" coalitions sum over z of phi_z = G(x) - G(empty image).

    Args:
        classifier: its backbone is G; or a model or name, which is split first.
        pixel_values: (B, 3, H, W), or images, one or a list, which the classifier's image processor prepares.
        grid_size: P, or (rows, cols); it divides the image. `classifier.default_grid` if None.
        num_samples: masked passes for each image, even, for coalitions come in pairs.
        coalitions: their distribution: a `Coalitions`, or the name of one with its usual settings.
        removal: what replaces removed pixels, as for `SplitClassifier.embed_masked`.
        generator: draws the coalitions, on the CPU; seeded with 0 if None.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.
        progress: whether to show a bar of the masked passes.
        inputs: what else the image processor returns and the classifier reads, one row for each image.

    Returns:
        kept and removed, (B, N, D), and a standard error. Memory does not grow with `num_samples`.

    Raises:
        ValueError: If there is no image, the number is odd or below 2, or the distribution does not fit the grid.
    """
    check_number(whole_number("num_samples", num_samples, None), "num_samples")
    split, pixel_values, inputs = split_and_pixels(sampled_meta_attribution, classifier, pixel_values, inputs)
    if grid_size is None:
        grid_size = split.default_grid(pixel_values, **inputs)
    grid = as_pair(grid_size)
    how = Coalitions(coalitions) if isinstance(coalitions, str) else coalitions
    keep = how.draw(1, num_samples, grid, generator or torch.Generator().manual_seed(0))[0]  # (M, N)

    def embed(some: Tensor) -> Tensor:
        """G of each image with these coalitions, (m, N) -> (B, m, D), float64 on the CPU."""
        masks = some.expand(len(pixel_values), -1, -1)
        return split.embed_masked(pixel_values, masks, grid, removal, chunk_size, **inputs).cpu().double()

    ends = torch.stack([torch.zeros_like(keep[0]), torch.ones_like(keep[0])])
    empty, full = embed(ends).unbind(1)  # (B, D) each
    regression = Regression(keep, how, empty, full)
    # Pairs stay together.
    size = max(2, split.images_per_pass(pixel_values, chunk_size) // 2 * 2)
    with tqdm(total=num_samples, desc="masked passes", leave=False, disable=not progress) as bar:
        for start in range(0, num_samples, size):
            regression.add(slice(start, start + size), embed(keep[start : start + size]))
            bar.update(min(size, num_samples - start))
    phi, base, error = regression.solve()
    device = pixel_values.device
    kept, removed = kept_and_removed(phi, base, how.keep_prob)
    return SampledMetaAttribution(kept.to(device), removed.to(device), error.float().to(device))


class Regression:
    """Ridge regression of embeddings on coalitions, of several images and all dimensions at once, in sums.

    Where a pair is a coalition and its complement, what is regressed is the difference of the two: it holds all that
    they say of phi, without what a pair has in common.

    Args:
        keep: all coalitions, boolean (M, N), pair after pair.
        how: their distribution.
        empty, full: G of the empty image and G(x), (B, D).
    """

    def __init__(self, keep: Tensor, how: Coalitions, empty: Tensor, full: Tensor):
        self.how, self.empty, self.full = how, empty.double(), full.double()
        self.is_efficient = how.name == "shapley"
        self.share = keep.double().mean(1, keepdim=True)  # of patches that are kept, (M, 1)
        self.in_pairs = bool((keep[0::2] ^ keep[1::2]).all())
        design = keep.double() - (self.share if self.is_efficient else how.keep_prob)
        self.mean = design.mean(0)  # (N,)
        self.design = design[0::2] - design[1::2] if self.in_pairs else design - self.mean  # (n, N)
        batch, dim = empty.shape
        self.cross = torch.zeros(batch, design.shape[1], dim, dtype=torch.float64)
        self.sums, self.squares = (torch.zeros(batch, dim, dtype=torch.float64) for _ in range(2))
        self.number = len(keep)

    def add(self, some: slice, embeddings: Tensor) -> None:
        """Take in the embeddings of some of the coalitions, whole pairs, (B, m, D)."""
        values = embeddings.double() - self.empty.unsqueeze(1)
        if self.is_efficient:  # what the patches would have if they shared evenly; phi is how they differ from that
            values = values - self.share[some] * (self.full - self.empty).unsqueeze(1)
        self.sums += values.sum(1)
        if self.in_pairs:
            values = values[:, 0::2] - values[:, 1::2]
            some = slice(some.start // 2, some.stop // 2)
        self.cross += self.design[some].T @ values
        self.squares += values.square().sum(1)

    def solve(self, penalty: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return phi (B, N, D), base (B, D) and the standard error of phi (B, N, D).

        Args:
            penalty: of the ridge, as a share of the mean squared singular value; by cross-validation if None.
        """
        mean = self.sums / self.number  # (B, D)
        n = len(self.design)
        squares = self.squares if self.in_pairs else self.squares - self.number * mean.square()
        strengths, vectors = torch.linalg.eigh(self.design.T @ self.design)  # (N,) and (N, N)
        used = strengths > 1e-9 * strengths.max()
        strengths, vectors = strengths[used], vectors[:, used]
        spread = vectors.T @ self.cross  # (B, r, D)
        explained = spread.square() / strengths[:, None]
        penalties = PENALTIES if penalty is None else torch.tensor([penalty], dtype=torch.float64)
        penalties = penalties * strengths.mean()
        shrunk = strengths / (strengths + penalties[:, None])  # (L, r)
        # Of each penalty, image and dimension, (L, B, D).
        residuals = squares - torch.einsum("lr,brd->lbd", 2 * shrunk - shrunk.square(), explained)
        freedom = n - shrunk.sum(1) - (0 if self.in_pairs else 1)  # (L,)
        # What fits nearly everything leaves nothing to judge it by: without this, n = N gives noise.
        judged = freedom >= 0.1 * n
        scores = torch.where(judged, 1 / freedom.square(), torch.inf)[:, None] * residuals.sum(-1)  # (L, B)
        best = scores.argmin(0)  # (B,)
        weights = shrunk[best] / strengths  # (B, r)
        phi = vectors @ (weights[..., None] * spread)
        images = torch.arange(len(best))
        variance = residuals[best, images] / freedom[best].clamp(min=1)[:, None]  # (B, D)
        leverage = torch.einsum("nr,br->bn", vectors.square(), weights.square() * strengths)
        error = (leverage[..., None] * variance.clamp(min=0)[:, None]).sqrt()
        if self.is_efficient:
            return *efficient(phi, self.empty, self.full, self.how.keep_prob), error
        base = self.empty + mean - (self.mean @ phi)
        return phi, base, error
