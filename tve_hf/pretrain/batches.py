"""The batches of a pre-training run: an order that a resumed run repeats, and workers that decode.

The order is made in the training process and images are decoded in its workers, so neither their number nor when
they answer changes which images a step sees.
"""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..classifiers import SplitClassifier
from ..sources import UNREADABLE, Images, read_image
from .arguments import PretrainArguments
from .images import random_crop
from .processes import STOPS


class Key(NamedTuple):
    """Which image: its epoch and number, and for a stream the undecoded image itself."""

    epoch: int
    number: int
    image: Any = None


class Batch(NamedTuple):
    """What became of some images.

    Args:
        pixel_values: of those that could be read, (n, 3, H, W); None if there are none.
        places: of these among all that were asked for, (n,) int64.
        numbers: of these, as `Key` has them.
        bad: the others, name -> reason.
        position: epoch and number of the image that comes next.
    """

    pixel_values: Tensor | None
    places: Tensor
    numbers: list[int]
    bad: dict[str, str]
    position: tuple[int, int]


class Decoder(TorchDataset):
    """Turn keys into batches; this is what the workers of a DataLoader run."""

    def __init__(self, images: Images, classifier: SplitClassifier, crop_seed: str | None = None):
        self.images = images
        self.processor = classifier.image_processor
        self.crop_seed = crop_seed  # None: no crop

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> Batch:
        column, data = self.images.column, self.images.data
        raw = data[[key.number for key in keys]][column] if isinstance(data, Dataset) else [key.image for key in keys]
        readable, places, bad = [], [], {}
        for place, (key, image) in enumerate(zip(keys, raw, strict=True)):
            try:
                decoded = read_image(image)
            except UNREADABLE as error:
                path = image.get("path") if isinstance(image, dict) else None
                bad[path or f"row {key.number}"] = " ".join(str(error).split())
                continue
            if self.crop_seed is not None:
                decoded = random_crop(decoded, random.Random(f"{self.crop_seed} {key.epoch} {key.number}"))
            readable.append(decoded)
            places.append(place)
        pixel_values = self.processor(readable, return_tensors="pt")["pixel_values"] if readable else None
        position = keys[-1].epoch, keys[-1].number + 1
        numbers = [keys[place].number for place in places]
        return Batch(pixel_values, torch.tensor(places, dtype=torch.int64), numbers, bad, position)


class Order:
    """Keys of one process's batches of a map-style data set, from step `first` to `steps`.

    Each epoch is a permutation seeded by `seed + epoch`, cut into steps of `batch_size * accumulation * world` images;
    what does not fill a step is left out. Batch m of process r is the slice (m * world + r) of its step, so that the
    step has the same images however they are shared out.
    """

    def __init__(
        self, number: int, batch_size: int, accumulation: int, rank: int, world: int, seed: int, first: int, steps: int
    ):
        self.number, self.batch_size, self.accumulation = number, batch_size, accumulation
        self.rank, self.world, self.seed = rank, world, seed
        self.first, self.steps = first, steps

    @property
    def steps_per_epoch(self) -> int:
        return self.number // (self.batch_size * self.accumulation * self.world)

    def __iter__(self) -> Iterator[list[Key]]:
        permuted, order = None, torch.empty(0)
        for step in range(self.first, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != permuted:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                permuted, order = epoch, torch.randperm(self.number, generator=generator)
            for part in range(self.accumulation):
                begin = ((place * self.accumulation + part) * self.world + self.rank) * self.batch_size
                yield [Key(epoch, index) for index in order[begin : begin + self.batch_size].tolist()]


class Stream:
    """Keys of one process's batches of a streamed data set, without end, from `position` (epoch, number) on.

    Each epoch is shuffled anew through a buffer. A resumed run reads, but does not decode, what the epoch has had.
    """

    def __init__(self, images: Images, batch_size: int, position: tuple[int, int]):
        self.images, self.batch_size, self.position = images, batch_size, position

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, skipped = self.position
        keys: list[Key] = []
        while True:
            self.images.data.set_epoch(epoch)
            index = -1
            for index, row in enumerate(self.images.data):
                if index >= skipped:
                    keys.append(Key(epoch, index, row[self.images.column]))
                if len(keys) == self.batch_size:
                    yield keys
                    keys = []
            if index < 0:
                raise ValueError(f"{self.images.name} holds no image for one of the processes; use fewer.")
            epoch, skipped = epoch + 1, 0


def images_per_step(args: PretrainArguments, world: int) -> int:
    """Images of a step, those of all processes together."""
    return args.batch_size * args.gradient_accumulation_steps * world


def steps_of(args: PretrainArguments, images: Images, world: int) -> int:
    """Steps of the whole run.

    Raises:
        ValueError: If the images do not fill one step, or their number is unknown and `max_steps` is 0 or less.
    """
    per_step, max_steps = images_per_step(args, world), max(0, args.max_steps)
    if images.number is None:
        if not max_steps:
            raise ValueError(f"{images.name} does not tell how many images it streams; pass max_steps.")
        return max_steps
    if images.number < per_step and isinstance(images.data, Dataset):
        raise ValueError(f"{images.name} hold fewer images than one batch of {per_step}; lower batch_size.")
    return max_steps or args.num_epochs * max(1, images.number // per_step)


@contextmanager
def batches_of(
    args: PretrainArguments,
    images: Images,
    classifier: SplitClassifier,
    rank: int,
    world: int,
    steps: int,
    done: int,
    position: tuple[int, int],
) -> Iterator[Iterator[Batch]]:
    """Load this process's batches, in a with-block, from step `done` on; a stream goes on from `position`."""
    order: Any  # torch asks for a list of indices; the decoder takes what these give
    crop_seed = f"{args.seed}"
    if isinstance(images.data, Dataset):
        sizes = args.batch_size, args.gradient_accumulation_steps
        order = Order(len(images.data), *sizes, rank, world, args.seed, done, steps)
    else:
        shuffled = images.data.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        images = images._replace(data=split_dataset_by_node(shuffled, rank, world))
        order = Stream(images, args.batch_size, position)
        crop_seed += f" {rank}"  # the numbers count this process's images
    closing = torch.multiprocessing.Event()
    loader = DataLoader(
        Decoder(images, classifier, crop_seed if args.random_resized_crop else None),
        batch_sampler=order,
        collate_fn=_as_it_is,
        num_workers=args.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_outlive_signals, closing),
    )
    try:
        yield iter(loader)
    finally:
        closing.set()


def _outlive_signals(closing: Any, worker: int) -> None:
    """Let a worker live on when a signal to stop reaches the whole process group: there is a checkpoint to write."""

    def end(number: int, frame: Any) -> None:
        if closing.is_set():
            os._exit(0)

    for number in STOPS:
        signal.signal(number, end)


def _as_it_is(batch: Any) -> Any:
    return batch
