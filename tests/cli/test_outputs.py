"""Where results go: every image to a place of its own, in every run, and never over another file."""

import itertools
import json
import random
from pathlib import Path, PurePath

import numpy as np
import pytest
from PIL import Image

from tve_hf.cli.inputs import Source, from_file
from tve_hf.cli.outputs import check_folder, places_of, save
from tve_hf.files import Unwritable


def sources(*paths):
    return [from_file(str(path), str(path), PurePath(path.name)) for path in paths]


def result(number=0):
    picture = Image.new("RGB", (2, 2), (number, 0, 0))
    return {
        "label": "cat",
        "class_idx": 1,
        "score": 0.5,
        "attribution": np.eye(2),
        "overlay": picture,
        "heatmap": None,
    }


def run(folder, *paths, classes=1):
    """Save results of images as one run does; return the pictures of each."""
    asked = sources(*paths)
    records = [
        save(source, [result() for _ in range(classes)], place)
        for source, place in zip(asked, places_of(folder, asked), strict=True)
    ]
    return [[Path(one["picture"]).name for one in record["explanations"]] for record in records]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_stem_in_two_formats_has_names_that_no_order_changes(tmp_path):
    jpg, png = tmp_path / "in" / "photo.jpg", tmp_path / "in" / "photo.png"
    for number, paths in enumerate(itertools.permutations([jpg, png])):
        found = dict(zip(paths, run(tmp_path / str(number), *paths), strict=True))
        assert found == {jpg: ["photo.jpg.tve.png"], png: ["photo.png.tve.png"]}
    out = tmp_path / "out"
    assert run(out, jpg) == [["photo.tve.png"]]
    assert run(out, png) == [["photo.png.tve.png"]]  # the short name is taken by an image of an earlier run
    for paths in ([jpg], [png], [png, jpg], [jpg, png]):
        found = dict(zip(paths, run(out, *paths), strict=True))
        assert found.items() <= {jpg: ["photo.tve.png"], png: ["photo.png.tve.png"]}.items()
    assert len(names(out)) == 4


def test_one_name_in_two_folders(tmp_path):
    paths = [tmp_path / folder / "photo.jpg" for folder in ("a", "b")]
    assert run(tmp_path / "out", *paths) == [["a-photo.jpg.tve.png"], ["b-photo.jpg.tve.png"]]
    deep = [tmp_path / up / "a" / "photo.jpg" for up in ("x", "y")]
    (one,), (other,) = run(tmp_path / "deep", *deep)
    assert one.startswith("photo.jpg-") and other.startswith("photo.jpg-") and one != other
    assert run(tmp_path / "deep", *reversed(deep)) == [[other], [one]]


def test_case_makes_a_difference_to_no_one(tmp_path):
    """Not every file system tells it."""
    found = run(
        tmp_path / "out", *(tmp_path / name for name in ("Photo.jpg", "photo.jpg", "CAF\u00c9.png", "cafe\u0301.gif"))
    )
    assert len({name.casefold() for (name,) in found}) == 4
    assert all(not name.startswith(("Photo.tve", "photo.tve")) for (name,) in found[:2])


@pytest.mark.parametrize("strange", ["photo.tve.png", "photo.tve.3.png", "photo.tve.json", "PHOTO.TVE.PNG"])
@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b'{"source": 3, "explanations": []}', b"\xff\0"])
def test_what_is_not_known_to_be_the_images_own_stays(tmp_path, strange, content):
    (tmp_path / strange).write_bytes(content)
    for _ in range(2):
        assert run(tmp_path, tmp_path / "photo.jpg") == [["photo.jpg.tve.png"]]
    assert (tmp_path / strange).read_bytes() == content
    assert len(names(tmp_path)) == 3


def test_an_image_that_was_a_result_is_not_overwritten(tmp_path):
    photo, picture = tmp_path / "photo.jpg", tmp_path / "photo.tve.png"
    run(tmp_path, photo)
    before = picture.read_bytes()
    assert run(tmp_path, photo, picture) == [["photo.jpg.tve.png"], ["photo.tve.tve.png"]]
    assert picture.read_bytes() == before


