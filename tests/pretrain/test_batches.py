"""The order of images, what workers make of them, and streams that go on where they stopped."""

import datasets
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from tiny import noise_image, save_classifier

from tve_hf import split_classifier
from tve_hf.pretrain import PretrainArguments
from tve_hf.pretrain.batches import Order, Stream, batches_of, steps_of
from tve_hf.sources import Images

NUMBER = 11


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return split_classifier(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture(scope="module")
def rows():
    """Images, of which row 4 is no image."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    encoded = [datasets.Image().encode_example(noise_image(seed)) for seed in range(NUMBER)]
    encoded[4] = {"bytes": b"no image", "path": None}
    return datasets.Dataset.from_dict({"image": encoded}, features=features)


def numbers(order):
    return [[key.number for key in keys] for keys in order]


def args(**settings):
    return PretrainArguments(classifier="c", output_dir="o", train_files=["x"], **settings)


def test_the_order_is_that_of_a_seedable_sampler():
    """So that a command gives the weights that it gave when Accelerate made the order."""
    torch.manual_seed(5)
    sampler = SeedableRandomSampler(range(NUMBER))
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        expected += [drawn[:4], drawn[4:8]]
    assert numbers(Order(NUMBER, 4, 1, 0, 1, 5, 0, 4)) == expected
    assert numbers(Order(NUMBER, 4, 1, 0, 1, 5, 3, 4)) == expected[3:]  # resumed


@pytest.mark.parametrize(("batch_size", "accumulation", "world"), [(2, 1, 2), (1, 2, 2), (1, 4, 1)])
def test_a_step_has_the_same_images_however_they_are_shared_out(batch_size, accumulation, world):
    whole = numbers(Order(NUMBER, 4, 1, 0, 1, 0, 0, 4))
    ranks = [numbers(Order(NUMBER, batch_size, accumulation, rank, world, 0, 0, 4)) for rank in range(world)]
    for step in range(4):
        parts = [ranks[rank][step * accumulation + part] for part in range(accumulation) for rank in range(world)]
        assert sum(parts, []) == whole[step]


def test_unreadable_images_are_left_out_and_named(rows, classifier):
    images = Images(rows, "image", "rows", NUMBER)
    with batches_of(args(batch_size=NUMBER), images, classifier, 0, 1, 1, 0, (0, 0)) as stream:
        (batch,) = stream
    order = numbers(Order(NUMBER, NUMBER, 1, 0, 1, 0, 0, 1))[0]
    assert list(batch.bad) == ["row 4"]
    readable = [number for number in order if number != 4]
    assert [order[place] for place in batch.places] == batch.numbers == readable
    expected = classifier.image_processor([noise_image(seed) for seed in readable], return_tensors="pt")
    assert torch.equal(batch.pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("streaming", [False, True])
def test_crops_do_not_depend_on_workers_or_resuming(rows, classifier, streaming):
    data = rows.to_iterable_dataset(num_shards=3) if streaming else rows
    settings = {"batch_size": 2, "random_resized_crop": True, "shuffle_buffer": 4, "seed": 1}

    def batches(workers, done=0, position=(0, 0)):
        images = Images(data, "image", "rows", NUMBER)
        arguments = args(dataloader_num_workers=workers, **settings)
        with batches_of(arguments, images, classifier, 0, 1, 9, done, position) as stream:
            return [next(stream) for _ in range(9 - done)]

    whole = batches(0)
    assert not torch.equal(whole[0].pixel_values, whole[5].pixel_values)
    for one, other in zip(whole, batches(2), strict=True):
        assert torch.equal(one.pixel_values, other.pixel_values) and one.position == other.position
    for one, other in zip(whole[7:], batches(0, 7, whole[6].position), strict=True):
        assert torch.equal(one.pixel_values, other.pixel_values)


def test_processes_share_a_stream(rows):
    for shards in (4, 3):  # whole shards for each process, or every second image
        shared = []
        for rank in range(2):
            data = datasets.distributed.split_dataset_by_node(rows.to_iterable_dataset(num_shards=shards), rank, 2)
            stream = iter(Stream(Images(data, "image", "rows", None), 1, (0, 0)))
            keys = [next(stream)[0] for _ in range(7)]
            shared += [key.image["bytes"] for key in keys if key.epoch == 0]
        assert sorted(shared) == sorted(row["bytes"] for row in rows["image"])


def test_each_epoch_of_a_stream_has_every_image_in_another_order(rows):
    data = rows.to_iterable_dataset().shuffle(seed=0, buffer_size=5)
    stream = iter(Stream(Images(data, "image", "rows", None), NUMBER, (0, 0)))
    first, second = ([key.image["bytes"] for key in next(stream)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(row["bytes"] for row in rows["image"])
    assert first != second


def test_steps(rows):
    images = Images(rows, "image", "rows", NUMBER)
    assert steps_of(args(batch_size=2, num_epochs=3), images, 2) == 6
    assert steps_of(args(batch_size=2, num_epochs=3, max_steps=4), images, 2) == 4
    with pytest.raises(ValueError, match="fewer images than one batch of 12; lower batch_size"):
        steps_of(args(batch_size=3, gradient_accumulation_steps=2), images, 2)
    stream = Images(rows.to_iterable_dataset(), "image", "rows", None)
    assert steps_of(args(max_steps=4), stream, 1) == 4
    with pytest.raises(ValueError, match="pass max_steps"):
        steps_of(args(), stream, 1)


def test_an_empty_share_of_a_stream_is_named(rows):
    empty = Images(rows.to_iterable_dataset().take(0), "image", "rows", None)
    with pytest.raises(ValueError, match="rows holds no image for one of the processes"):
        next(iter(Stream(empty, 1, (0, 0))))
