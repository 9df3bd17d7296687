"""Images decoded ahead of the model and results written behind it, in threads, with bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..images import load_image
from .inputs import Source

# Decoded pixels that wait for the model, and those of a batch: 3 bytes each, 64 photographs of a megapixel.
_MAX_PIXELS = 64 * 10**6


def num_workers() -> int:
    """Threads to decode and write in: one for each core of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


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
    waiting: deque[tuple[int, Source, Future]] = deque()
    remaining = enumerate(sources)

    def is_room() -> bool:
        done = (future.result() for _, _, future in waiting if future.done())
        pixels = sum(picture.width * picture.height for picture in done if isinstance(picture, Image.Image))
        return len(waiting) < number and pixels < _MAX_PIXELS

    while True:
        while is_room() and (following := next(remaining, None)):
            waiting.append((*following, pool.submit(_read, following[1].image)))
        if not waiting:
            return
        index, source, future = waiting.popleft()
        yield Item(index, source, future.result())


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
        pixels += item.picture.width * item.picture.height if isinstance(item.picture, Image.Image) else 0
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
