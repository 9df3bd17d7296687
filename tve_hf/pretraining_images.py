"""Images to pre-train on, from any source that `datasets` reads, undecoded until they are needed."""

import os
import random
from pathlib import Path
from typing import Any, NamedTuple

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
from torch import Tensor

from .classifiers import SplitClassifier
from .images import load_image
from .pretraining_arguments import PretrainArguments

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
CROP_AREA, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of --random_resized_crop
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


def open_images(args: PretrainArguments, files: list[str], split: str, streaming: bool) -> Images:
    """Open `files`, or a split of `args.dataset_name`, without decoding an image.

    Raises:
        ValueError: If there is no such source, split or column, or no image in it.
    """
    name = ", ".join(files) if files else f"{args.dataset_name} [{split}]"
    try:
        data = _load(args, files, split, streaming)
    except DatasetBuildError as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{name} was not found: {error}") from error
    except ValueError as error:  # of a split or configuration that is not there, or of no data at all
        raise ValueError(f"{name} cannot be opened, or is empty: {error}") from error
    if isinstance(data, IterableDataset) and data.features is None:
        data = data._resolve_features()  # by looking at the first rows
    features = data.features or {}
    number = len(data) if isinstance(data, Dataset) else _number(data, split)
    if number == 0 or not features:
        raise ValueError(f"{name} holds no image; pass a data set with at least one.")
    column = _image_column(features, args.image_column, name)
    data = data.select_columns([column]).cast_column(column, Image(decode=False))
    return Images(data, column, name, number)


def _load(args: PretrainArguments, files: list[str], split: str, streaming: bool) -> Dataset | IterableDataset:
    if files:
        suffix = Path(files[0]).suffix.lower()
        builder = "imagefolder" if suffix in PILImage.registered_extensions() else _BUILDERS.get(suffix, "parquet")
        try:
            return load_dataset(builder, data_files=files, split="train", streaming=streaming)
        except DatasetBuildError as error:
            if not isinstance(error.__cause__, CastError):
                raise
            # Their other columns differ.
            parts = [load_dataset(builder, data_files=file, split="train") for file in files]
            return concatenate_datasets(
                [_images_alone(part, args, file) for part, file in zip(parts, files, strict=True)]
            )
    folder = Path(args.dataset_name or "")
    if not ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
        return load_dataset(args.dataset_name, args.dataset_config, split=split, streaming=streaming)
    saved = load_from_disk(args.dataset_name)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder} has no split {split!r}; choose among {', '.join(saved)}.")
        saved = saved[split]
    return saved.to_iterable_dataset(num_shards=min(64, len(saved))) if streaming and len(saved) else saved


def _images_alone(data: Dataset, args: PretrainArguments, name: str) -> Dataset:
    """The column of images of one file, under one name whatever it was called."""
    column = _image_column(data.features, args.image_column, name)
    data = data.select_columns([column]).cast_column(column, Image(decode=False))
    return data if column == "image" else data.rename_column(column, "image")


def _number(data: IterableDataset, split: str) -> int | None:
    found = (data.info.splits or {}).get(split)
    return found.num_examples or None if found else None


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

    found = [column for column, feature in features.items() if holds_images(feature)]
    if len(found) == 1:
        return found[0]
    if "image" in found:
        return "image"
    raise ValueError(
        f"{name} has {len(found) or 'no'} columns that look like images; choose image_column among {columns}."
    )


def read_image(image: Any) -> PILImage.Image:
    """Decode one undecoded image of `datasets`: bytes, a path, or an address inside an archive or on the Hub."""
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else None
    if path is None or os.path.exists(path) or path.startswith(("http://", "https://")):
        return load_image(image)
    return load_image(Image().decode_example(image))


def random_crop(image: PILImage.Image, draw: random.Random) -> PILImage.Image:
    """Cut out a random rectangle: its area is 20-100 % of the image's, its sides at most 4 : 3."""
    width, height = image.size
    for _ in range(10):
        area = width * height * draw.uniform(*CROP_AREA)
        ratio = draw.uniform(*CROP_RATIO)
        wide, high = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < wide <= width and 0 < high <= height:
            left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
            return image.crop((left, top, left + wide, top + high))
    return image  # too narrow for any


def first_images(images: Images, classifier: SplitClassifier, number: int) -> Tensor:
    """The first images of a data set that can be read, (at most number, 3, H, W).

    Raises:
        ValueError: If there is none.
    """
    found: list[PILImage.Image] = []
    for row in images.data:
        try:
            found.append(read_image(row[images.column]))
        except UNREADABLE:
            continue
        if len(found) == number:
            break
    if not found:
        raise ValueError(f"{images.name} holds no image that can be read; pass another data set.")
    return classifier.image_processor(found, return_tensors="pt")["pixel_values"]
