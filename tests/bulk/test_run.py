"""Rows are the pipeline's results, whatever became of the run in between."""

import os
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from interruptions import at_call, die, in_a_fork
from tiny import GRID, noise_image
from transformers import pipeline

from tve_hf.bulk import ahead, run, shards
from tve_hf.bulk.run import explain_rows, prepared_batches
from tve_hf.bulk.shards import Folder
from tve_hf.bulk.work import Process, Work
from tve_hf.sources import open_images

BAD, NUMBER = 4, 11


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images of several sizes in a parquet file, of which the fifth cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{seed:02}.png" for seed in range(NUMBER)]
    for seed, path in enumerate(paths):
        noise_image(seed, (40 + seed, 30)).save(path)
    paths[BAD].write_bytes(paths[BAD].read_bytes()[:50])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield open_images([str(folder)])


@pytest.fixture
def explainer(pair):
    return pipeline("transferable-attribution", model=str(pair[1]), classifier=str(pair[0]))


def do(explainer, images, path, world=1, size=3, batch_size=2, **settings):
    """Run all processes, one after the other; return the number of images and errors that they explained."""
    found = []
    for rank in range(world):
        folder, work = Folder(path, settings, "", rank == 0), Work(images, size, Process(rank, world))
        found += explain_rows(explainer, work, folder, folder.finished(work.is_own), batch_size)
    return tuple(map(sum, zip(*found, strict=True))) if found else (0, 0)


def rows_in(path):
    return [row for file in sorted((path / "data").glob("maps-*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"class_idx": [3, 1]}, {"verify": 5}, {"method": "occlusion"}])
def test_rows_are_the_results_of_the_pipeline(pair, images, tmp_path, options):
    explainer = pipeline("transferable-attribution", model=str(pair[1]), classifier=str(pair[0]), **options)
    assert do(explainer, images, tmp_path) == (NUMBER, 1)
    expected = []
    for number in range(NUMBER):
        path = images.data[number]["image"]["path"]
        for result in explainer(path, on_error="skip"):
            expected.append((str(number), path, result))
    rows = rows_in(tmp_path)
    assert [(row["id"], row["image"]) for row in rows] == [(number, path) for number, path, _ in expected]
    for row, (_, _, result) in zip(rows, expected, strict=True):
        if "error" in result:
            assert row["error"] == result["error"] and row["map"] is None
            continue
        assert row["error"] is None and row["label"] == result["label"] and row["class_idx"] == result["class_idx"]
        assert row["probability"] == pytest.approx(result["score"], rel=1e-4)
        found = np.array(row["map"], np.float32)
        assert found.shape == result["attribution"].shape
        assert np.allclose(found, result["attribution"], rtol=2e-3, atol=1e-4)
        checked = result.get("verification", {}).get("spearman")
        assert row["trust"] == (pytest.approx(checked, abs=0.05) if checked is not None else None)


def test_without_verification_trust_is_what_the_explainer_reached_on_held_out_images(explainer, images, tmp_path):
    explainer.quality = {"num_images": 8, "spearman": 0.75, "fidelity_gap": 1, "exact_fidelity_gap": 2}
    do(explainer, images, tmp_path)
    assert {row["trust"] for row in rows_in(tmp_path)} == {0.75, None}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("place", "name", "call"),
    [(run, "read_image", 6), (shards.pq, "write_table", 2), (os, "replace", 4), (torch, "cat", 4)],
)
def test_killed_at_any_moment_a_run_goes_on_without_losing_or_repeating_a_row(
    explainer, images, tmp_path, monkeypatch, place, name, call, world
):
    do(explainer, images, tmp_path / "whole")

    def killed():
        monkeypatch.setattr(place, name, at_call(call, die, getattr(place, name)))
        do(explainer, images, tmp_path / "out", world)

    assert in_a_fork(killed) == -9
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "data").glob("maps-*")}
    number, _ = do(explainer, images, tmp_path / "out", world)
    assert number == NUMBER - sum(pq.read_table(tmp_path / "out" / "data" / name).num_rows for name in before)
    assert all((tmp_path / "out" / "data" / name).stat().st_mtime_ns == time for name, time in before.items())
    whole, found = rows_in(tmp_path / "whole"), rows_in(tmp_path / "out")
    assert [row["id"] for row in found] == [row["id"] for row in whole] == [str(i) for i in range(NUMBER)]
    for row, other in zip(found, whole, strict=True):
        assert row["label"] == other["label"] and (row["map"] is None) == (other["map"] is None)
        assert row["map"] is None or np.allclose(row["map"], other["map"], atol=1e-3)
    assert do(explainer, images, tmp_path / "out", world) == (0, 0)


def test_an_image_that_the_models_cannot_explain_is_a_row_and_what_no_image_passes_is_an_error(
    explainer, images, tmp_path, monkeypatch
):
    forward = explainer.forward

    def refuse(inputs, **options):
        if (inputs["pixel_values"] == marked).flatten(1).all(1).any():
            raise ValueError("The scores are not finite.")
        return forward(inputs, **options)

    with ThreadPoolExecutor(1) as pool:
        first = next(prepared_batches(pool, explainer, Work(images, 3).rows(()), 2))
    marked = first[1][1]["pixel_values"][0]
    monkeypatch.setattr(explainer, "forward", refuse)
    assert do(explainer, images, tmp_path / "one") == (NUMBER, 2)
    assert [row["error"] for row in rows_in(tmp_path / "one")][:3] == [None, "The scores are not finite.", None]
    monkeypatch.setattr(explainer, "forward", at_call(0, None, lambda *_, **__: int("no number")))
    with pytest.raises(ValueError, match="invalid literal"):
        do(explainer, images, tmp_path / "none")
    assert rows_in(tmp_path / "none") == []


def test_images_that_are_processed_to_several_shapes_are_explained_in_one_batch(explainer):
    calls = []

    class Stub:
        _forward_params: dict = {}

        def forward(self, inputs):
            calls.append(tuple(inputs["pixel_values"].shape))
            return {"results": [{"sum": float(x.sum())} for x in inputs["pixel_values"]]}

    shapes = [(1, 3, 4, 4), (1, 3, 5, 4), (1, 3, 4, 4)]
    prepared = [{"pixel_values": torch.full(shape, i + 1.0), "image": None} for i, shape in enumerate(shapes)]
    found = run.results_of(Stub(), prepared)
    assert [result["sum"] for result in found] == [48.0, 120.0, 144.0]
    assert calls == [(2, 3, 4, 4), (1, 3, 5, 4)]


def test_grid_of_the_maps(explainer, images, tmp_path):
    do(explainer, images, tmp_path)
    assert {np.shape(row["map"]) for row in rows_in(tmp_path) if row["map"]} == {(GRID, GRID)}


def test_no_more_is_begun_than_there_is_room_for():
    begun = []
    with ThreadPoolExecutor(2) as pool:
        items = ahead.ahead(pool, lambda item: item * item, (begun.append(i) or i for i in range(9)), 3)
        for taken, (item, square) in enumerate(items):
            assert (item, square) == (taken, taken**2) and len(begun) <= taken + 4
    assert begun == [*range(9)]
