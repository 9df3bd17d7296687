"""Which images of a set are sampled: the same ones for a seed, and more when more are asked for."""

import pytest
from tiny import save_noise

from tve_hf.sources import open_images, sample_images


@pytest.fixture
def images(tmp_path):
    return open_images([str(save_noise(tmp_path / "noise.parquet", 7))])


def test_rows_are_those_of_the_images_and_more_extend_fewer(images):
    every, order = sample_images(images, 9, seed=1)
    some, rows = sample_images(images, 3, seed=1)
    assert sorted(order) == list(range(7)) != order and every.number == 7  # all there are, not in their order
    assert rows == order[:3] and some.number == 3
    encoded = images.data[images.column]
    assert some.data[some.column] == [encoded[row] for row in rows]
    assert sample_images(images, 3, seed=2)[1] != rows


def test_none_is_refused(images):
    with pytest.raises(ValueError, match="noise.parquet gives no image with num_images=0; pass at least one"):
        sample_images(images, 0, seed=0)
