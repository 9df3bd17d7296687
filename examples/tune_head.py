"""Classifier-tuning: put a new linear head on a frozen backbone, for a task of its own.

The backbone's embeddings of the training images, and of their mirror images, are computed once; then the head is
trained on them alone, standardised, and the standardisation is folded into its weights.

    python examples/tune_head.py --classifier vit --train_files 'cats_vs_dogs/train-*.parquet' \
        --test_files 'cats_vs_dogs/test-*.parquet' --output_dir vit-cats-vs-dogs
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, set_seed

from tve_hf import split_classifier


@dataclass
class Arguments:
    classifier: str
    train_files: list[str]
    test_files: list[str]
    output_dir: str
    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


@torch.no_grad()
def embed(classifier: nn.Module, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the images and of their mirror images, (2, n, D), and labels, (n,)."""
    rows = []
    for batch in data.iter(batch_size=100):
        images = [image.convert("RGB") for image in batch["image"]]
        x = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
        rows.append(torch.stack([classifier.embed(x), classifier.embed(x.flip(-1))]))
    return torch.cat(rows, dim=1), torch.tensor(data["label"])


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    processor = AutoImageProcessor.from_pretrained(args.classifier)
    model = AutoModelForImageClassification.from_pretrained(args.classifier, dtype=torch.float32).eval()
    classifier = split_classifier(model, processor)
    train = load_dataset("parquet", data_files=args.train_files, split="train")
    test = load_dataset("parquet", data_files=args.test_files, split="train")
    names = train.features["label"].names

    (x, y), (test_x, test_y) = embed(classifier, train), embed(classifier, test)
    x, y = x.flatten(0, 1), y.repeat(2)
    mean, std = x.mean(0), x.std(0)
    x = (x - mean) / std
    head = nn.Linear(x.shape[1], len(names))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    for epoch in range(args.epochs):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - epoch / args.epochs)
        for index in torch.randperm(len(x)).split(args.batch_size):
            F.cross_entropy(head(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()

    parent, _, name = classifier.backbone.head_names[0].rpartition(".")
    with torch.no_grad():
        head.weight.div_(std)
        head.bias.sub_(head.weight @ mean)
    setattr(model.get_submodule(parent), name, head)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {label: i for i, label in enumerate(names)}
    accuracy = (head(test_x[0]).argmax(-1) == test_y).float().mean().item()
    train_accuracy = (head(x * std + mean).argmax(-1) == y).float().mean().item()
    report = {"arguments": asdict(args), "train_accuracy": train_accuracy, "test_accuracy": accuracy}
    print(json.dumps(report))
    # Half precision on disk, float32 when loaded: the config keeps the model's dtype.
    model.save_pretrained(args.output_dir, state_dict={key: value.half() for key, value in model.state_dict().items()})
    processor.save_pretrained(args.output_dir)
    (Path(args.output_dir) / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
