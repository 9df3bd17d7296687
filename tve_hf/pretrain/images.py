"""Images to pre-train on: which, and cut how."""

import hashlib
import math
import random
from functools import partial
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from PIL import Image as PILImage
from torch import Tensor

from .. import sources
from ..classifiers import SplitClassifier
from ..sources import UNREADABLE, Images, read_image
from .arguments import PretrainArguments

CROP_AREA, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of --random_resized_crop


def open_images(args: PretrainArguments, files: list[str], split: str, streaming: bool) -> Images:
    """Open `files`, or a split of `args.dataset_name`; see `sources.open_images`."""
    return sources.open_images(files, args.dataset_name, args.dataset_config, split, args.image_column, streaming)


def random_crop(image: PILImage.Image, draw: random.Random) -> PILImage.Image:
    """Cut out a random rectangle: its area is 20-100 % of the image's, its sides at most 4 : 3.

    The ratio of the sides is drawn on a logarithmic scale, as MAE and torchvision do: 3 : 4 is as likely as 4 : 3.
    """
    width, height = image.size
    log_ratios = [math.log(ratio) for ratio in CROP_RATIO]
    for _ in range(10):
        area = width * height * draw.uniform(*CROP_AREA)
        ratio = math.exp(draw.uniform(*log_ratios))
        wide, high = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < wide <= width and 0 < high <= height:
            left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
            return image.crop((left, top, left + wide, top + high))
    return image  # too narrow for any


def set_aside(images: Images, number: int, seed: int, buffer_size: int) -> tuple[Images, Images]:
    """Split random images off a data set, to be held out; the same ones for the same seed.

    Args:
        number: of images to hold out, if they are no more than an eighth of those that are drawn from.
        buffer_size: of a stream, the rows at its beginning that are drawn from.

    Returns:
        What is left to train on, and what is held out.
    """
    if isinstance(images.data, Dataset):
        # As for `draw_images`, from the end of the order whose beginning `tve-hf evaluate` takes.
        order = torch.randperm(len(images.data), generator=torch.Generator().manual_seed(seed)).flip(0)
        held, rest = order.tensor_split([min(number, len(order) // 8)])
        return _rows(images, rest.sort().values), _rows(images, held)
    rows: Any = _draw_rows(images, number, seed, buffer_size)
    known = frozenset(_identity(row[images.column]) for row in rows)
    training = images.data.filter(partial(_is_none_of, known, images.column))
    left = None if images.number is None else images.number - len(rows)
    return images._replace(data=training, number=left), images._replace(data=rows, number=len(rows))


def _rows(images: Images, indices: Tensor) -> Images:
    return images._replace(data=images.data.select(indices.tolist()), number=len(indices))


def _draw_rows(images: Images, number: int, seed: int, buffer_size: int) -> list[dict[str, Any]]:
    """Random rows of the first of a stream, in one reading and without keeping the others."""
    draw, seen = random.Random(seed), 0
    drawn: list[dict[str, Any]] = []
    # A buffer of one row shuffles the files alone.
    for seen, row in enumerate(islice(images.data.shuffle(seed=seed, buffer_size=1), buffer_size), 1):
        if len(drawn) < number:
            drawn.append(row)
        elif (place := draw.randrange(seen)) < number:
            drawn[place] = row
    draw.shuffle(drawn)
    return drawn[: seen // 8]


def _identity(image: dict[str, Any]) -> bytes | str:
    """What an undecoded image of a stream, which numbers none, is known by: its bytes, or else its path."""
    return image["path"] if image["bytes"] is None else hashlib.sha256(image["bytes"]).digest()


def _is_none_of(known: frozenset[bytes | str], column: str, row: dict[str, Any]) -> bool:
    return _identity(row[column]) not in known


def draw_images(images: Images, classifier: SplitClassifier, number: int, seed: int, buffer_size: int) -> Tensor:
    """Random images of a data set, (at most number, 3, H, W); those that cannot be read are passed over.

    Drawn, since a data set may be sorted by class. A seed gives the same images whenever a run is started.

    Args:
        buffer_size: of a stream, the rows at its beginning that are drawn from.

    Raises:
        ValueError: If none can be read.
    """
    if isinstance(images.data, Dataset):
        # From the end of the order whose beginning `tve-hf evaluate` takes, so that what these images decide is judged
        # on others.
        order = torch.randperm(len(images.data), generator=torch.Generator().manual_seed(seed)).flip(0)
        data = images.data.select(order.tolist())
    else:
        data = images.data.shuffle(seed=seed, buffer_size=buffer_size)
    return first_images(images._replace(data=data), classifier, number)


def first_images(images: Images, classifier: SplitClassifier, number: int) -> Tensor:
    """The first images of a data set that can be read, (at most number, 3, H, W).

    Raises:
        ValueError: If there is none.
    """
    decoded: list[PILImage.Image] = []
    for row in images.data:
        try:
            decoded.append(read_image(row[images.column]))
        except UNREADABLE:
            continue
        if len(decoded) == number:
            break
    if not decoded:
        raise ValueError(f"{images.name} holds no image that can be read; pass another data set.")
    return classifier.image_processor(decoded, return_tensors="pt")["pixel_values"]
