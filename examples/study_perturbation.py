"""What is left of a classifier's accuracy when maps say which patches go? LeGrad's table, and the layers it reads.

    python examples/study_perturbation.py --classifier vit-tiny-tiny-imagenet --model tve \
        --files 'tiny_imagenet/test-*.parquet' --methods random rollout grad_cam legrad tve --layers 1 2 3 6 \
        --output_dir runs/perturbation

Negative and positive perturbation of the LeGrad paper (arXiv 2404.03214): 0 to 90 % of the patches are deleted, the
least or the most relevant first, and accuracy on the labels is averaged over the shares; the area is at most 0.9, high
for a good map in the negative order and low in the positive one. All of it twice: with maps of the class that the
classifier predicts, and with maps of the true one. The row `legrad, last n` reads the last n layers alone. Intervals
are 95 % bootstrap, of each area and of how far it is above the reference's on the same images. Started again, what was
computed is not computed again.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel
from torch import Tensor
from tqdm.auto import tqdm

from tve_hf import ShapleyExplainer, SplitClassifier, TVEExplainer, methods, split_classifier
from tve_hf.benchmark.cells import Cells, digest
from tve_hf.benchmark.judge import options_of, parse_method, refusal
from tve_hf.benchmark.labels import is_correct
from tve_hf.evaluation.perturbation import perturbation
from tve_hf.evaluation.report import rounded
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import dumps, write_whole
from tve_hf.patches import as_pair
from tve_hf.sources import Images, open_images, read_image, sample_images

LEVELS = 10  # shares of the patches that go: 0, 10, ... 90 %
ORDERS = ("negative", "positive")
EXPLAINED = ("predicted", "true")  # classes that maps are of
BATCH = 20

Row = tuple[str, dict[str, Any]]  # a method as name or name@samples, and what it is offered besides


def rows_of(args: argparse.Namespace, explainers: dict[str, Any]) -> dict[str, Row]:
    """The rows of the table.

    Raises:
        ValueError: If a method is unknown or lacks its explainer, or the reference is none of the rows.
    """
    rows: dict[str, Row] = {spec: (spec, explainers) for spec in args.methods}
    rows |= {f"legrad, last {n}": ("legrad", {"layers": range(-n, 0)}) for n in args.layers}
    names = {parse_method(spec)[0] for spec in args.methods}
    for name, option in (("tve", "model"), ("vit_shapley", "vit_shapley")):
        if name in names and getattr(args, option) is None:
            raise ValueError(f"The method {name} needs an explainer of the classifier; pass --{option}.")
    if args.reference not in rows:
        raise ValueError(
            f"The reference {args.reference!r} is none of the rows; choose --reference among {'; '.join(rows)}."
        )
    return rows


def true_classes(labels: Sequence[Any], classifier: SplitClassifier, names: Sequence[str] | None) -> Tensor:
    """The class of each label, (n,), matched as by `tve-hf evaluate`; where several have its name, the first.

    Raises:
        ValueError: If the labels are not the classifier's classes.
    """
    classes = torch.tensor(sorted(classifier.id2label))
    matches = [is_correct(index.repeat(len(labels)), labels, classifier.id2label, names) for index in classes]
    found = torch.stack([torch.zeros(len(labels)) if match is None else match for match in matches])  # (C, n)
    if not found.any(0).all():
        raise ValueError(
            f"The labels are not all classes of {classifier.name}; pass as --label_column one of their numbers or "
            "names."
        )
    return classes[found.argmax(0)]


def labelled(args: argparse.Namespace, classifier: SplitClassifier) -> tuple[Images, Tensor]:
    """Images drawn by the seed, and the true class of each, (n,).

    Raises:
        ValueError: If there are none, or their labels are not the classifier's classes.
    """
    images = open_images(args.files, others=[args.label_column])
    data: Any = images.data
    if args.label_column not in data.column_names:
        raise ValueError(f"{images.name} has no column {args.label_column!r}; pass that of labels as --label_column.")
    images, _ = sample_images(images, args.num_images, args.seed)
    data = images.data
    feature = data.features[args.label_column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    return images, true_classes(list(data[args.label_column]), classifier, names)


def maps_of(
    row: Row, classifier: SplitClassifier, grid: tuple[int, int], seed: int, pixel_values: Tensor, class_idx: Tensor
) -> Tensor:
    """Maps (B, rows, cols) of these classes."""
    spec, offered = row
    name, options = options_of(spec, offered | {"generator": torch.Generator().manual_seed(seed)})
    return methods.explain(name, classifier, pixel_values, class_idx, grid, **options)


def judged(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    predicted: Tensor,
    true: Tensor,
    explain: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Areas under the accuracy, (B,), of both orders, for maps of both classes: the same where they are one."""

    def areas(chosen: Tensor, class_idx: Tensor) -> Iterable[Tensor]:
        pixels = pixel_values[chosen]
        found = perturbation(classifier, pixels, explain(pixels, class_idx[chosen]), true[chosen], LEVELS)
        return found.negative_auc, found.positive_auc

    found: dict[str, Tensor] = {}
    wrong = predicted != true
    for order, values in zip(ORDERS, areas(torch.ones_like(wrong), predicted), strict=True):
        found |= {f"{explained}/{order}": values.clone() for explained in EXPLAINED}
    if wrong.any():
        for order, values in zip(ORDERS, areas(wrong, true), strict=True):
            found[f"true/{order}"][wrong] = values
    return found


