"""Images decoded ahead of the model, in batches, with bounded memory; and their explanations or errors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..bulk.ahead import ahead
from ..images import load_image
from .inputs import Source

# Decoded pixels that wait for the model, and those of a batch: 3 bytes each, 64 photographs of a megapixel.
_MAX_PIXELS = 64 * 10**6


@dataclass(frozen=True)
class Item:
    """One image on its way: which of all it is, where it is from, and its picture or why there is none."""

    index: int
    source: Source
    picture: Image.Image | Exception


def decoded(pool: Executor, sources: Iterable[Source], number: int) -> Iterator[Item]:
    """Decode images in other threads, in order, while those before are worked on.

    Args:
        pool: of the threads.
        sources: the images.
        number: of images to have ready, at most.
    """
    found = ahead(pool, lambda source: _read(source.image), sources, number, _pixels, _MAX_PIXELS)
    for index, (source, picture) in enumerate(found):
        yield Item(index, source, picture)


def _pixels(picture: Image.Image | Exception) -> int:
    return picture.width * picture.height if isinstance(picture, Image.Image) else 0


def _read(image: Any) -> Image.Image | Exception:
    return image if isinstance(image, Exception) else _outcome(load_image, image)


def _outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a call returns, or the error that it raises, to be told of its image."""
    try:
        return function(*arguments, **options)
    except Exception as error:  # whatever is wrong with one image, the others are still explained
        return error


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Collect items: as many as the size says, or fewer where they are large."""
    batch: list[Item] = []
    pixels = 0
    for item in items:
        batch.append(item)
        pixels += _pixels(item.picture)
        if len(batch) == size or pixels >= _MAX_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def explained(explainer: Any, batch: Sequence[Item]) -> list[list[dict[str, Any]] | Exception]:
    """Explain a batch: for each image the results of the pipeline, or the error that it or its decoding met."""
    outcomes: dict[int, Any] = {item.index: item.picture for item in batch if isinstance(item.picture, Exception)}
    pictures = {item.index: item.picture for item in batch if item.index not in outcomes}
    if len(pictures) > 1:
        results = _outcome(explainer, [*pictures.values()], batch_size=len(pictures))
        if not isinstance(results, Exception):  # else which of them it is about shows one by one
            outcomes |= zip(pictures, results, strict=True)
            pictures = {}
    outcomes |= {index: _outcome(explainer, picture) for index, picture in pictures.items()}
    return [outcomes[item.index] for item in batch]
