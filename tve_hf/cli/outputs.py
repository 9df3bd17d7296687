"""Where results go: `photo.tve.png` and `photo.tve.json`, never in the place of a file that is not the image's own."""

import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ..files import dumps, write_together, writing_to
from .inputs import Source, location

# What results are drawn as: no numbers, and drawn only when they are read.
_DRAWN = ("heatmap", "overlay", "figure")
# Of zlib: a tenth larger than by default, written in a quarter of the time.
_COMPRESSION = 1
_RESULT = re.compile(r"(?P<stem>.+)\.tve(\.json|(\.\d+)?\.png)", re.DOTALL | re.IGNORECASE)


def check_folder(folder: Path) -> None:
    """Raise ValueError if results cannot go there because it, or a folder above it, is a file."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            raise ValueError(f"--output {folder}: {place} is a file; name a folder, which need not exist.")


def places_of(folder: Path, sources: Sequence[Source]) -> list[Path]:
    """Where the results of each image go, without their ending: the same in every run, and each to a place of its own.

    An image whose results are there keeps their place. Any other gets the stem of its file, such as `photo`; or, where
    another image has or wants that, or files lie there that are not known to be this image's results, `photo.jpg`, or
    `folder-photo.jpg`, or else `photo.jpg-` and a checksum of where it is from.

    Args:
        folder: of all results; images found in folders and by patterns keep their relative folders below it.
        sources: the images.
    """
    wanted = [[folder / source.place.parent / name for name in _names(source)] for source in sources]
    inputs = {_folded(location(source.image)) for source in sources if isinstance(source.image, str)}
    there: dict[str, list[Path]] = defaultdict(list)  # results of any image: place -> files
    for parent in {path.parent for path in itertools.chain(*wanted)}:
        for name in os.listdir(parent) if parent.is_dir() else ():
            if match := _RESULT.fullmatch(name):
                there[_folded(parent / match["stem"])].append(parent / name)
    chosen: dict[int, Path] = {}
    taken: set[str] = set()

    def choose(index: int, place: Path) -> None:
        chosen[index] = place
        taken.add(_folded(place))

    for index, source in enumerate(sources):
        for place in wanted[index]:
            files = there.get(_folded(place), [])
            own = _own_results(place, source.key)
            is_own = bool(own) and all(file.name in own and _folded(location(file)) not in inputs for file in files)
            if is_own and _folded(place) not in taken:
                choose(index, place)
                break
    for level in range(len(wanted[0]) if wanted else 0):
        left = {index: wanted[index][level] for index in range(len(sources)) if index not in chosen}
        claims = Counter(map(_folded, left.values()))
        for index, place in left.items():
            if claims[_folded(place)] == 1 and _folded(place) not in taken and _folded(place) not in there:
                choose(index, place)
    for index in set(range(len(sources))) - set(chosen):
        last = wanted[index][-1]
        numbered = (last.with_name(f"{last.name}-{number}") for number in itertools.count(2))
        choose(index, next(place for place in numbered if not {_folded(place)} & (taken | there.keys())))
    return [chosen[index] for index in range(len(sources))]


def _names(source: Source) -> list[str]:
    """Names of results, the shortest first: the stem of the file, its whole name, its folder's too, a checksum."""
    stem, suffix = os.path.splitext(source.place.name)
    name = f"{_cut(stem, 90) or 'image'}{_cut(suffix, 10)}"
    folder = _cut(PurePath(source.key).parent.name, 40)
    checksum = hashlib.sha256(os.fsencode(source.key)).hexdigest()[:8]
    return [os.path.splitext(name)[0], name, f"{folder}-{name}" if folder else name, f"{name}-{checksum}"]


def _cut(text: str, size: int) -> str:
    """The start of a name, in bytes: names may have 255, of which endings and a hidden partial file take some."""
    return os.fsencode(text)[:size].decode(errors="ignore")


def _folded(path: Path | str) -> str:
    """A path as file systems compare it to which case, or the way that accents are written, makes no difference."""
    return unicodedata.normalize("NFC", os.path.normpath(path)).casefold()


def _with_ending(place: Path, ending: str) -> Path:
    return place.with_name(f"{place.name}.tve{ending}")


def _own_results(place: Path, key: str) -> set[str]:
    """The names of the files there that are results of this image, as the JSON among them says; none if it is not."""
    file = _with_ending(place, ".json")
    try:
        record = json.loads(file.read_bytes())
        names = {Path(explanation["picture"]).name for explanation in record["explanations"]}
        is_own = record["source"] == key
    except (OSError, ValueError, TypeError, KeyError):  # none, or not from here
        return set()
    matches = {name: _RESULT.fullmatch(name) for name in names}
    return (
        {file.name, *(n for n, match in matches.items() if match and match["stem"] == place.name)} if is_own else set()
    )


def save(source: Source, results: list[dict[str, Any]], place: Path, plain: bool = False) -> dict[str, Any]:
    """Draw and write the results of one image, and remove what is left of its earlier ones.

    Args:
        source: the image.
        results: of the pipeline, one for each class.
        place: of the results, from `places_of`.
        plain: pictures without text.

    Returns:
        What the JSON says.

    Raises:
        Unwritable: If there is no space, or no permission; earlier results are then as they were.
    """
    files: dict[Path, Any] = {}
    explanations = []
    for rank, result in enumerate(results, 1):
        path = _with_ending(place, ".png" if len(results) == 1 else f".{rank}.png")
        picture = result["figure" if "figure" in result and not plain else "overlay"]
        files[path] = partial(picture.save, compress_level=_COMPRESSION)
        numbers = {key: result[key] for key in result if key not in _DRAWN}
        plainly = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in numbers.items()}
        explanations.append(plainly | {"picture": str(path)})
    record = {"image": source.name, "source": source.key, "explanations": explanations}
    # Last, for it says whose the others are.
    files[_with_ending(place, ".json")] = partial(Path.write_text, data=dumps(record) + "\n")
    before = _own_results(place, source.key)
    with writing_to(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_together(files)
        for stale in before - {path.name for path in files}:
            (place.parent / stale).unlink(missing_ok=True)
    return record
