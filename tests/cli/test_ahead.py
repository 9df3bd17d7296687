"""Decoding ahead: in order, bounded, and one bad image leaves the others of its batch."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePath

import pytest
from PIL import Image
from tiny import noise_image

from tve_hf.cli import ahead
from tve_hf.cli.ahead import Item, batches, decoded, explained
from tve_hf.cli.inputs import Source


def source(name, image):
    return Source(name, image, PurePath(name), name)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as threads:
        yield threads


def test_images_come_in_order_and_errors_in_their_places(pool, tmp_path):
    noise_image(0).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    given = [tmp_path / "good.png", tmp_path / "bad.png", ValueError("empty"), tmp_path / "missing.png"] * 3
    sources = [source(str(number), image) for number, image in enumerate(given)]
    items = [*decoded(pool, sources, 4)]
    assert [item.index for item in items] == [*range(12)] and [item.source for item in items] == sources
    kinds = [type(item.picture) for item in items]
    assert kinds == [Image.Image, ValueError, ValueError, FileNotFoundError] * 3


@pytest.mark.parametrize(("side", "at_most"), [(10, 5), (4000, 5), (6000, 3)])
def test_what_waits_is_bounded_by_number_and_by_pixels(monkeypatch, side, at_most):
    """A pool that decodes at once, so that as much waits as may."""
    begun = []

    class Now:
        def submit(self, function, image):
            begun.append(image)
            done = Future()
            done.set_result(Image.new("1", (side, side)))
            return done

    items = decoded(Now(), (source(str(number), number) for number in range(20)), 5)
    for taken in range(20):
        next(items)
        assert len(begun) - taken <= at_most
    assert len(begun) == 20 and next(items, None) is None


def test_batches_are_smaller_where_images_are_large():
    def item(number, side):
        return Item(number, source("", None), Image.new("1", (side, side)) if side else ValueError("bad"))

    sides = [10] * 7 + [7000, 7000, 9000, 0, 10]
    found = [[each.index for each in batch] for batch in batches(map(item, range(12), sides), 4)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11]]


def test_one_image_that_fails_leaves_the_others_of_its_batch():
    calls = []

    def explainer(images, batch_size=None):
        calls.append(batch_size)
        alone = not isinstance(images, list)
        results = []
        for image in [images] if alone else images:
            if image.width == 13:
                raise RuntimeError("13")
            results.append([{"width": image.width}])
        return results[0] if alone else results

    unread = OSError("unreadable")
    pictures = [Image.new("1", (10, 1)), unread, Image.new("1", (13, 1)), Image.new("1", (12, 1))]
    batch = [Item(index, source("", None), picture) for index, picture in enumerate(pictures)]
    first, second, third, fourth = explained(explainer, batch)
    assert (first, second, fourth) == ([{"width": 10}], unread, [{"width": 12}])
    assert isinstance(third, RuntimeError) and calls == [3, None, None, None]
    calls.clear()
    assert explained(explainer, [batch[0], batch[1], batch[3]]) == [[{"width": 10}], unread, [{"width": 12}]]
    assert calls == [2]  # at once


def test_decoding_goes_on_while_the_model_runs(tmp_path, pool, monkeypatch):
    """The images of the next batch are read before the results of this one are there."""
    read = [threading.Event() for _ in range(4)]
    monkeypatch.setattr(ahead, "load_image", lambda number: read[number].set() or noise_image(number))
    sources = [source(str(number), number) for number in range(4)]
    for batch in batches(decoded(pool, sources, 4), 2):
        assert all(event.wait(10) for event in read[: batch[-1].index + 3])
