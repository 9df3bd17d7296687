"""Images to pre-train on: which, and cut how."""

import random

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
