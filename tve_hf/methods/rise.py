"""RISE (Petsiuk, Das & Saenko, arXiv 1806.07421): random smooth masks, each weighed by the class's probability."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attribution import of_class
from ..classifiers import SplitClassifier
from ..patches import patch_means


@torch.no_grad()
def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    n_samples: int = 4000,
    cells: int = 7,
    p: float = 0.5,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """sum_i f(x * M_i; y) M_i / (n_samples p), averaged over the pixels of each patch.

    A mask is a grid of cells x cells, each 1 with probability p, upsampled bilinearly and shifted at random by up to
    one cell, as in the paper's section 3.2 and the authors' code (whose batched class leaves out the factor). The
    same masks serve all images of the batch.

    Args:
        n_samples: masks, one pass each; the paper takes 4000 for VGG16 and 8000 for ResNet50.
        cells: side of the small grid.
        p: share of the cells that stay.
        generator: draws the masks, on the CPU; seeded with 0 if None.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.

    Returns:
        scores (B, rows, cols): an estimate of the probability of the class given that the patch is seen.

    Raises:
        ValueError: If the grid does not divide the image.
    """
    generator = generator or torch.Generator().manual_seed(0)
    batch, _, height, width = pixel_values.shape
    total = torch.zeros(batch, *grid_size, device=pixel_values.device)
    per_pass = max(1, classifier.images_per_pass(pixel_values, chunk_size) // batch)
    for start in range(0, n_samples, per_pass):
        masks = random_masks(min(per_pass, n_samples - start), (height, width), cells, p, generator)
        masks = masks.to(pixel_values)  # (n, 1, H, W)
        masked = (pixel_values.unsqueeze(1) * masks).flatten(0, 1)
        prob = classifier.log_prob(classifier.embed(masked)).exp().unflatten(0, (batch, -1))  # (B, n, C)
        chosen = of_class(prob, class_idx)  # (B, n)
        total += torch.einsum("bn,nrc->brc", chosen, patch_means(masks.squeeze(1).float(), grid_size))
    return total / (n_samples * p)


def random_masks(count: int, size: tuple[int, int], cells: int, p: float, generator: torch.Generator) -> Tensor:
    """Draw smooth masks in [0, 1], (count, 1, H, W): each mask's draws follow one another, whatever the count."""
    cell = [math.ceil(side / cells) for side in size]
    masks = []
    for _ in range(count):
        small = (torch.rand(1, 1, cells, cells, generator=generator) < p).float()
        row, column = (int(torch.randint(side, (), generator=generator)) for side in cell)
        large = F.interpolate(small, size=[(cells + 1) * side for side in cell], mode="bilinear", align_corners=False)
        masks.append(large[..., row : row + size[0], column : column + size[1]])
    return torch.cat(masks)
