"""Occlusion (Zeiler & Fergus, arXiv 1311.2901): what removing one patch takes from the class.

Ours rather than captum's, so that patches are removed as everywhere else here, by `patches.mask_patches`.
"""

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ..fidelity import prob_kept


@torch.no_grad()
def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    removal: str = "zero",
    chunk_size: int | None = None,
) -> Tensor:
    """f(Z; y) - f(Z \\ {z}; y), N + 1 passes an image.

    Args:
        removal: what replaces the patch, a key of `patches.REMOVALS`.
        chunk_size: masked images in one pass; as `SplitClassifier.images_per_pass` by default.

    Returns:
        scores (B, rows, cols), differences of probability.
    """
    keep = ~torch.eye(grid_size[0] * grid_size[1], dtype=torch.bool, device=pixel_values.device)
    keep = torch.cat([keep.new_ones(1, keep.shape[1]), keep]).expand(len(pixel_values), -1, -1)  # (B, 1 + N, N)
    prob = prob_kept(classifier, pixel_values, class_idx, keep, grid_size, removal, chunk_size)  # (B, 1 + N)
    return (prob[:, :1] - prob[:, 1:]).unflatten(1, grid_size)
