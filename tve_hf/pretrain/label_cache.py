"""Exact labels of a pre-training run, kept on disk so that they are computed once for all epochs."""

import errno
import os
import shutil
import zlib
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checkpointing import writing

FILE = "labels.f16"  # scratch, in output_dir
CHECKSUM_BYTES = 4


class LabelCache:
    """Exact kept and removed of some patches of each image, in half precision, in one file.

    For random backgrounds: of pairs of coalitions, with the masks of these as bits. The row of an image is (2, k, D)
    values, the bits if there are any, and the CRC-32 of both, at the place of its number. Where the checksum does not
    hold, the row was never written, or a process was killed while it wrote. So processes may write at the same time,
    each its own images.

    Args:
        output_dir: folder of the file.
        images: their number.
        patches: k, of each; or pairs of coalitions.
        embedding_dim: D.
        anew: whether to remove the file of an earlier run.
        mask_bits: of the coalitions of an image together, K N; 0 if there are none.

    Raises:
        OSError: If the folder's disk has no room for all rows.
    """

    def __init__(
        self, output_dir: Path, images: int, patches: int, embedding_dim: int, anew: bool, mask_bits: int = 0
    ):
        self.output_dir, self.path = output_dir, output_dir / FILE
        self.images, self.shape = images, (2, patches, embedding_dim)
        self.mask_bytes = (mask_bits + 7) // 8
        self.value_bytes = 2 * patches * embedding_dim * torch.half.itemsize
        self.row_bytes = self.value_bytes + self.mask_bytes + CHECKSUM_BYTES
        self.bytes = images * self.row_bytes
        if anew:
            self.path.unlink(missing_ok=True)
        taken = 0 if anew or not self.path.exists() else self.path.stat().st_blocks * 512
        free = shutil.disk_usage(output_dir).free
        if self.bytes - taken > free:
            raise OSError(
                f"cache_labels needs {self.bytes / 1e9:.3g} GB in {output_dir}, where {(free + taken) / 1e9:.3g} GB "
                "are free; free some space, lower patches_per_image, or leave it out."
            )
        self.path.touch()

    def labels(
        self, numbers: list[int], compute: Callable[[], tuple[Tensor, Tensor]], states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read kept and removed of a batch, (B, k, D) float16 each, after computing and keeping what is absent.

        Args:
            numbers: of the images.
            compute: gives kept and removed of them all, (B, k, D) each.
            states: their coalitions, boolean (B, K, N), for random backgrounds.

        Raises:
            OSError: If they cannot be written.
            ValueError: If they are too large for half precision, or those on disk are of other coalitions.
        """
        masks = self._bits(states, len(numbers))
        with self.path.open("rb", buffering=0) as file:
            rows = [self._read(file, *row) for row in zip(numbers, masks, strict=True)]
        if any(row is None for row in rows):
            # All images together, as rounding depends on how many they are, and what is kept stays: so labels are the
            # same to the bit whether or not a killed process had kept some of them before.
            exact = torch.stack(compute(), dim=1)  # (B, 2, k, D)
            half = exact.half()
            if (half.isinf() & exact.isfinite()).any():
                raise ValueError("The backbone's outputs are too large for half precision; leave cache_labels out.")
            with writing("The exact labels", self.output_dir), self.path.open("r+b", buffering=0) as file:
                for place, values in enumerate(half.cpu()):
                    if rows[place] is None:
                        self._write(file, numbers[place], values, masks[place])
                        rows[place] = values
        kept, removed = torch.stack([row for row in rows if row is not None]).unbind(1)
        return kept, removed

    def _bits(self, states: Tensor | None, batch: int) -> list[bytes]:
        """The masks of each image's coalitions as bits."""
        if states is None or not self.mask_bytes:
            return [b""] * batch
        return [row.tobytes() for row in np.packbits(states.cpu().flatten(1).numpy(), axis=1)]

    def _read(self, file: FileIO, number: int, mask: bytes) -> Tensor | None:
        row = os.pread(file.fileno(), self.row_bytes, number * self.row_bytes)
        values = bytearray(row[:-CHECKSUM_BYTES])
        if len(row) < self.row_bytes or _checksum(values) != row[-CHECKSUM_BYTES:]:
            return None
        if values[self.value_bytes :] != mask:
            raise ValueError(
                f"{self.path} holds labels of other coalitions than this run draws; remove it, or go on with the "
                "coalitions and the seed that it was made with."
            )
        return torch.frombuffer(values[: self.value_bytes], dtype=torch.half).view(self.shape)

    def _write(self, file: FileIO, number: int, values: Tensor, mask: bytes) -> None:
        row = values.contiguous().numpy().tobytes() + mask
        if os.pwrite(file.fileno(), row + _checksum(row), number * self.row_bytes) < self.row_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _checksum(values: bytes | bytearray) -> bytes:
    return zlib.crc32(values).to_bytes(CHECKSUM_BYTES, "little")
