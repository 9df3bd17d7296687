"""Labels on disk: what was kept is read back, and what was not wholly written is computed again."""

import resource
from collections import namedtuple

import pytest
import torch

from tve_hf.pretrain.label_cache import LabelCache

IMAGES, PATCHES, DIM = 5, 3, 8
ROW = 2 * PATCHES * DIM * 2 + 4  # bytes: half precision and a checksum


def cache(folder, anew=False):
    return LabelCache(folder, IMAGES, PATCHES, DIM, anew)


def values(seed, number=IMAGES):
    drawn = torch.randn(2, number, PATCHES, DIM, generator=torch.Generator().manual_seed(seed))
    return drawn[0], drawn[1]


def never():
    raise AssertionError("These labels are on disk.")


def same(found, expected):
    return all(torch.equal(one, other.half()) for one, other in zip(found, expected, strict=True))


def test_labels_are_computed_once(tmp_path):
    exact = values(0)
    order = [3, 0, 4, 1, 2]
    assert same(cache(tmp_path).labels(order, lambda: exact), exact)
    again = cache(tmp_path).labels([1, 3], never)  # as another process, or a resumed one, would ask
    assert same(again, [part[[3, 0]] for part in exact])
    assert (tmp_path / "labels.f16").stat().st_size == IMAGES * ROW
    other = values(1)
    assert same(cache(tmp_path, anew=True).labels(order, lambda: other), other)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "half written":
        content[3 * ROW + ROW // 2 : 4 * ROW] = bytes(ROW - ROW // 2)
    elif how == "a hole":
        content[3 * ROW : 4 * ROW] = bytes(ROW)
    elif how == "one bit":
        content[3 * ROW + 5] ^= 1
    else:
        del content[4 * ROW - 1 :]
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["half written", "a hole", "one bit", "the end is missing"])
def test_a_row_that_is_not_whole_is_computed_again_and_the_others_stay(tmp_path, how):
    first, second = values(0, 4), values(1, 4)
    cache(tmp_path).labels([0, 1, 2, 3], lambda: first)
    damage(tmp_path / "labels.f16", how)
    expected = [torch.cat([one[:3], other[3:]]) for one, other in zip(first, second, strict=True)]
    assert same(cache(tmp_path).labels([0, 1, 2, 3], lambda: second), expected)
    assert same(cache(tmp_path).labels([0, 1, 2, 3], never), expected)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(IMAGES * ROW - 1))
    with pytest.raises(OSError, match="cache_labels needs 5e-07 GB in .*where 4.99e-07 GB.*or leave it out"):
        cache(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "labels.f16").write_bytes(b"1")  # what is there needs no more room
    cache(tmp_path)


def test_a_full_disk_is_said_and_what_was_kept_stays(tmp_path):
    """The system itself refuses to write further."""
    exact = values(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * ROW + 10, before[1]))
    try:
        with pytest.raises(OSError, match="The exact labels could not be written in .*Free some space"):
            cache(tmp_path).labels([0, 1, 2, 3, 4], lambda: exact)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(cache(tmp_path).labels([0, 1, 2], never), [part[:3] for part in exact])


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    kept, removed = values(0, 1)
    with pytest.raises(ValueError, match="too large for half precision; leave cache_labels out"):
        cache(tmp_path).labels([0], lambda: (kept * 1e6, removed))
    assert (tmp_path / "labels.f16").stat().st_size == 0
