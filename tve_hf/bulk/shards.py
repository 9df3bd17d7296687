"""The folder of a run: its settings, and shards of rows that are whole or absent."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value

from ..files import dumps, write_whole, writing_to
from ..inputs import shown
from .work import Unit

SETTINGS = "settings.json"
DATA = "data"
_MARK = b"tve_hf"  # of a shard's metadata: which settings made it, and how many images it holds
# A row for each image and class; for an image that cannot be read one, with nothing but its error.
FEATURES = Features(
    {
        "id": Value("string"),
        "image": Value("string"),
        "label": Value("string"),
        "class_idx": Value("int64"),
        "probability": Value("float32"),
        "map": List(List(Value("float16"))),
        "trust": Value("float32"),
        "error": Value("string"),
    }
)


class Folder:
    """Where the shards of a run are, and those of all runs that went before it with the same settings.

    Args:
        path: of the folder, which need not exist.
        settings: what the rows depend on.
        card: the data set's card, README.md.
        is_main: whether this process begins the folder; the others of a launch only add shards.

    Raises:
        ValueError: If the folder holds something else, or was begun with other settings.
        Unwritable: If nothing can be written there.
    """

    def __init__(self, path: Path, settings: dict[str, Any], card: str, is_main: bool = True):
        self.path = path
        text = dumps(settings, indent=1) + "\n"
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        before = read_settings(path)
        if before is not None and (differing := _difference(before, json.loads(text))) is not None:
            raise ValueError(
                f"{path} was begun with other settings ({differing}); pass those to go on, or another --output."
            )
        if before is None and is_main and self._holds_something_else():
            raise ValueError(
                f"{path} is not empty, and no run of `tve-hf explain` over a data set began it; pass another --output."
            )
        with writing_to(path):
            (path / DATA).mkdir(parents=True, exist_ok=True)
            if is_main:  # the settings first: with them a run has begun
                write_whole(path / SETTINGS, lambda partial: partial.write_text(text))
                write_whole(path / "README.md", lambda partial: partial.write_text(card))

    def _holds_something_else(self) -> bool:
        """Whether there is more in the folder than shards of processes that were faster."""
        names = [file.name for file in self.path.iterdir()] if self.path.is_dir() else []
        return any(name != DATA and not name.startswith(".") for name in names) or bool(self._read()[1])

    def finished(self, is_own: Callable[[Unit], bool] = lambda unit: True) -> dict[Unit, int]:
        """Read the finished shards of one process: the number of images of each.

        Raises:
            ValueError: If some of them are damaged or from elsewhere; it names them.
        """
        units, bad = self._read(is_own)
        if bad:
            name, reason = next(iter(bad.items()))
            others = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise ValueError(
                f"{self.path / DATA / name} is damaged or of another run ({reason}){others}; delete "
                f"{' '.join(bad) if len(bad) <= 10 else 'them'}, and the same command writes them anew."
            )
        return units

    def _read(self, is_own: Callable[[Unit], bool] = lambda unit: True) -> tuple[dict[Unit, int], dict[str, str]]:
        """The number of images of each shard, and what is wrong with files that are none."""
        units: dict[Unit, int] = {}
        bad: dict[str, str] = {}
        for file in sorted((self.path / DATA).glob("*.parquet")):
            if file.name.startswith("."):  # unfinished
                continue
            try:
                unit = _unit_of(file)
                if is_own(unit):
                    units[unit] = self._images_of(file)
            except (pa.ArrowException, OSError, ValueError) as error:
                bad[file.name] = " ".join(str(error).split())[:100]
        return units, bad

    def _images_of(self, file: Path) -> int:
        table = pq.read_table(file, page_checksum_verification=True)
        digest, _, number = (table.schema.metadata or {}).get(_MARK, b"").decode().partition(" ")
        if digest != self._digest:
            raise ValueError("not made with these settings")
        return int(number)

    def write(self, unit: Unit, images: Iterable[list[dict[str, Any]]]) -> int:
        """Write the shard of a unit whole, and return the number of its images.

        Args:
            images: for each image its rows, as `FEATURES` has them.

        Raises:
            Unwritable: If there is no space, or no permission.
        """
        by_image = list(images)
        schema = FEATURES.arrow_schema
        mark = {_MARK: f"{self._digest} {len(by_image)}".encode()}
        table = pa.Table.from_pylist([row for rows in by_image for row in rows], schema=schema)
        table = table.replace_schema_metadata((schema.metadata or {}) | mark)
        file = self.path / DATA / f"maps-{unit[0]:05}-{unit[1]:05}.parquet"
        with writing_to(self.path):
            write_whole(file, lambda partial: pq.write_table(table, partial, write_page_checksum=True))
        return len(by_image)


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings that a folder was begun with; None if it was not.

    Raises:
        ValueError: If they cannot be read.
    """
    file = path / SETTINGS
    if not os.path.lexists(file):
        return None
    try:
        settings = json.loads(file.read_bytes())
        if isinstance(settings, dict):
            return settings
        reason = "no settings of a run"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"{file} cannot be read ({reason}); pass another --output, or bring the file back.")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What differs between two settings, in words; None if nothing does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    said = [f"{name} was {shown(before.get(name))} and is {shown(now.get(name))}" for name in names[:3]]
    return ", ".join(said + [f"{len(names) - 3} more"] * (len(names) > 3)) or None


def _unit_of(file: Path) -> Unit:
    try:
        _, number, part = file.stem.split("-")
        return int(number), int(part)
    except ValueError:
        raise ValueError("no name of a shard") from None
