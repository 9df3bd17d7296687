"""Say how far tuning moved a backbone: over how many directions its embeddings spread, and how alike they are.

python examples/reproduce/compare_embeddings.py --before vit-tiny --after tuned --files 'test-*.parquet' \
    --output_file embeddings.json
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tve_hf import SplitClassifier, split_classifier
from tve_hf.files import dumps, write_whole
from tve_hf.sources import Images, open_images, read_image, sample_images

BATCH = 20


def directions(embeddings: Tensor) -> float:
    """Participation ratio of the variances along the principal axes of embeddings (images, D), from 1 to D."""
    variances = torch.linalg.svdvals(embeddings - embeddings.mean(0)).square()
    return (variances.sum().square() / variances.square().sum()).item()


def likeness(before: Tensor, after: Tensor) -> float:
    """Linear CKA, from 0 to 1, of embeddings (images, D) and (images, D') of the same images (arXiv 1905.00414)."""
    before, after = (embeddings - embeddings.mean(0) for embeddings in (before, after))
    shared = (before.T @ after).norm().square()
    return (shared / ((before.T @ before).norm() * (after.T @ after).norm())).item()


def embed(classifier: SplitClassifier, images: Images) -> Tensor:
    """Embeddings (images, D), each batch prepared by the classifier's own processor."""
    data: Any = images.data
    found = []
    for start in range(0, len(data), BATCH):
        decoded = [read_image(row) for row in data[start : start + BATCH][images.column]]
        found.append(classifier.embed(classifier.image_processor(decoded, return_tensors="pt")["pixel_values"]))
    return torch.cat(found).double()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="classifier before it was tuned")
    parser.add_argument("--after", required=True, help="and after it")
    parser.add_argument("--files", required=True, nargs="+", help="held-out images of the task")
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", required=True, type=Path)
    args = parser.parse_args(arguments)
    try:
        images, _ = sample_images(open_images(args.files), args.num_images, args.seed)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if images.number < 2:
        raise SystemExit(f"{images.name} gives one image, which has no spread; raise num_images, or pass more files.")
    before, after = (embed(split_classifier(name), images) for name in (args.before, args.after))
    report = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "directions": {"before": directions(before), "after": directions(after)},
        "likeness": likeness(before, after),
    }
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.output_file, lambda path: path.write_text(dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    main()
