"""The study of an open vocabulary: a tower learns words that recur, and is never taught a held-out name."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from scripts import words
from tiny import noise_image, save_classifier

from tve_hf import split_classifier

NAMES = ["red cat", "red dog", "blue cat", "blue dog", "abacus", "oboe"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A classifier and two sets of labelled images, six classes of which the names of two share no word."""
    root = tmp_path_factory.mktemp("vocabulary")
    save_classifier(root / "classifier")
    save(root / "train.parquet", range(24))
    save(root / "test.parquet", range(24, 48))
    return root


def save(path, seeds, names=NAMES):
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [noise_image(seed) for seed in seeds], "label": [seed % len(names) for seed in seeds]}
    Dataset.from_dict(rows, features=features).to_parquet(path)


def arguments(data, output, *more, **files):
    given = {"--classifier": data / "classifier", "--train_files": data / files.get("train", "train.parquet")}
    given |= {"--test_files": data / files.get("test", "test.parquet"), "--output_dir": output}
    return words(given, "--parts", "3", "--steps", "2", *more)


def embeddings(data, seeds):
    classifier = split_classifier(data / "classifier")
    images = [noise_image(seed) for seed in seeds]
    with torch.no_grad():
        return classifier.embed(classifier.image_processor(images, return_tensors="pt")["pixel_values"]).numpy()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_a_name_is_the_mean_of_its_words_and_groups_of_letters(study):
    tower = study.TextTower(embedding_dim=5).eval()
    assert len(study.pieces("Sports car")) == 2 + len("sports") + len("car")
    assert set(study.pieces("car")) < set(study.pieces("Sports car")) and study.words("Sports CAR") == {
        "sports",
        "car",
    }
    names = ["sports car", "oboe"]
    for name, direction in zip(names, tower(names), strict=True):
        mean = torch.stack([tower.pieces.weight[number] for number in study.pieces(name)]).mean(0)
        torch.testing.assert_close(direction, F.normalize(tower.layers(mean), dim=0))


def test_names_of_known_words_are_understood_and_their_classes_never_taught(study):
    # 25 names of five colours and five animals, whose images are the sum of what both words look like.
    colours, animals = ["red", "blue", "green", "black", "white"], ["cat", "dog", "fish", "horse", "bee"]
    names = [f"{colour} {animal}" for colour in colours for animal in animals]
    generator = torch.Generator().manual_seed(0)
    looks = {word: torch.randn(32, generator=generator) for word in (*colours, *animals)}
    labels = torch.arange(25).repeat(20)
    images = torch.stack([sum(looks[word] for word in names[label].split()) for label in labels])
    images = F.normalize(images + 0.5 * torch.randn(images.shape, generator=generator), dim=-1)
    unseen = [0, 6, 12, 18, 24]  # each word of theirs is in four names that are seen
    seen = [index for index in range(25) if index not in unseen]
    spoilt = images.clone()
    spoilt[torch.isin(labels, torch.tensor(unseen))] = float("nan")  # nobody may look at these
    tower = study.train(spoilt, labels, names, seen, steps=150, seed=0)
    with torch.no_grad():
        found = study.told_apart(images, labels, tower([names[index] for index in unseen]), unseen)
    assert list(found) == unseen and np.mean(list(found.values())) > 0.8


def test_every_class_is_held_out_once_and_means_are_the_nearest(study, data, tmp_path, monkeypatch):
    taught = []

    def train(images, labels, names, classes, steps, seed, train=study.train):
        taught.append(classes)
        return train(images, labels, names, classes, steps, seed)

    monkeypatch.setattr(study, "train", train)
    study.main(arguments(data, tmp_path / "new"))
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert taught[0] == [*range(6)]  # of the tower that has seen all names
    parts = [sorted(set(range(6)) - set(classes)) for classes in taught[1:]]
    assert [len(part) for part in parts] == [2, 2, 2] and sorted(sum(parts, [])) == [*range(6)]
    assert report["num_images"] == [24, 24] and report["chance"] == 0.5

    x, test = embeddings(data, range(24)), embeddings(data, range(24, 48))
    centre = x.mean(0)
    x, test = unit(x - centre), unit(test - centre)
    expected = {}
    for part in parts:
        means = unit(np.stack([np.mean([x[i] for i in range(24) if i % 6 == c], 0) for c in part]))
        for place, c in enumerate(part):
            right = [np.argmax(means @ test[i]) == place for i in range(24) if i % 6 == c]
            expected[NAMES[c]] = np.mean(right)
    assert report["per_class"]["class means"] == pytest.approx(expected)
    value, low, high = report["summary"]["accuracy"]["class means"]
    assert low <= value <= high and value == pytest.approx(np.mean([*expected.values()]), abs=1e-4)

    alone = {"abacus", "oboe"}  # of names that are held out beside their kin, no word is left
    for part, classes in zip(parts, taught[1:], strict=True):
        left = {word for index in classes for word in NAMES[index].split()}
        alone |= {NAMES[index] for index in part if not left & set(NAMES[index].split())}
    rows = report["per_class"]
    assert rows["unseen names of unseen words"].keys() == alone
    assert rows["unseen names with a word of a seen name"].keys() == set(NAMES) - alone


def test_what_cannot_be_asked_is_said_in_a_sentence(study, data, tmp_path):
    save(data / "other.parquet", range(12), NAMES[::-1])
    save(data / "few.parquet", range(5))
    Dataset.from_dict({"image": [noise_image(0)]}, features=Features({"image": Image()})).to_parquet(
        data / "bare.parquet"
    )
    for message, more, files in (
        ("The classes of train_files and test_files differ", (), {"test": "other.parquet"}),
        ("There are no images of 'oboe' in both sets; ask for more", (), {"test": "few.parquet"}),
        ("--parts 4 leaves less than two of 6 names", ("--parts", "4"), {}),
        ("has no names of classes in a column 'label'", (), {"train": "bare.parquet"}),
        ("gives no image with num_images=0", ("--num_images", "0"), {}),
    ):
        with pytest.raises(SystemExit, match=message):
            study.main(arguments(data, tmp_path / "none", *more, **files))
    assert not (tmp_path / "none").exists()