def summarize(columns: dict[str, Tensor], rows: Iterable[str], reference: str) -> dict[str, Any]:
    """Mean and interval of each area, and of how far it is `above` the reference's on the same images."""
    summary: dict[str, Any] = {}
    for explained in EXPLAINED:
        for row in rows:
            for order in ORDERS:
                values, others = (columns[f"{name}/{explained}/{order}"] for name in (row, reference))
                entry = {"mean": values.mean().item(), "interval": list(bootstrap_interval(values))}
                if row != reference:
                    above = values - others
                    entry |= {"above": above.mean().item(), "above_interval": list(bootstrap_interval(above))}
                summary.setdefault(explained, {}).setdefault(row, {})[order] = entry
    return summary


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--files", required=True, nargs="+", help="held-out images with labels")
    parser.add_argument("--label_column", default="label", help="numbers or names of the classifier's classes")
    parser.add_argument("--methods", nargs="+", required=True, help="names, or name@samples")
    parser.add_argument("--layers", nargs="*", type=int, default=[], help="rows of LeGrad on so many last layers")
    parser.add_argument("--reference", default="legrad", help="row that the others are compared with")
    parser.add_argument("--model", help="explainer of the classifier's backbone, for the method tve")
    parser.add_argument("--vit_shapley", help="ViT-Shapley explainer of the classifier, for the method vit_shapley")
    parser.add_argument("--grid_size", type=int, help="of the maps; the explainer's or the classifier's by default")
    parser.add_argument("--num_images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args(arguments)

    kinds = {"explainer": (TVEExplainer, args.model), "shapley_explainer": (ShapleyExplainer, args.vit_shapley)}
    try:
        classifier = split_classifier(args.classifier, dtype=torch.float32)
        explainers: dict[str, Any] = {
            option: kind.from_pretrained(name, dtype=torch.float32).eval()
            for option, (kind, name) in kinds.items()
            if name is not None
        }
        rows = rows_of(args, explainers)
        images, true = labelled(args, classifier)
        trained = [explainer.config.grid_shape for explainer in explainers.values()]
        own = next(iter(trained), None) or classifier.default_grid()
        grid = as_pair(own if args.grid_size is None else args.grid_size)
        if prod(grid) < LEVELS - 1:
            raise ValueError(f"A grid of {grid[0]} x {grid[1]} patches is too coarse for {LEVELS} shares of them.")
        for spec, offered in rows.values():
            if error := refusal(classifier, spec, grid, offered):
                raise error
        settings = {name: digest(module) for name, module in ({"classifier": classifier} | explainers).items()}
        settings |= {name: getattr(args, name) for name in ("files", "label_column", "seed")}
        cells = Cells(args.output_dir / "cells", settings | {"grid": list(grid)})
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error

    table: dict[str, list[Tensor]] = {}
    right: list[Tensor] = []
    data: Any = images.data
    for start in tqdm(range(0, len(data), BATCH), unit="batch"):
        stop = min(start + BATCH, len(data))
        decoded = [read_image(row) for row in data[start:stop][images.column]]
        pixel_values = classifier.image_processor(decoded, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            predicted = classifier(pixel_values).logits.argmax(-1)
        right.append(predicted == true[start:stop])
        for name, row in rows.items():
            explain = partial(maps_of, row, classifier, grid, args.seed + start)
            compute = partial(judged, classifier, pixel_values, predicted, true[start:stop], explain)
            for key, values in cells.get(f"{name}/{start:06}-{stop:06}", compute).items():
                table.setdefault(f"{name}/{key}", []).append(values)
    columns = {key: torch.cat(values).double() for key, values in table.items()}
    report: dict[str, Any] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "num_images": len(data),
        "accuracy": torch.cat(right).double().mean().item(),
        "summary": summarize(columns, rows, args.reference),
        "per_image": {key: column.tolist() for key, column in columns.items()},
    }
    write_whole(args.output_dir / "report.json", lambda path: path.write_text(dumps(rounded(report), indent=1) + "\n"))
    for explained, entries in report["summary"].items():
        for name, entry in entries.items():
            print(f"{explained:9} {name:20}", *(f"{order} {entry[order]['mean']:.3f}" for order in ORDERS))


if __name__ == "__main__":
    main()
