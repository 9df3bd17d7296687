"""Shards of rows: each row in one, each shard made by one process, whatever their number."""

import math

import datasets
import pytest
from tiny import save_noise

from tve_hf.bulk.work import Process, Work, process_of_launch, shard_size_for
from tve_hf.sources import open_images

SIZES = (7, 4, 9)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three parquet files, whose images are told apart by a number."""
    folder = tmp_path_factory.mktemp("files")
    return [str(save_noise(folder / f"{i}.parquet", size)) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module", params=["numbered", "stream", "stream of one file"])
def images(request, files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        names = files[:1] if request.param == "stream of one file" else files
        yield open_images(names, streaming=request.param != "numbered")


def rows_of(images, size, world, finished=()):
    """The rows of all processes."""
    return [row for rank in range(world) for row in Work(images, size, Process(rank, world)).rows(finished)]


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_every_row_once_and_in_the_same_shard_however_many_processes(images, world, size):
    alone, shared = rows_of(images, size, 1), rows_of(images, size, world)
    assert [row.image["bytes"] for row in alone] == [row[images.column]["bytes"] for row in images.data]
    assert sorted(row.id for row in shared) == sorted(row.id for row in alone) and len({r.id for r in alone}) == len(
        alone
    )
    key = {row.id: (row.unit, row.image["bytes"]) for row in alone}
    assert {row.id: (row.unit, row.image["bytes"]) for row in shared} == key
    for rank in range(world):
        work = Work(images, size, Process(rank, world))
        units = [row.unit for row in work.rows(())]
        assert units == sorted(units) and all(work.is_own(unit) for unit in units)


@pytest.mark.parametrize("world", [1, 2])
def test_finished_shards_are_left_out(images, world):
    every = rows_of(images, 2, 1)
    finished = {every[0].unit, every[-1].unit}
    left = rows_of(images, 2, world, finished)
    assert sorted(row.id for row in left) == sorted(row.id for row in every if row.unit not in finished)


def test_numbers_of_rows_are_those_of_the_data(images):
    for row in rows_of(images, 3, 2):
        file, _, number = row.id.rpartition("-")
        if not file:
            assert next(r for i, r in enumerate(images.data) if i == int(number))["image"] == row.image
        else:
            first = sum(SIZES[: int(file)])
            assert [*images.data][first + int(number)]["image"] == row.image


def test_no_process_is_without_a_shard_where_the_number_is_known(images):
    for world in (1, 3, 50):
        size = shard_size_for(images, 1000, world)
        if images.number is None:
            assert size == 1000
        else:
            assert size == math.ceil(sum(SIZES) / world) and shard_size_for(images, 2, 3) == 2


def test_processes_are_those_of_the_launch(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert process_of_launch() == Process(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert process_of_launch() == Process(3, 8)
