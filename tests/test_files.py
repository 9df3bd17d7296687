"""Files that are whole or absent, and strict JSON."""

import json
import os

import pytest

from tve_hf.files import dumps, write_together


def strictly(text):
    """Read JSON, but not the NaN and Infinity that only Python reads."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_strict_json():
    nan, inf = float("nan"), float("inf")
    assert strictly(dumps({"a": [1, nan, (inf, -inf)], "b": "NaN"})) == {"a": [1, "nan", ["inf", "-inf"]], "b": "NaN"}


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("before")

    def fail(path):
        path.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_together({one: lambda path: path.write_text("after"), other: fail})
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"] and one.read_text() == "before"
    write_together({path: lambda partial: partial.write_text("after") for path in (one, other)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "other.txt"]
    assert one.read_text() == other.read_text() == "after"


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A pipe, a device or a folder: renaming over it would do away with it, as root even with /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        with pytest.raises(OSError, match=f"{place} is there and no file"):
            write_together({place: lambda partial: partial.write_text("lost")})
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
