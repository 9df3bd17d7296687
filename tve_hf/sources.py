"""Images from any source that `datasets` reads, undecoded until they are needed: for training and for evaluation."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetBuildError
from datasets.table import CastError
from PIL import Image as PILImage

from .images import load_image

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# What the many decoders raise on bytes that make no image, and `load_image` on no bytes at all.
UNREADABLE = (OSError, SyntaxError, TypeError, ValueError)


class Images(NamedTuple):
    """A column of undecoded images.

    Args:
        data: the rows, map-style or streamed.
        column: where the images are.
        name: of the source, for messages.
        number: of images; None if a stream does not tell.
    """

    data: Dataset | IterableDataset
    column: str
    name: str
    number: int | None


def sample_images(images: Images, number: int, seed: int) -> tuple[Images, list[int]]:
    """Some of the images, in a random order, for a set may be sorted by class; and which of its rows they are.

    With the same seed they are the same ones, and more, when more are asked for; all, where there are fewer.

    Args:
        images: map-style.

    Raises:
        ValueError: If none is asked for.
    """
    if number < 1:
        raise ValueError(f"{images.name} gives no image with num_images={number}; pass at least one.")
    data: Any = images.data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    rows = order[:number].tolist()
    return images._replace(data=data.select(rows), number=len(rows)), rows


def open_images(
    files: list[str],
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    streaming: bool = False,
    others: Sequence[str] = (),
) -> Images:
    """Open files, or a split of a data set, without decoding an image.

    Args:
        files: parquet, arrow, tar (webdataset) or image files, or patterns, all of one kind; or folders, whose images
            are taken wherever in them they are.
        dataset_name: instead of files, a data set of the Hub, or a folder (parquet, save_to_disk, images, webdataset).
        dataset_config: its configuration.
        split: of the data set.
        image_column: by default the only one that holds images, or else "image".
        streaming: read in passing, without a copy on disk.
        others: columns to keep beside the images, as far as they exist.

    Raises:
        ValueError: If there is no such source, split or column, or no image in it.
    """
    name = ", ".join(files) if files else f"{dataset_name} [{split}]"
    try:
        data = _load(files, dataset_name, dataset_config, split, image_column, streaming)
    except DatasetBuildError as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{name} was not found: {error}") from error
    except ValueError as error:  # of a split or configuration that does not exist, or of no data at all
        raise ValueError(f"{name} cannot be opened, or is empty: {error}") from error
    if isinstance(data, IterableDataset) and data.features is None:
        data = data._resolve_features()  # by looking at the first rows
    features = data.features or {}
    number = len(data) if isinstance(data, Dataset) else _number(data, split)
    if number == 0 or not features:
        raise ValueError(f"{name} holds no image; pass a data set with at least one.")
    column = _image_column(features, image_column, name)
    data = data.select_columns(
        [column, *(other for other in others if other in features and other != column)]
    ).cast_column(column, Image(decode=False))
    return Images(data, column, name, number)


def _load(
    files: list[str],
    dataset_name: str | None,
    dataset_config: str | None,
    split: str,
    image_column: str | None,
    streaming: bool,
) -> Dataset | IterableDataset:
    if files:
        if any(os.path.isdir(file) for file in files):
            return _images_in(files, streaming)
        builder = _builder_of(files)
        try:
            return load_dataset(builder, data_files=files, split="train", streaming=streaming)
        except DatasetBuildError as error:
            if not isinstance(error.__cause__, CastError):
                raise
            # Their other columns differ.
            parts = [load_dataset(builder, data_files=file, split="train") for file in files]
            return concatenate_datasets(
                [_images_alone(part, image_column, file) for part, file in zip(parts, files, strict=True)]
            )
    folder = Path(dataset_name or "")
    if not ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
        return load_dataset(dataset_name, dataset_config, split=split, streaming=streaming)
    saved = load_from_disk(str(folder))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder} has no split {split!r}; choose among {', '.join(saved)}.")
        saved = saved[split]
    return saved.to_iterable_dataset(num_shards=min(64, len(saved))) if streaming and len(saved) else saved


def _builder_of(files: list[str]) -> str:
    """What reads these files or patterns, by the ends of their names."""
    kinds: dict[str, str] = {}  # builder -> the first file for it
    for file in files:
        suffix = Path(file).suffix.lower()
        kinds.setdefault("imagefolder" if _is_image(suffix) else _BUILDERS.get(suffix, "parquet"), file)
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(kinds.values())} are of different kinds; pass files of one kind.")
    return next(iter(kinds))


def _is_image(suffix: str) -> bool:
    return PILImage.registered_extensions().get(suffix) in PILImage.OPEN


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _images_in(places: list[str], streaming: bool) -> Dataset | IterableDataset:
    """The images in folders, and in the folders in them, and beside these images that are named themselves."""
    found: list[str] = []
    for place in map(Path, places):
        if not place.is_dir():
            if not _is_image(place.suffix.lower()):
                raise ValueError(f"{place} is no image, and beside a folder only images are read; pass one kind.")
            found += sorted(glob.glob(str(place), recursive=True)) or [str(place)]
            continue
        inside = sorted(path for path in place.rglob("*") if path.is_file() and not _is_hidden(path, place))
        own = [str(path) for path in inside if _is_image(path.suffix.lower())]
        if not own:
            others = ", ".join(sorted({path.suffix or path.name for path in inside})[:5]) or "nothing"
            raise ValueError(f"The folder {place} holds no images, but {others}; name the files in it by a pattern.")
        found += own
    data = Dataset.from_dict({"image": found}).cast_column("image", Image(decode=False))
    return data.to_iterable_dataset(num_shards=min(64, len(found))) if streaming else data


def _images_alone(data: Dataset, image_column: str | None, name: str) -> Dataset:
    """The column of images of one file, under one name whatever it was called."""
    column = _image_column(data.features, image_column, name)
    data = data.select_columns([column]).cast_column(column, Image(decode=False))
    return data if column == "image" else data.rename_column(column, "image")


def _number(data: IterableDataset, split: str) -> int | None:
    info = (data.info.splits or {}).get(split)
    return info.num_examples or None if info else None


def _image_column(features: dict[str, Any], asked: str | None, name: str) -> str:
    """The column that was asked for, else the only one that holds images, else "image"."""
    columns = ", ".join(features)
    if asked is not None:
        if asked not in features:
            raise ValueError(f"No column {asked!r} in {name}; choose image_column among {columns}.")
        return asked

    def holds_images(feature: Any) -> bool:
        is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
        return isinstance(feature, Image) or is_binary or (isinstance(feature, dict) and "bytes" in feature)

    candidates = [column for column, feature in features.items() if holds_images(feature)]
    if len(candidates) == 1:
        return candidates[0]
    holds_paths = getattr(features.get("image"), "dtype", None) in ("string", "large_string")
    if "image" in candidates or (holds_paths and not candidates):
        return "image"
    raise ValueError(
        f"{name} has {len(candidates) or 'no'} columns that look like images; choose image_column among {columns}."
    )


def read_image(image: Any) -> PILImage.Image:
    """Decode one undecoded image of `datasets`: bytes, a path, or an address inside an archive or on the Hub."""
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else None
    if path is None or os.path.exists(path) or path.startswith(("http://", "https://")):
        return load_image(image)
    return load_image(Image().decode_example(image))
