"""The exact attribution without the antithetical shortcut: backgrounds are sampled (TVE, arXiv 2312.15359, Eq. 3)."""

import torch
from torch import Tensor

from ..attribution import of_class
from ..classifiers import SplitClassifier
from ..patches import neighborhoods


@torch.no_grad()
def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    hops: int = 2,
    n_samples: int = 16,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """phi_z = mean over B of log f(N(z) u B; y) - log f(B; y), with B drawn uniformly from the subsets of Z \\ N(z).

    Costs 2 n_samples N masked passes an image. The same backgrounds serve all images of the batch.

    Args:
        hops: radius of the neighbourhood N(z).
        n_samples: backgrounds for each patch; the paper's study takes 16 and 32.
        generator: draws the backgrounds, on the CPU; seeded with 0 if None.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.

    Returns:
        scores (B, rows, cols), in nats.
    """
    generator = generator or torch.Generator().manual_seed(0)
    near = neighborhoods(grid_size, hops)  # (N, N)
    total = torch.zeros(len(pixel_values), len(near), device=pixel_values.device)
    for _ in range(n_samples):
        background = (torch.rand(near.shape, generator=generator) < 0.5) & ~near
        keep = torch.cat([near | background, background]).expand(len(pixel_values), -1, -1)  # (B, 2 N, N)
        log_prob = classifier.log_prob(
            classifier.embed_masked(pixel_values, keep, grid_size, chunk_size=chunk_size)
        )  # (B, 2 N, C)
        chosen = of_class(log_prob, class_idx)  # (B, 2 N)
        with_patch, without = chosen.chunk(2, dim=1)
        total += with_patch - without
    return (total / n_samples).unflatten(1, grid_size)
