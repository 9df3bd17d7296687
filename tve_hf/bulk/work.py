"""Which rows of a data set make which shard, and which process makes it: the same however often a run is started."""

import math
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset

from ..sources import Images

Unit = tuple[int, int]  # file of a stream, 0 where rows are numbered; and which shard of it


class Row(NamedTuple):
    """One undecoded image.

    Args:
        unit: the shard that its results belong to.
        id: which row of the data it is: its number, or that of its file and its number in it.
        image: as `datasets` has it, undecoded.
    """

    unit: Unit
    id: str
    image: Any


@dataclass(frozen=True)
class Process:
    """One of the processes that share the work."""

    rank: int = 0
    world: int = 1


def process_of_launch() -> Process:
    """This process among those that `accelerate launch` or torchrun started.

    They need no other tie: each makes shards of its own, on whatever machine it is.
    """
    return Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def shard_size_for(images: Images, most: int, world: int) -> int:
    """Images of a shard: `most`, or fewer where else some processes would have none."""
    return most if images.number is None else max(1, min(most, math.ceil(images.number / world)))


@dataclass(frozen=True)
class Work:
    """A data set, cut into shards.

    Rows that are numbered are cut into ranges. A stream is cut within each of its files; where these are fewer than
    the processes, every process reads all of them, but decodes its own rows alone.

    Args:
        images: to explain.
        shard_size: images of a shard, but for the last of a file.
        process: whose part of it this is.
    """

    images: Images
    shard_size: int
    process: Process = Process()

    def is_own(self, unit: Unit) -> bool:
        """Whether this process makes that shard."""
        file, part = unit
        number = file if self._num_files >= self.process.world else file + part
        return number % self.process.world == self.process.rank

    def rows(self, finished: Container[Unit]) -> Iterator[Row]:
        """This process's rows, shard by shard, without those of shards that are finished."""
        for file in range(self._num_files):
            for number, image in self._numbered(file, finished):
                unit = file, number // self.shard_size
                if self.is_own(unit) and unit not in finished:
                    yield Row(unit, f"{file}-{number}" if self._num_files > 1 else str(number), image)

    @property
    def _num_files(self) -> int:
        return self.images.data.num_shards if isinstance(self.images.data, IterableDataset) else 1

    def _numbered(self, file: int, finished: Container[Unit]) -> Iterator[tuple[int, Any]]:
        """Rows and their numbers in a file: all of a stream's, or those of numbered rows that are to be explained."""
        data, column = self.images.data, self.images.column
        if isinstance(data, Dataset):
            for begin in range(0, len(data), self.shard_size):
                unit = file, begin // self.shard_size
                if self.is_own(unit) and unit not in finished:
                    rows = data.select(range(begin, min(begin + self.shard_size, len(data))))
                    yield from ((begin + i, row[column]) for i, row in enumerate(rows))
        elif self._num_files < self.process.world or self.is_own((file, 0)):
            one = data.shard(num_shards=self._num_files, index=file) if self._num_files > 1 else data
            yield from ((number, row[column]) for number, row in enumerate(one))
