"""The patch grid against loops over rows, columns and pixels."""

import itertools

import pytest
import torch
from scipy.ndimage import gaussian_filter

from tve_hf.patches import (
    REMOVALS,
    as_pair,
    average_over_neighborhoods,
    dividing_grid,
    grid_of,
    is_grid,
    mask_patches,
    neighborhoods,
    sample_patches,
    token_grid,
)


def test_as_pair() -> None:
    assert as_pair(7) == (7, 7)
    assert as_pair([2, 5]) == (2, 5)


def test_grid_of() -> None:
    assert grid_of(196, None) == (14, 14)
    assert grid_of(15, (3, 5)) == (3, 5)
    with pytest.raises(ValueError, match="15 patches do not fill a grid of 4 x 4"):
        grid_of(15, None)
    with pytest.raises(ValueError, match="15 patches do not fill a grid of 5 x 4"):
        grid_of(15, (5, 4))


@pytest.mark.parametrize("grid_size", [1, 4, (3, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("hops", [0, 1, 2, 9])
def test_neighborhoods_equal_a_double_loop(grid_size, hops) -> None:
    rows, columns = as_pair(grid_size)
    near = neighborhoods(grid_size, hops)
    assert near.shape == (rows * columns, rows * columns)
    cells = list(itertools.product(range(rows), range(columns)))
    for row, column in cells:
        for other_row, other_column in cells:
            expected = max(abs(row - other_row), abs(column - other_column)) <= hops
            assert near[row * columns + column, other_row * columns + other_column] == expected


def test_neighborhood_sizes_at_corner_edge_and_centre() -> None:
    sizes = neighborhoods((5, 7), 2).sum(1).view(5, 7)
    assert sizes[0, 0] == 9
    assert sizes[0, 3] == 15
    assert sizes[2, 0] == 15
    assert sizes[2, 3] == 25


@pytest.mark.parametrize("removal", sorted(REMOVALS))
def test_mask_keeps_exactly_the_rectangle_of_an_asymmetric_cell(images, removal) -> None:
    pixel_values = images(2, 12, 40)  # cells of 4 x 8 pixels on a grid of 3 x 5
    row, column = 2, 1
    keep = torch.zeros(1, 15, dtype=torch.bool)
    keep[0, row * 5 + column] = True
    masked = mask_patches(pixel_values, keep, (3, 5), removal)
    assert masked.shape == (2, 1, 3, 12, 40)
    same = (masked[:, 0] == pixel_values).all(1)  # (B, H, W)
    for y, x in itertools.product(range(12), range(40)):
        assert same[:, y, x].all() == (8 <= y < 12 and 8 <= x < 16)


def test_removed_pixels_are_zero(images) -> None:
    pixel_values = images(1, 4, 6)
    keep = torch.tensor([[True, False, False, True, False, False]])
    expected = torch.zeros_like(pixel_values)
    expected[..., 0:2, 0:2] = pixel_values[..., 0:2, 0:2]
    expected[..., 2:4, 0:2] = pixel_values[..., 2:4, 0:2]
    assert torch.equal(mask_patches(pixel_values, keep, (2, 3))[:, 0], expected)


def test_removed_pixels_are_zero_even_where_the_image_is_not_finite() -> None:
    pixel_values = torch.full((1, 3, 4, 4), torch.nan)
    assert torch.equal(
        mask_patches(pixel_values, torch.zeros(1, 4, dtype=torch.bool), 2)[:, 0], torch.zeros(1, 3, 4, 4)
    )


@pytest.mark.parametrize("shape", [(32, 32), (20, 40)])
def test_removed_pixels_are_those_of_a_gaussian_blur(images, shape) -> None:
    pixel_values = images(2, *shape)
    blurred = mask_patches(pixel_values, torch.zeros(1, 4, dtype=torch.bool), 2, "blur")[:, 0]
    sigma = min(shape) / 10
    expected = gaussian_filter(
        pixel_values.double().numpy(), sigma, mode="nearest", radius=int(2 * sigma), axes=(2, 3)
    )
    torch.testing.assert_close(blurred, torch.from_numpy(expected).float(), rtol=0, atol=1e-5)


def test_masks_of_each_image_or_the_same_for_all(images) -> None:
    pixel_values = images(2, 8)
    keep = torch.rand(2, 3, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = mask_patches(pixel_values, keep, 4)
    assert masked.shape == (2, 3, 3, 8, 8)
    for b, k, row, column in itertools.product(range(2), range(3), range(4), range(4)):
        cell = (slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        expected = pixel_values[b][cell] if keep[b, k, row * 4 + column] else torch.zeros(3, 2, 2)
        assert torch.equal(masked[b, k][cell], expected)
    common = mask_patches(pixel_values, keep[0], 4)
    assert torch.equal(common[0], masked[0])
    assert torch.equal(common[1], mask_patches(pixel_values, keep[:1].expand(2, -1, -1), 4)[1])


def test_masking_leaves_the_image_alone(images) -> None:
    pixel_values = images(1, 8)
    before = pixel_values.clone()
    mask_patches(pixel_values, torch.zeros(1, 4, dtype=torch.bool), 2).add_(1)
    assert torch.equal(pixel_values, before)


@pytest.mark.parametrize("grid_size", [3, (4, 3), (3, 4)])
def test_a_grid_that_does_not_divide_the_image_is_refused(images, grid_size) -> None:
    rows, columns = as_pair(grid_size)
    keep = torch.ones(1, rows * columns, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{rows} x {columns} patches does not divide an image of 8 x 8"):
        mask_patches(images(1, 8), keep, grid_size)


def test_an_unknown_removal_is_refused(images) -> None:
    with pytest.raises(ValueError, match="'black'; choose one of zero, mean, blur, road, or token_drop"):
        mask_patches(images(1, 8), torch.ones(1, 4, dtype=torch.bool), 2, "black")


def test_sampled_patches_differ_and_follow_the_seed() -> None:
    def draw(seed: int) -> torch.Tensor:
        return sample_patches(50, 9, 4, torch.Generator().manual_seed(seed))

    patches = draw(0)
    assert patches.shape == (50, 4)
    assert patches.dtype == torch.int64
    assert all(len(set(row)) == 4 and set(row) <= set(range(9)) for row in patches.tolist())
    assert {patch for row in patches.tolist() for patch in row} == set(range(9))
    assert torch.equal(patches, draw(0))
    assert not torch.equal(patches, draw(1))


def test_all_patches_may_be_sampled_but_no_more() -> None:
    assert sorted(sample_patches(1, 9, 9)[0].tolist()) == list(range(9))
    for k in (0, 10):
        with pytest.raises(ValueError, match=f"k={k} of 9 patches; choose k between 1 and 9"):
            sample_patches(1, 9, k)


def test_sampling_through_a_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    sample_patches(2, 9, 4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("grid_size", [4, (3, 5)])
@pytest.mark.parametrize("hops", [0, 1, 2])
def test_averaging_equals_a_loop(grid_size, hops) -> None:
    rows, columns = as_pair(grid_size)
    scores = torch.randn(2, 3, rows * columns, generator=torch.Generator().manual_seed(0))
    averaged = average_over_neighborhoods(scores, grid_size, hops)
    maps = scores.view(2, 3, rows, columns)
    for row, column in itertools.product(range(rows), range(columns)):
        window = maps[..., max(0, row - hops) : row + hops + 1, max(0, column - hops) : column + hops + 1]
        torch.testing.assert_close(averaged[..., row * columns + column], window.mean((-2, -1)))


@pytest.mark.parametrize(
    ("num_tokens", "height", "width", "expected"),
    [
        (65, 64, 64, (1, 8, 8)),  # ViT, patches of 8 pixels
        (196, 224, 224, (0, 14, 14)),
        (197, 224, 224, (1, 14, 14)),  # ViT-B/16
        (198, 224, 224, (2, 14, 14)),  # DeiT with a distillation token
        (201, 224, 224, (5, 14, 14)),  # class token and 4 registers
        (261, 224, 224, (5, 16, 16)),  # DINOv2 with registers, patches of 14 pixels
        (577, 384, 384, (1, 24, 24)),
        (50, 224, 224, (1, 7, 7)),  # ViT-B/32
        (49, 224, 224, (0, 7, 7)),  # Swin's last stage
        (3136, 224, 224, (0, 56, 56)),  # Swin's first stage
        (1 + 3 * 5, 24, 40, (1, 3, 5)),
        (1 + 5 * 3, 40, 24, (1, 5, 3)),
        (1 + 14 * 28, 224, 448, (1, 14, 28)),
        (1, 224, 224, None),
        (2, 224, 224, None),
        (30, 224, 224, (5, 5, 5)),
        (3, 224, 224, None),
        (213, 224, 224, None),  # 14 x 14 and 17 more: too many to be prefix tokens
    ],
)
def test_token_grid(num_tokens, height, width, expected) -> None:
    assert token_grid(num_tokens, height, width) == expected


def test_token_grid_of_every_square_with_up_to_five_prefix_tokens() -> None:
    for side, prefix in itertools.product(range(3, 33), range(6)):
        assert token_grid(prefix + side * side, 448, 448) == (prefix, side, side)


def test_is_grid_wants_square_cells_up_to_rounding() -> None:
    assert is_grid(7, 7, 224, 224)
    assert is_grid(3, 5, 96, 160)
    assert is_grid(7, 10, 213, 320)  # strides of 32, rounded up in each direction
    assert not is_grid(5, 3, 96, 160)
    assert not is_grid(7, 8, 224, 224)
    assert not is_grid(1, 1, 224, 224)  # one cell has no place to point at
    assert not is_grid(225, 225, 224, 224)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (224, 224, (14, 14)),
        (256, 256, (16, 16)),
        (160, 160, (16, 16)),
        (128, 128, (16, 16)),
        (299, 299, (13, 13)),
        (384, 384, (12, 12)),  # 16 is as near, and costs more
        (518, 518, (14, 14)),
        (224, 448, (7, 14)),
        (96, 224, (6, 14)),
        (480, 640, (12, 16)),
        (32, 32, (16, 16)),
        (2, 2, (2, 2)),
    ],
)
def test_dividing_grid(height, width, expected) -> None:
    assert dividing_grid(height, width) == expected


@pytest.mark.parametrize(("side", "patches"), [(160, 10), (224, 8), (64, 8), (384, 8)])
def test_dividing_grid_near_another_number(side, patches) -> None:
    assert dividing_grid(side, side, longest=10) == (patches, patches)


def test_dividing_grid_has_square_patches_and_none_is_nearer() -> None:
    for height, width in itertools.product(range(32, 321, 16), repeat=2):
        grids = {}
        for rows, columns in itertools.product(range(1, 41), repeat=2):
            if height % rows == 0 and width % columns == 0 and height // rows == width // columns:
                grids[rows, columns] = abs(max(rows, columns) - 14)
        rows, columns = dividing_grid(height, width)
        assert grids[rows, columns] == min(grids.values())


@pytest.mark.parametrize(("height", "width"), [(227, 227), (213, 320), (331, 331), (1, 1)])
def test_sizes_that_no_sensible_grid_divides_are_refused(height, width) -> None:
    with pytest.raises(ValueError, match=f"divides images of {height} x {width} pixels; pass a grid_size"):
        dividing_grid(height, width)


@pytest.mark.parametrize("grid_size", [(2, 6), (2, 3), (1, 2)])
def test_rows_of_patches_are_masked_and_their_padding_is_not(grid_size) -> None:
    rows, columns = grid_size
    shapes = torch.tensor([[2, 6], [4, 6], [6, 6]])
    pixel_values = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(3, 4, rows * columns, generator=generator) > 0.5
    masked = mask_patches(pixel_values, keep, grid_size, spatial_shapes=shapes)
    assert masked.shape == (3, 4, 40, 5)
    for b, k in itertools.product(range(3), range(4)):
        height, width = shapes[b].tolist()
        expected = pixel_values[b].clone()
        for row, column in itertools.product(range(height), range(width)):
            if not keep[b, k, row * rows // height * columns + column * columns // width]:
                expected[row * width + column] = 0
        assert torch.equal(masked[b, k], expected)
    common = mask_patches(pixel_values, keep[0], grid_size, spatial_shapes=shapes)
    assert torch.equal(common[0], masked[0])


def test_rows_of_patches_that_cannot_be_masked_are_refused() -> None:
    pixel_values, shapes = torch.zeros(1, 12, 5), torch.tensor([[2, 6]])
    keep = torch.ones(1, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="grid of 4 x 4 patches does not divide an image of 2 x 6 patches"):
        mask_patches(pixel_values, keep, 4, spatial_shapes=shapes)
    with pytest.raises(ValueError, match=r"shape \(1, 12, 5\); pass images, or rows of patches with the spatial_sh"):
        mask_patches(pixel_values, keep, 4)
    with pytest.raises(ValueError, match="no neighbours for removal='blur'"):
        mask_patches(pixel_values, keep[:, :12], (2, 6), "blur", shapes)
