"""Which images are asked for: paths, addresses, folders, patterns, lists of those, and standard input."""

import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

STDIN = "-"
# What the command makes of an image, beside `photo.tve.json`: in folders and patterns, no photographs.
PICTURE = re.compile(r"(?P<stem>.*)\.tve(\.\d+)?\.png", re.DOTALL | re.IGNORECASE)
_WILDCARDS = re.compile(r"[*?[]")
_ADDRESSES = ("http://", "https://", "data:", "file:")
# Read where pillow-heif is installed, which registers them with PIL only once it is asked.
_HEIF = {".heic", ".heif"}


@dataclass(frozen=True)
class Source:
    """An image that is asked for.

    Args:
        name: as it was typed, or found.
        image: what `load_image` takes, or the error that stands in its place.
        place: where its results go, relative to the folder of results: folders, and the name of its file.
        key: by which it is known again in a later run: its address, or its content where it has none.
    """

    name: str
    image: Any
    place: PurePath
    key: str


def sources_of(arguments: Iterable[str], lists: Iterable[str] = ()) -> list[Source]:
    """The images behind arguments and lists of them, each once, in their order.

    Args:
        arguments: each a path, an address, base64 text, a folder, a pattern, or "-" for an image on standard input.
        lists: text files with one such argument a line, or "-" for standard input.

    Raises:
        ValueError, OSError: If a list cannot be read or is empty. An argument that leads to no image becomes a source
            whose image is an error, for the others are not its fault.
    """
    named = [*arguments]
    for file in lists:
        if file == STDIN and STDIN in named:
            raise ValueError("Standard input is either an image or a list of images; pass only one of both as -.")
        named += _lines_of(file)
    found: dict[str, Source] = {}
    for argument in named:
        for source in _expanded(argument):
            found.setdefault(source.key, source)
    return [*found.values()]


def _lines_of(file: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if file == STDIN else Path(file).expanduser().read_bytes()
    except OSError as error:
        raise OSError(f"The list of images {file!r} cannot be read: {error.strerror}.") from error
    if b"\0" in data:
        raise ValueError(f"The list of images {file!r} is no text; name images themselves without --images-from.")
    lines = [line.rstrip("\r") for line in os.fsdecode(data).removeprefix("\ufeff").split("\n")]
    if not any(line.strip() for line in lines):
        raise ValueError(f"The list of images {file!r} is empty; write one path a line.")
    return [line for line in lines if line.strip()]


def _expanded(argument: str) -> Iterator[Source]:
    """The images behind one argument."""
    if argument == STDIN:
        yield _from_stdin()
        return
    if argument.startswith(_ADDRESSES) or len(argument) > 4096:
        yield _from_address(argument)
        return
    path = os.path.expanduser(argument)
    if os.path.isdir(path):
        files = [file for file in _below(path) if _is_image(file)]
        root, empty = path, f"{argument!r} is a folder without images; name another, or images themselves."
    elif _WILDCARDS.search(argument) and not os.path.lexists(path):
        files = [file for file in sorted(glob.glob(path, recursive=True)) if os.path.isfile(file)]
        files = [file for file in files if not _is_result(file)]
        # The folders before the first wildcard are the user's way to the images, not part of their order.
        root = os.path.dirname(path[: _WILDCARDS.search(path).start()])  # type: ignore[union-attr]
        empty = f"No file matches the pattern {argument!r}; check it."
    else:
        yield from_file(argument, path, PurePath(os.path.basename(path)))
        return
    for file in files:
        yield from_file(file, file, PurePath(os.path.relpath(file, root or os.curdir)))
    if not files:
        yield Source(argument, ValueError(empty), PurePath("image"), argument)


def _below(folder: str) -> Iterator[str]:
    """All files below a folder, in the order of their names; hidden ones and what is in hidden folders left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))


def _is_image(file: str) -> bool:
    from PIL import Image

    extensions = Image.registered_extensions()  # of formats that PIL writes too
    suffix = os.path.splitext(file)[1].lower()
    return (extensions.get(suffix) in Image.OPEN or suffix in _HEIF) and not _is_result(file)


def _is_result(file: str) -> bool:
    """Whether a file is the picture of an earlier run: by its name, and the JSON that lies beside it."""
    match = PICTURE.fullmatch(file)
    return match is not None and os.path.exists(f"{match['stem']}.tve.json")


def from_file(name: str, path: str, place: PurePath) -> Source:
    """A file as a source, whether it exists or not."""
    return Source(name, path, place, location(path))


def location(path: str | os.PathLike[str]) -> str:
    """Where a name is in the file system: its folder without links, but not what the name itself may link to."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def _from_address(text: str) -> Source:
    if text.startswith("data:") or not text.startswith(_ADDRESSES):  # an image in base64
        return Source(text, text, PurePath("image"), _digest(text.encode(errors="surrogateescape")))
    name = re.split(r"[?#]", text)[0].rstrip("/").rpartition("/")[2]
    return Source(text, text, PurePath(name or "image"), text)


def _from_stdin() -> Source:
    data = sys.stdin.buffer.read()
    image: Any = {"bytes": data, "path": None}
    if not data:
        image = ValueError(
            "Standard input is empty; send the bytes of an image, as in `tve-hf explain - < photo.jpg`."
        )
    elif b"\0" not in data and _is_text(data):  # no image format does without
        image = ValueError("Standard input holds text; a list of images is read by `--images-from -`.")
    return Source(STDIN, image, PurePath("stdin"), _digest(data))


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