def test_an_image_of_the_name_of_a_result_to_come_is_not_overwritten(tmp_path):
    picture = tmp_path / "photo.tve.png"
    picture.write_bytes(b"an image")
    (tmp_path / "link").symlink_to(tmp_path)
    paths = tmp_path / "photo.jpg", tmp_path / "link" / "photo.tve.png"
    assert run(tmp_path, *paths) == [["photo.jpg.tve.png"], ["photo.tve.tve.png"]]
    assert picture.read_bytes() == b"an image"


def test_pictures_of_more_classes_go_and_those_of_others_stay(tmp_path):
    photo, other = tmp_path / "photo.jpg", tmp_path / "photo.tve.jpg"  # whose results are photo.tve.tve.*
    run(tmp_path, photo, classes=3)
    run(tmp_path, other, classes=2)
    assert run(tmp_path, photo, classes=2) == [["photo.tve.1.png", "photo.tve.2.png"]]
    assert run(tmp_path, photo) == [["photo.tve.png"]]
    assert names(tmp_path) == [
        "photo.tve.json",
        "photo.tve.png",
        "photo.tve.tve.1.png",
        "photo.tve.tve.2.png",
        "photo.tve.tve.json",
    ]


def test_a_record_that_someone_edited_removes_no_other_file(tmp_path):
    photo = tmp_path / "photo.jpg"
    run(tmp_path, photo)
    record = json.loads((tmp_path / "photo.tve.json").read_text())
    for name in ("photo.jpg", "../outside.png", "other.tve.png"):
        record["explanations"].append(record["explanations"][0] | {"picture": str(tmp_path / name)})
        (tmp_path / name).write_bytes(b"keep")
    (tmp_path / "photo.tve.json").write_text(json.dumps(record))
    assert run(tmp_path, photo) == [["photo.tve.png"]]
    for name in ("photo.jpg", "../outside.png", "other.tve.png"):
        assert (tmp_path / name).read_bytes() == b"keep"


def test_many_runs_of_any_images_lose_nothing(tmp_path):
    """Files of the user change by no run, and no two images ever share a result."""
    rng = random.Random(0)
    stems, endings = ("a", "b", "a.tve", "a-b", "A"), (".jpg", ".png", ".tve.png", "")
    files = [tmp_path / folder / f"{s}{e}" for folder in ("", "in") for s in stems for e in endings]
    (tmp_path / "in").mkdir()
    for file in files:
        file.write_bytes(str(file).encode())
    owners: dict[str, Path] = {}
    for _ in range(30):
        asked = rng.sample(files, 6)
        for file, pictures in zip(asked, run(tmp_path, *asked, classes=rng.choice((1, 1, 2, 4))), strict=True):
            for picture in pictures:
                assert owners.setdefault(picture, file) == file
        assert all(file.read_bytes() == str(file).encode() for file in files)


def test_names_stay_short_enough(tmp_path):
    out = tmp_path / "out"
    found = run(out, *(tmp_path / ("\u732b" * 80 + end) for end in ("1.png", "2.png", "." + "x" * 9)), classes=10)
    assert len(names(out)) == 33 and len({tuple(pictures) for pictures in found}) == 3


def test_nothing_is_written_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    check_folder(tmp_path / "new" / "folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is a file; name a folder"):
            check_folder(folder)
    with pytest.raises(Unwritable, match="takes no results"):
        save(sources(tmp_path / "a.jpg")[0], [result()], tmp_path / "file" / "a")


def test_images_without_a_place_are_known_by_their_content(tmp_path):
    one, other = (Source("-", None, PurePath("stdin"), f"sha256:{number}") for number in range(2))
    first = places_of(tmp_path, [one])
    save(one, [result()], first[0])
    second = places_of(tmp_path, [other])
    assert first == [tmp_path / "stdin"] != second and places_of(tmp_path, [one]) == first
