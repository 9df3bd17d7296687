"""Removal operators against means, a dense solve and scipy's sparse one."""

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from tve_hf import split_classifier
from tve_hf.patches import REMOVALS, mask_patches, spread
from tve_hf.removals import constant


def _some(batch: int, num_masks: int, num_patches: int, share: float = 0.5) -> Tensor:
    keep = torch.rand(batch, num_masks, num_patches, generator=torch.Generator().manual_seed(1)) < share
    keep[..., 2] = True
    return keep


def test_mean_is_the_images_own_colour(images) -> None:
    pixel_values = images(2, 8, 12)
    keep = _some(2, 3, 6)
    masked = mask_patches(pixel_values, keep, (2, 3), "mean")
    pixels = spread(keep, (2, 3), 8, 12)
    for b, k, c in itertools.product(range(2), range(3), range(3)):
        colour = np.mean(pixel_values[b, c].double().numpy())
        expected = np.where(pixels[b, k], pixel_values[b, c].numpy(), colour)
        np.testing.assert_allclose(masked[b, k, c].numpy(), expected, rtol=0, atol=1e-6)


def test_a_data_sets_mean_is_made_known_by_a_name(images, shared_model, monkeypatch) -> None:
    colour = [0.3, -0.2, 0.1]
    monkeypatch.setitem(REMOVALS, "dataset_mean", constant(colour))
    pixel_values = images(2, 32)
    none = torch.zeros(2, 1, 16, dtype=torch.bool)
    expected = torch.tensor(colour).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    assert torch.equal(mask_patches(pixel_values, none, 4, "dataset_mean")[:, 0], expected)
    classifier = split_classifier(shared_model("cnn"))
    with torch.no_grad():
        found = classifier.embed_masked(pixel_values, none, 4, "dataset_mean")[:, 0]
        torch.testing.assert_close(found, classifier.embed(expected))


def _imputed(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Solve for all pixels of one channel (H, W): kept ones are given, others are means of their neighbours."""
    height, width = keep.shape
    matrix = sparse.lil_matrix((height * width, height * width))
    known = np.zeros(height * width)
    for row, column in itertools.product(range(height), range(width)):
        i = row * width + column
        if keep[row, column]:
            matrix[i, i], known[i] = 1, image[row, column]
            continue
        total = 0.0
        for down, right in itertools.product((-1, 0, 1), repeat=2):
            if (down or right) and 0 <= row + down < height and 0 <= column + right < width:
                weight = 1 / 12 if down and right else 1 / 6
                matrix[i, (row + down) * width + column + right] = -weight
                total += weight
        matrix[i, i] = total
    if height * width < 200:
        return np.linalg.solve(matrix.toarray(), known).reshape(height, width)
    return sparse.linalg.spsolve(matrix.tocsc(), known).reshape(height, width)


@pytest.mark.parametrize(
    ("height", "width", "grid", "share"), [(9, 12, (3, 4), 0.5), (9, 12, (3, 4), 0.0), (64, 64, (8, 8), 0.03)]
)
def test_road_solves_for_the_mean_of_the_neighbours(images, height, width, grid, share) -> None:
    pixel_values = images(2, height, width)
    keep = _some(2, 2, grid[0] * grid[1], share)
    masked = mask_patches(pixel_values, keep, grid, "road")
    noise = 0.01 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    pixels = spread(keep, grid, height, width)
    for b, k, c in itertools.product(range(2), range(2), (0, 2)):
        expected = _imputed(pixel_values[b, c].double().numpy(), pixels[b, k].numpy())
        found = masked[b, k, c] - noise[c] * ~pixels[b, k]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)


def test_road_leaves_noise_alone_where_nothing_is_kept(images) -> None:
    masked = mask_patches(images(1, 8), torch.zeros(1, 4, dtype=torch.bool), 2, "road")
    assert masked.std() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_road_keeps_flat_images_flat_in_the_precision_given(dtype) -> None:
    pixel_values = torch.full((1, 3, 32, 32), 0.75, dtype=dtype)
    masked = mask_patches(pixel_values, _some(1, 1, 16, 0.2), 4, "road")
    assert masked.dtype == dtype
    assert (masked.float() - 0.75).abs().max() < 0.06  # five deviations of the noise


@pytest.mark.parametrize("removal", sorted(REMOVALS))
def test_a_masked_image_is_the_same_in_every_batch_and_chunk(images, shared_model, removal) -> None:
    pixel_values, keep = images(3, 32), _some(3, 5, 16)
    together = mask_patches(pixel_values, keep, 4, removal)
    for b, k in itertools.product(range(3), range(5)):
        alone = mask_patches(pixel_values[b : b + 1], keep[b : b + 1, k : k + 1], 4, removal)
        torch.testing.assert_close(alone[0, 0], together[b, k], rtol=0, atol=1e-5)
    common = mask_patches(pixel_values, keep[0], 4, removal)  # masks for all images
    torch.testing.assert_close(common[0], together[0], rtol=0, atol=1e-5)
    each = mask_patches(pixel_values, keep[:1].expand(3, -1, -1), 4, removal)
    torch.testing.assert_close(common, each, rtol=0, atol=1e-5)
    classifier = split_classifier(shared_model("cnn"))
    with torch.no_grad():
        expected = classifier.embed(together.flatten(0, 1)).unflatten(0, (3, 5))
        for chunk_size in (1, 4, 7, 100):
            found = classifier.embed_masked(pixel_values, keep, 4, removal, chunk_size)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
