"""Bring what users pass to a pipeline into a form that every transformers pipeline knows."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from transformers.pipelines.pt_utils import KeyDataset


def images_of(inputs: Any) -> Any:
    """Turn paths, tuples, iterators and columns of `datasets` into a list, a `Dataset` or a generator of images.

    Raises:
        ValueError: If there is no image at all.
        TypeError: If a whole data set is passed instead of its column of images.
    """
    if isinstance(inputs, os.PathLike):
        return os.fspath(inputs)
    if isinstance(inputs, KeyDataset):
        inputs = _Rows(inputs, inputs.key)
    elif type(inputs).__module__.startswith("datasets."):
        if not hasattr(inputs, "column_name"):
            raise TypeError(f"A {type(inputs).__name__} was given; pass its column of images, like dataset['image'].")
        has_length = hasattr(inputs, "__len__")
        inputs = _Rows(inputs, inputs.column_name) if has_length else _rows_of(inputs, inputs.column_name)
    if isinstance(inputs, Iterator):
        first = next(inputs, None)
        inputs = [] if first is None else _chain(first, inputs)
    elif isinstance(inputs, tuple):
        inputs = list(inputs)
    if inputs is None or (isinstance(inputs, (list, Dataset)) and hasattr(inputs, "__len__") and not len(inputs)):
        raise ValueError("No image was given; pass a path, URL, PIL image or array, or a list of them.")
    return inputs


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


@contextmanager
def _naming(row: int, column: str) -> Iterator[None]:
    """Say which row of a column it is that cannot be decoded."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises all of them
        raise ValueError(f"Row {row} of column {column!r} holds no image that can be read ({error}).") from error


class _Rows(Dataset):
    """A column of images, decoded row by row."""

    def __init__(self, column: Any, name: str):
        self.column = column
        self.name = name

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> Any:
        with _naming(row, self.name):
            return self.column[row]


def _rows_of(column: Iterable[Any], name: str) -> Iterator[Any]:
    """The images of a streamed column, one by one."""
    images, end, row = iter(column), object(), 0
    while True:
        with _naming(row, name):
            image = next(images, end)
        if image is end:
            return
        yield image
        row += 1
