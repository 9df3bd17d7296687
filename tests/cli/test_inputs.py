"""Which images arguments lead to."""

import io
import os
import sys
from pathlib import PurePath

import pytest
from tiny import noise_image

from tve_hf.cli.inputs import sources_of


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with images in folders, and what is no image."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.PNG", "in/c.png", "in/deep/d.webp", ".hidden/e.png", "in/.f.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(0).save(path)
    for name in ("notes.txt", "b.tve.json", "b.tve.png", "b.tve.12.png", "mine.tve.png", "in/table.json"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names(*arguments, lists=()):
    return [source.name for source in sources_of(arguments, lists)]


def places(*arguments):
    return [str(source.place) for source in sources_of(arguments)]


def test_a_folder_gives_its_images_in_order_and_keeps_its_folders(place):
    """Neither what is hidden, nor results; but a photograph that only has a name as these."""
    expected = ["a.PNG", "b.jpg", "mine.tve.png", "in/c.png", "in/deep/d.webp"]
    assert names(".") == [f"./{name}" for name in expected]
    assert places(".") == places(str(place)) == expected
    assert places("in") == ["c.png", "deep/d.webp"]


@pytest.mark.parametrize(
    ("pattern", "found", "kept"),
    [
        ("*.jpg", ["b.jpg"], ["b.jpg"]),
        ("**/*.webp", ["in/deep/d.webp"], ["in/deep/d.webp"]),
        ("in/*.png", ["in/c.png"], ["c.png"]),
        ("in/**/*.[pw]*", ["in/c.png", "in/deep/d.webp"], ["c.png", "deep/d.webp"]),
        ("b.*", ["b.jpg", "b.tve.json"], ["b.jpg", "b.tve.json"]),
    ],
)
def test_patterns(place, pattern, found, kept):
    assert names(pattern) == found
    assert places(pattern) == kept


def test_what_exists_is_no_pattern(place):
    noise_image(0).save(place / "odd[1].png")
    assert names("odd[1].png") == ["odd[1].png"]


def test_each_image_comes_once_however_it_is_named(place):
    assert names("b.jpg", str(place / "in" / ".." / "b.jpg"), "*.jpg") == ["b.jpg"]
    os.symlink(place / "b.jpg", place / "link.jpg")  # another name, and so other results
    assert names("b.jpg", "link.jpg") == ["b.jpg", "link.jpg"]
    os.symlink(place / "in", place / "same")
    assert names("in/c.png", "same/c.png") == ["in/c.png"]


def test_home(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    assert sources_of(["~/b.jpg"])[0].image == str(place / "b.jpg")
    assert names("~/*.jpg") == [str(place / "b.jpg")]


@pytest.mark.parametrize("argument", ["no/such.png", "empty", "*.nothing"])
def test_what_leads_to_no_image_is_a_source_of_its_own(place, argument):
    (place / "empty").mkdir()
    (source,) = sources_of([argument])
    assert source.name == argument
    if argument != "no/such.png":  # which `load_image` says
        assert isinstance(source.image, ValueError) and argument in str(source.image)


def test_addresses(place):
    first, second, third = sources_of(["https://x.org/a/cat.jpg?size=3#top", "data:image/png;base64,AAAA", "A" * 5000])
    assert (first.place, first.key) == (PurePath("cat.jpg"), "https://x.org/a/cat.jpg?size=3#top")
    assert second.place == third.place == PurePath("image")
    assert second.key != third.key and second.key.startswith("sha256:")


def stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_lists(place, monkeypatch):
    (place / "list.txt").write_bytes(b"\xef\xbb\xbfb.jpg\r\n\r\nin\n")
    assert names("a.PNG", lists=["list.txt"]) == ["a.PNG", "b.jpg", "in/c.png", "in/deep/d.webp"]
    stdin(monkeypatch, b"in/c.png\n")
    assert names(lists=["-"]) == ["in/c.png"]
    with pytest.raises(ValueError, match="only one"):
        names("-", lists=["-"])
    (place / "blank.txt").write_text("\n")
    with pytest.raises(ValueError, match="'blank.txt' is empty"):
        names(lists=["blank.txt"])


@pytest.mark.parametrize(
    ("data", "said"), [(b"", "is empty"), (b"b.jpg\nin/c.png\n", "--images-from -"), (b"\0\xff", "")]
)
def test_standard_input(monkeypatch, data, said):
    stdin(monkeypatch, data)
    (source,) = sources_of(["-"])
    if said:
        assert said in str(source.image)
    else:
        assert source.image["bytes"] == data
