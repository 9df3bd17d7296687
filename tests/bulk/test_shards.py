"""Shards are whole, of one run, and read by `datasets`; damage and foreign folders are told in a sentence."""

import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from interruptions import fill_disk

from tve_hf.bulk import shards
from tve_hf.bulk.card import render
from tve_hf.bulk.shards import Folder
from tve_hf.files import Unwritable

SETTINGS = {"classifier": "org/vit", "source": "photos", "method": "grad_cam", "shard_size": 2}
MAP = np.array([[1.5, -2.0, 0.0], [6e-5, -0.1, 3.0]], np.float16)


def row(number):
    known = {"id": str(number), "image": f"{number}.jpg"}
    return [known | {"label": "cat", "class_idx": 3, "probability": 0.25, "map": [*MAP], "trust": 0.5}]


def folder_in(path, **settings):
    settings = SETTINGS | settings
    return Folder(path, settings, render(path, settings, None))


@pytest.fixture
def folder(tmp_path):
    """Three shards, the last with an image that cannot be read and one with rows for two classes."""
    made = folder_in(tmp_path / "out")
    assert made.write((0, 0), [row(0), row(1)]) == 2
    assert made.write((0, 1), [row(2), row(3)]) == 2
    assert made.write((0, 2), [[{"id": "4", "image": None, "error": "no image"}], row(5) * 2]) == 2
    return made


def shard(folder, number):
    return folder.path / "data" / f"maps-00000-{number:05}.parquet"


def test_datasets_loads_them_back_and_the_partial_files_of_a_killed_run_are_no_rows(folder, isolated):
    (folder.path / "data" / ".maps-00000-00003.parquet.partial.parquet").write_bytes(b"PAR1")
    rows = datasets.load_dataset(str(folder.path), split="train")
    assert rows["id"] == ["0", "1", "2", "3", "4", "5", "5"]
    assert rows.features == shards.FEATURES
    assert np.array_equal(np.array(rows[0]["map"]), MAP.astype(float))
    assert rows[3]["probability"] == 0.25 and rows[3]["error"] is None
    assert {name for name, value in rows[4].items() if value is not None} == {"id", "error"}
    assert folder_in(folder.path).finished() == {(0, 0): 2, (0, 1): 2, (0, 2): 2}


def test_a_process_reads_its_own_shards(folder):
    shard(folder, 0).write_bytes(b"damaged")
    assert folder.finished(lambda unit: unit[1] == 1) == {(0, 1): 2}


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    """A bit in the middle of the values."""
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b"", lambda data: b"no parquet" * 20])
def test_damaged_shards_are_named_and_the_others_stay_valid(folder, damage):
    shard(folder, 1).write_bytes(damage(shard(folder, 1).read_bytes()))
    with pytest.raises(ValueError, match=r"00001\.parquet is damaged .*; delete maps-00000-00001\.parquet, and the"):
        folder.finished()
    shard(folder, 1).unlink()
    assert folder.finished() == {(0, 0): 2, (0, 2): 2}


def test_shards_of_another_run_and_other_files_are_named_too(folder, tmp_path):
    other = folder_in(tmp_path / "other", source="paintings")
    other.write((0, 0), [row(0), row(1)])
    shard(folder, 0).write_bytes(shard(other, 0).read_bytes())
    table = pq.read_table(shard(folder, 1)).replace_schema_metadata({})
    pq.write_table(table, folder.path / "data" / "mine.parquet")
    with pytest.raises(ValueError, match=r"maps-00000-00000\.parquet is damaged or of another run .*, and 1 more"):
        folder.finished()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and no run of `tve-hf explain` over a data set began it"):
        folder_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_other_settings_are_named(folder):
    with pytest.raises(ValueError, match=r"other settings \(source was 'photos' and is 'x', rule was None and is 'l"):
        folder_in(folder.path, source="x", rule="logit")
    (folder.path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json cannot be read"):
        folder_in(folder.path)


@pytest.mark.parametrize("function", ["write_table", "replace"])
def test_a_full_disk_leaves_whole_shards(folder, monkeypatch, function):
    place = shards.pq if function == "write_table" else __import__("os")
    before = sorted(folder.path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(place, function, fill_disk)
        with pytest.raises(Unwritable, match=r"takes no results \(No space left on device\): free some, or pass"):
            folder.write((0, 3), [row(6)])
    assert sorted(folder.path.rglob("*")) == before
    assert folder.finished() == {(0, 0): 2, (0, 1): 2, (0, 2): 2}


def test_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Unwritable, match="takes no results"):
        folder_in(tmp_path / "file" / "below")


def test_the_first_process_begins_a_folder_in_which_others_were_faster(tmp_path):
    late = Folder(tmp_path / "out", SETTINGS, "card", is_main=False)
    late.write((0, 1), [row(2)])
    assert not (tmp_path / "out" / "settings.json").exists()
    assert folder_in(tmp_path / "out").finished() == {(0, 1): 1}
    (tmp_path / "out" / "settings.json").unlink()
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "data" / "mine.parquet").write_bytes(b"anything")
    with pytest.raises(ValueError, match="is not empty"):
        folder_in(tmp_path / "out")


def test_the_card_names_classifier_explainer_rule_and_settings(folder):
    text = (folder.path / "README.md").read_text()
    assert "method `grad_cam`" in text and "| `source` | `photos` |" in text
    settings = {"classifier": "org/vit", "explainer": "org/tve", "source": "s", "method": "tve", "rule": "prob"}
    text = render(folder.path, settings, {"num_images": 9, "logit_r2": 0.5, "embedding_r2": 0.5})
    assert "explainer `org/tve`" in text and "accounts for 50% of" in text and "| `rule` | `prob` |" in text
    assert "change of probability" in text and "$" not in text
    assert json.loads((folder.path / "settings.json").read_text()) == SETTINGS
