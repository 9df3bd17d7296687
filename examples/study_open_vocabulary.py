"""Can a text tower that is trained on a data set's class names alone name what it has not been taught?

    python examples/study_open_vocabulary.py --classifier tve_hf/checkpoints/vit-tiny-tiny-imagenet \
        --train_files 'tiny_imagenet/train-*.parquet' --test_files 'tiny_imagenet/test-*.parquet' \
        --output_dir runs/open-vocabulary

Maps of an open vocabulary need a model that knows what words mean. This asks how far one gets without large data: as
in CLIP, images and names are brought to one space and a contrastive loss is minimised, but the image tower is the
frozen backbone, and the text tower, of words and of groups of three letters, begins with random weights. A part of the
classes is held out of its training, each part in turn; the test images of that part are then to be told apart by its
names alone. `report.json` has, as [value, low, high] with 95 % bootstrap intervals over the classes, the accuracy of

* `unseen names`, and of them those that share a word with a seen name, or none;
* `seen names`: the same images and names in the same parts, by a tower that was trained on all names;
* `class means`: by the nearest mean of the training images, which is what the embeddings can tell.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from datasets import ClassLabel
from torch import Tensor, nn
from tqdm.auto import tqdm

from tve_hf import SplitClassifier, split_classifier
from tve_hf.evaluation.report import rounded
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import dumps, write_whole
from tve_hf.sources import open_images, read_image, sample_images

BATCH = 50
BUCKETS = 2**12  # of words and groups of letters


def words(name: str) -> set[str]:
    return set(name.lower().split())


def pieces(name: str) -> list[int]:
    """The words of a name and their groups of three letters, with marks at both ends, each as a number."""
    found = [piece for word in words(name) for piece in (word, *(f"<{word}>"[i : i + 3] for i in range(len(word))))]
    return [crc32(piece.encode()) % BUCKETS for piece in sorted(found)]


class TextTower(nn.Module):
    """Names to the space of the images: the mean of what their pieces say, through two layers."""

    def __init__(self, embedding_dim: int, hidden_size: int = 256):
        super().__init__()
        self.pieces = nn.EmbeddingBag(BUCKETS, hidden_size, mode="mean")
        self.layers = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, embedding_dim)
        )
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, names: Sequence[str]) -> Tensor:
        """Return directions of unit length, (names, D)."""
        numbers = [torch.tensor(pieces(name)) for name in names]
        offsets = torch.tensor([0, *map(len, numbers[:-1])]).cumsum(0)
        return F.normalize(self.layers(self.pieces(torch.cat(numbers), offsets)), dim=-1)


def train(images: Tensor, labels: Tensor, names: list[str], classes: list[int], steps: int, seed: int) -> TextTower:
    """Train a tower on the images of these classes, (n, D), of unit length, against their names."""
    torch.manual_seed(seed)
    tower = TextTower(images.shape[1])
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    place = torch.full((len(names),), -1)
    place[classes] = torch.arange(len(classes))
    rows = (place[labels] >= 0).nonzero()[:, 0]
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (512,))]
        logits = tower.scale.exp() * images[batch] @ tower([names[index] for index in classes]).T
        F.cross_entropy(logits, place[labels[batch]]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return tower.eval()


def told_apart(images: Tensor, labels: Tensor, directions: Tensor, classes: list[int]) -> dict[int, float]:
    """Accuracy on the images of each of these classes, among their directions, (classes, D)."""
    found = {}
    for place, index in enumerate(classes):
        nearest = (images[labels == index] @ directions.T).argmax(-1)
        found[index] = (nearest == place).double().mean().item()
    return found


@torch.no_grad()
def embedded(
    classifier: SplitClassifier, files: list[str], number: int, seed: int
) -> tuple[Tensor, Tensor, list[str]]:
    """Embeddings of images, (n, D), their labels, (n,), and the names of all classes.

    Raises:
        ValueError: If there are no names.
    """
    images, _ = sample_images(open_images(files, others=["label"]), number, seed)
    data: Any = images.data
    feature = data.features.get("label")
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"{images.name} has no names of classes in a column 'label'; pass a data set that has.")
    rows = []
    for start in tqdm(range(0, len(data), BATCH), unit="batch"):
        decoded = [read_image(image) for image in data[start : start + BATCH][images.column]]
        rows.append(classifier.embed(classifier.image_processor(decoded, return_tensors="pt")["pixel_values"]))
    return torch.cat(rows), torch.tensor(data["label"]), feature.names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True, help="whose backbone is the image tower")
    parser.add_argument("--train_files", required=True, nargs="+", help="labelled images")
    parser.add_argument("--test_files", required=True, nargs="+", help="labelled images of the same classes")
    parser.add_argument("--num_images", type=int, default=10_000, help="of each, at most")
    parser.add_argument("--parts", type=int, default=10, help="that the classes are split into")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args(arguments)
    try:
        classifier = split_classifier(args.classifier, dtype=torch.float32)
        x, y, names = embedded(classifier, args.train_files, args.num_images, args.seed)
        test_x, test_y, test_names = embedded(classifier, args.test_files, args.num_images, args.seed)
        if names != test_names:
            raise ValueError("The classes of train_files and test_files differ; pass two parts of one data set.")
        shown = set(y.tolist()) & set(test_y.tolist())
        if missing := [name for index, name in enumerate(names) if index not in shown]:
            raise ValueError(f"There are no images of {missing[0]!r} in both sets; ask for more with --num_images.")
        if not 2 <= args.parts <= len(names) // 2:
            raise ValueError(f"--parts {args.parts} leaves less than two of {len(names)} names in a part; pass fewer.")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    centre = x.mean(0)  # what all images share says nothing of them
    x, test_x = F.normalize(x - centre, dim=-1), F.normalize(test_x - centre, dim=-1)
    means = F.normalize(torch.stack([x[y == index].mean(0) for index in range(len(names))]), dim=-1)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(args.seed)).tolist()
    everything = train(x, y, names, list(range(len(names))), args.steps, args.seed)
    accuracy: dict[str, dict[int, float]] = {"unseen names": {}, "seen names": {}, "class means": {}}
    kin = set()
    for part in tqdm([sorted(order[start :: args.parts]) for start in range(args.parts)], unit="part"):
        seen = sorted(set(order) - set(part))
        tower = train(x, y, names, seen, args.steps, args.seed)
        with torch.no_grad():
            said, known = (text([names[index] for index in part]) for text in (tower, everything))
        for row, directions in (("unseen names", said), ("seen names", known), ("class means", means[part])):
            accuracy[row] |= told_apart(test_x, test_y, directions, part)
        taught = set().union(*(words(names[index]) for index in seen))
        kin |= {index for index in part if words(names[index]) & taught}
    unseen = accuracy["unseen names"]
    accuracy["unseen names with a word of a seen name"] = {k: v for k, v in unseen.items() if k in kin}
    accuracy["unseen names of unseen words"] = {k: v for k, v in unseen.items() if k not in kin}
    table = {row: torch.tensor([*found.values()], dtype=torch.float64) for row, found in accuracy.items() if found}
    report = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "num_images": [len(x), len(test_x)],
        "num_classes": {row: len(values) for row, values in table.items()},
        "chance": args.parts / len(names),
        "summary": rounded({"accuracy": {row: [v.mean().item(), *bootstrap_interval(v)] for row, v in table.items()}}),
        "per_class": {row: {names[k]: round(v, 4) for k, v in found.items()} for row, found in accuracy.items()},
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(args.output_dir / "report.json", lambda path: path.write_text(dumps(report, indent=1) + "\n"))
    print(dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
