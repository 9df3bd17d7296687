"""Write files that are whole or absent, and JSON that every parser reads, although JSON has no NaN and no infinity."""

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Unwritable(OSError):
    """Results cannot be written, whatever they are."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Say in a sentence why a folder takes no results, in a with-block that writes there.

    Raises:
        Unwritable: In place of OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        remedy = "free some" if error.errno == errno.ENOSPC else "check it"
        raise Unwritable(f"{folder} takes no results ({reason}): {remedy}, or pass another --output.") from error


def check_replaceable(path: Path) -> None:
    """Refuse a path where something else than a file is, such as a folder or a device, which renaming would replace.

    Raises:
        OSError: Naming it.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is there and no file; name another one to write.")


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Write beside the file and rename, so that no half-written file stays behind."""
    write_together({path: save})


def write_together(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Write all files beside their places, and rename them once all are whole: in the order given, or not at all.

    Args:
        files: what saves each, given the path to save to.

    Raises:
        OSError: If a place is that of a folder or a device.
    """
    for path in files:
        check_replaceable(path)
    unfinished = {path: path.with_name(f".{path.name}.partial{path.suffix}") for path in files}
    try:
        for path, save in files.items():
            save(unfinished[path])
        for path, partial in unfinished.items():
            os.replace(partial, path)
    finally:
        for partial in unfinished.values():
            partial.unlink(missing_ok=True)


def dumps(value: Any, indent: int | None = None) -> str:
    """Write as JSON; NaN and infinities become the strings "nan", "inf" and "-inf", which `float` reads.

    With an indent, lists of plain values still stand on one line.
    """

    def strict(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: strict(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [strict(entry) for entry in item]
        return str(item) if isinstance(item, float) and not math.isfinite(item) else item

    def one_line(match: re.Match[str]) -> str:
        return "[" + re.sub(r",\n\s+", ", ", match[1]) + "]"

    # A line break in JSON text is never inside a string.
    text = json.dumps(strict(value), indent=indent, allow_nan=False)
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", one_line, text)
