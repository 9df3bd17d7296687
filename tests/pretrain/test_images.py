"""Every kind of image set gives the same images; what is wrong with one is said in a sentence."""

import io
import json
import random
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, kstest
from tiny import SIDE, noise_image, save_classifier, save_noise
from transformers import ViTImageProcessorPil

from tve_hf import split_classifier
from tve_hf.benchmark.run import EvaluateArguments, _images
from tve_hf.pretrain import PretrainArguments
from tve_hf.pretrain.images import Images, draw_images, first_images, open_images, random_crop, read_image, set_aside

NUMBER = 3


def png(seed):
    buffer = io.BytesIO()
    noise_image(seed).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same images as parquet, with and without `datasets` metadata, arrow, folders of images, and tar."""
    root = tmp_path_factory.mktemp("sources")
    rows = {"image": [noise_image(seed) for seed in range(NUMBER)], "name": ["x"] * NUMBER}
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features=features)
    (root / "parquet").mkdir()
    data.to_parquet(root / "parquet" / "train.parquet")
    plain = datasets.Features({"photo": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    photos = {"photo": [{"bytes": png(seed), "path": None} for seed in range(NUMBER)]}
    datasets.Dataset.from_dict(photos, features=plain).to_parquet(root / "plain.parquet")
    data.save_to_disk(root / "disk")
    datasets.DatasetDict(train=data).save_to_disk(root / "disks")
    (root / "folder").mkdir()
    for seed in range(NUMBER):
        (root / "folder" / f"{seed}.png").write_bytes(png(seed))
    (root / "tar").mkdir()
    with tarfile.open(root / "tar" / "train.tar", "w") as tar:
        for seed in range(NUMBER):
            for name, content in ((f"{seed}.png", png(seed)), (f"{seed}.json", json.dumps({"a": 1}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def opened(files=(), streaming=False, split="train", **settings):
    arguments = PretrainArguments(classifier="c", output_dir="o", train_files=list(files), **settings)
    return open_images(arguments, list(files), split, streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "disk", "disks", "folder", "tar"])
def test_folders(sources, kind, streaming):
    check(opened(dataset_name=str(sources / kind), streaming=streaming), "png" if kind == "tar" else "image")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("pattern", "column"),
    [
        ("parquet/*.parquet", "image"),
        ("plain.parquet", "photo"),
        ("disk/*.arrow", "image"),
        ("tar/*.tar", "png"),
        ("folder/*.png", "image"),
    ],
)
def test_files(sources, pattern, column, streaming):
    check(opened([str(sources / pattern)], streaming), column)


def check(images, column):
    assert images.column == column
    assert images.number in (NUMBER, None)
    found = [read_image(row[column]) for row in images.data]
    assert len(found) == NUMBER
    for seed, image in enumerate(found):
        assert np.array_equal(image, noise_image(seed))


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_images_are_files_too(sources, tmp_path, streaming):
    """Wherever in them they are, but neither hidden ones nor files of other kinds."""
    for seed, name in enumerate(("a/0.png", "a/b/1.PNG", "c d[1]/2.jpeg")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(seed))
    for name in ("a/notes.txt", "a/.3.png", ".cache/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(9))
    check(opened([str(tmp_path)], streaming), "image")
    check(opened([str(tmp_path / "a"), str(tmp_path / "c d[1]" / "2.jpeg")], streaming), "image")
    check(opened([str(tmp_path / "a"), str(sources / "folder" / "2*.png")], streaming), "image")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["parquet/train.parquet", "folder/*.png"],
            r"train.parquet and .*\*.png are of different kinds; pass files of",
        ),
        (["folder", "plain.parquet"], "plain.parquet is no image, and beside a folder only images are read"),
        (["folder", "parquet"], "folder .*parquet holds no images, but .parquet; name the files in it by a pattern"),
        (["nothing"], "folder .*nothing holds no images, but nothing; name the files"),
    ],
)
def test_kinds_of_files_are_not_mixed(sources, files, message):
    (sources / "nothing").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        opened([str(sources / file) for file in files])


def test_the_column_is_guessed_only_where_it_is_clear(tmp_path):
    both = {"front": [noise_image(0)], "back": [noise_image(1)]}
    features = datasets.Features({"front": datasets.Image(), "back": datasets.Image()})
    datasets.Dataset.from_dict(both, features=features).to_parquet(tmp_path / "two.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="has 2 columns that look like images; choose image_column among front, back"):
        opened([str(tmp_path / "two.parquet")])
    assert opened([str(tmp_path / "two.parquet")], image_column="back").column == "back"
    with pytest.raises(ValueError, match="has no columns that look like images; choose image_column among text"):
        opened([str(tmp_path / "none.parquet")])
    with pytest.raises(ValueError, match="No column 'photo' in .*; choose image_column among text"):
        opened([str(tmp_path / "none.parquet")], image_column="photo")


def test_what_is_missing_or_empty_is_named(sources, tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": []}, features=features).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="empty.parquet.* is empty"):
        opened([str(tmp_path / "empty.parquet")])
    with pytest.raises(ValueError, match="no such folder.* was not found"):
        opened(dataset_name=str(tmp_path / "no such folder"))
    with pytest.raises(ValueError, match="no split 'test'; choose among train"):
        opened(dataset_name=str(sources / "disks"), split="test")
    with pytest.raises(ValueError, match="test"):
        opened(dataset_name=str(sources / "folder"), split="test")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="broken.parquet cannot be opened.*Parquet file size is 4 bytes"):
        opened([str(tmp_path / "broken.parquet")])


def test_the_first_readable_images(tmp_path):
    classifier = split_classifier(save_classifier(tmp_path / "classifier"))
    rows = {"image": [b"broken", png(1), png(2), png(3)]}
    features = datasets.Features({"image": datasets.Value("binary")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "some.parquet")
    found = first_images(opened([str(tmp_path / "some.parquet")]), classifier, 2)
    expected = classifier.image_processor([noise_image(1), noise_image(2)], return_tensors="pt")["pixel_values"]
    assert np.array_equal(found, expected)
    rows = {"image": [b"broken"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="bad.parquet holds no image that can be read"):
        first_images(opened([str(tmp_path / "bad.parquet")]), classifier, 2)


CLASSES, OF_EACH = 8, 25


@pytest.fixture(scope="module")
def grey_classifier(tmp_path_factory):
    """One whose pixels are grey levels as they are."""
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_rescale=False, do_normalize=False)
    return split_classifier(save_classifier(tmp_path_factory.mktemp("grey"), processor=processor))


def sorted_by_class(streaming):
    """Grey images in the order of their classes; the level is the row, so it tells the class."""
    encoded = [datasets.Image().encode_example(Image.new("RGB", (8, 8), (row,) * 3)) for row in range(200)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": encoded}, features=features)
    return Images(rows.to_iterable_dataset() if streaming else rows, "image", "rows", len(rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_a_sorted_set_are_drawn_from_all_its_classes(grey_classifier, streaming):
    images = sorted_by_class(streaming)

    def rows(seed, number=16, buffer_size=1000):
        drawn = draw_images(images, grey_classifier, number, seed, buffer_size)
        assert drawn.shape == (number, 3, SIDE, SIDE)
        return drawn[:, 0, 0, 0].int().tolist()

    drawn = [rows(seed) for seed in range(50)]
    assert all(len(set(numbers)) == 16 for numbers in drawn)
    # First rows are of one class. 16 random ones are of three or fewer of eight with a probability below 1e-5.
    assert min(len({number // OF_EACH for number in numbers}) for numbers in drawn) > 3
    counts = np.bincount(np.concatenate(drawn) // OF_EACH, minlength=CLASSES)
    assert chisquare(counts).pvalue > 1e-3
    assert rows(7) == drawn[7] and rows(7, 8) == drawn[7][:8]
    assert len({tuple(numbers) for numbers in drawn}) == 50
    if streaming:  # no more rows are read than fit in the buffer
        assert max(rows(0, 5, 10)) < 10


@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_set_aside_at_random_and_never_trained_on(streaming):
    """Of all classes of a sorted set, and the same ones for the same seed."""
    images = sorted_by_class(streaming)

    def rows(part):
        return [read_image(row["image"]).getpixel((0, 0))[0] for row in part.data]

    def split(seed, number=16, buffer_size=1000):
        training, held = set_aside(images, number, seed, buffer_size)
        assert sorted(rows(training) + rows(held)) == list(range(200))
        assert (training.number, held.number) == (len(rows(training)), len(rows(held)))
        return rows(held)

    drawn = [split(seed) for seed in range(30)]
    assert {len(numbers) for numbers in drawn} == {16} and len({tuple(numbers) for numbers in drawn}) == 30
    assert min(len({number // OF_EACH for number in numbers}) for numbers in drawn) > 3
    counts = np.bincount(np.concatenate(drawn) // OF_EACH, minlength=CLASSES)
    assert chisquare(counts).pvalue > 1e-3
    assert split(7) == drawn[7]
    assert len(split(0, 1000)) == 25 and split(0, 0) == []  # an eighth at most
    if streaming:  # no more rows are read than fit in the buffer
        assert max(split(0, 16, 40)) < 40 and len(split(0, 16, 40)) == 5
        epochs = set_aside(images, 16, 0, 1000)[0].data.shuffle(seed=0, buffer_size=50)
        for epoch in range(2):
            epochs.set_epoch(epoch)
            assert len(list(epochs)) == 184


def test_random_crop():
    """The pixels tell where they come from: red is the column, green the row."""
    columns, rows = np.meshgrid(np.arange(90, dtype=np.uint8), np.arange(60, dtype=np.uint8))
    image = Image.fromarray(np.stack([columns, rows, columns], -1))
    crops = [np.asarray(random_crop(image, random.Random(seed))) for seed in range(100)]
    for crop in crops:
        high, wide = crop.shape[:2]
        left, top = int(crop[0, 0, 0]), int(crop[0, 0, 1])
        assert np.array_equal(crop, np.asarray(image)[top : top + high, left : left + wide])
        assert 0.19 < wide * high / (90 * 60) <= 1 and 0.72 < wide / high < 1.39
    assert len({crop.shape for crop in crops}) > 50
    line = Image.new("RGB", (100, 1))
    assert random_crop(line, random.Random(0)).size == (100, 1)


def test_the_ratios_of_crops_are_those_of_torchvision_and_mae():
    """log(width / height) is uniform from log(3 / 4) to log(4 / 3), where every ratio fits into the image."""
    image = Image.new("L", (1000, 1000))
    sizes = np.array([random_crop(image, random.Random(seed)).size for seed in range(3000)])
    width, height = sizes[sizes.prod(1) < 0.74 * 1000**2].T
    assert len(width) > 1500
    ratios = np.log(width / height)
    low, high = np.log(3 / 4), np.log(4 / 3)
    assert kstest(ratios, "uniform", args=(low, high - low)).pvalue > 1e-3
    assert np.median(ratios) == pytest.approx(0, abs=0.02)


def test_files_whose_other_columns_differ_are_read_one_after_the_other(tmp_path):
    save_noise(tmp_path / "a.parquet", 2, label=[0, 1])
    save_noise(tmp_path / "b.parquet", 3, source=["x", "y", "z"])
    files = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    images = open_images(PretrainArguments("", ""), files, "train", streaming=False)
    assert images.number == len(images.data) == 5
    assert images.data.column_names == ["image"]
    alone = open_images(PretrainArguments("", ""), files[1:], "train", streaming=False)
    assert images.data[2] == alone.data[0]


def test_held_out_images_are_not_those_of_an_evaluation(tmp_path):
    """Of one set and with one seed, as long as it has enough images for both."""
    save_noise(tmp_path / "noise.parquet", 9)
    classifier = split_classifier(save_classifier(tmp_path / "classifier"))
    images = open_images(PretrainArguments("", ""), [str(tmp_path / "noise.parquet")], "train", streaming=False)
    arguments = EvaluateArguments("", [str(tmp_path / "noise.parquet")], "", num_images=5, seed=3)
    judged, column, _ = _images(arguments)
    ours = draw_images(images, classifier, 4, seed=3, buffer_size=1)
    theirs = first_images(Images(judged, column, "", 5), classifier, 5)
    assert len({image.numpy().tobytes() for image in torch.cat([ours, theirs])}) == 9
