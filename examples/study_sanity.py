"""Sanity checks of every method: does its map follow the head, the backbone and the class, and hold still under noise?

    python examples/study_sanity.py --classifier tve_hf/checkpoints/mobilenet-v2-tiny-imagenet \
        --model tve_hf/checkpoints/tve-mobilenet-v2-tiny-imagenet --methods tve grad_cam rise@400 \
        --files 'tiny_imagenet/test-*.parquet' --num_images 50 --output_dir runs/sanity

`randomization_head` and `randomization_backbone` are rank correlations of the maps before and after these weights are
drawn anew, near 0 for a method that reads them; `class_sensitivity` is that of the maps of the two likeliest classes;
`sensitivity_max` is the largest relative change of the map under small noise (`tve_hf.evaluation.sanity`). All are of
the class that is predicted. Methods that draw have the same draws in each map, so that only their maps can differ.

What an explainer is asked here: its own weights stay, and it reads features, embedding and head of the classifier that
it is given. A new head is what it is for. After a new backbone it no longer fits, and users are warned of that, as
this command is (`fits` in the report); its map may follow the features, but nothing says that it is right. An
explainer of one head, such as `vit_shapley`, refuses another, and then there is no map to compare (`refused`).

`report.json` has all values, and medians over images as [value, low, high], with 95 % bootstrap intervals; images
of which a map is constant, so that it has no order, are left out and counted (`constant`). Started again, the command
goes on where it was.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tve_hf import ShapleyExplainer, SplitClassifier, TVEExplainer, methods, split_classifier
from tve_hf.benchmark.cells import Cells, digest
from tve_hf.benchmark.judge import options_of, refusal
from tve_hf.classifiers.compiled import with_compiled_passes
from tve_hf.classifiers.layout import with_channels_last
from tve_hf.compatibility import verdict
from tve_hf.evaluation.report import rounded
from tve_hf.evaluation.sanity import Explain, class_sensitivity, randomization, randomized, sensitivity_max
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import dumps, write_whole
from tve_hf.sources import open_images, read_image, sample_images

BATCH = 10
CHECKS: dict[str, Callable[[Explain, SplitClassifier, Tensor, Tensor], Tensor]] = {
    "randomization_head": partial(randomization, part="head"),
    "randomization_backbone": partial(randomization, part="backbone"),
    "class_sensitivity": lambda explain, classifier, pixel_values, _: class_sensitivity(
        explain, classifier, pixel_values
    ),
    "sensitivity_max": sensitivity_max,
}
# After which a method may no longer serve the classifier.
RANDOMIZED = {"randomization_head": "head", "randomization_backbone": "backbone"}


def maps_of(
    spec: str,
    offered: dict[str, Any],
    grid: tuple[int, int],
    seed: int,
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
) -> Tensor:
    """Maps (B, rows, cols) of one method, with the same draws in every call."""
    name, options = options_of(spec, offered | {"generator": torch.Generator().manual_seed(seed)})
    return methods.explain(name, classifier, pixel_values, class_idx, grid, **options)


def summarize(table: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """From values of each check and method, (n,), to medians with intervals, and numbers of constant maps."""

    def medians(rows: Tensor) -> Tensor:
        return rows.median(1).values

    summary: dict[str, Any] = {"constant": {}}
    for check, columns in table.items():
        summary["constant"][check] = {spec: int(values.isnan().sum()) for spec, values in columns.items()}
        summary[check] = {}
        for spec, values in columns.items():
            values = values[~values.isnan()]
            summary[check][spec] = (
                [values.median().item(), *bootstrap_interval(values, statistic=medians)]
                if len(values)
                else [float("nan")] * 3
            )
    return rounded(summary)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--model", required=True, help="explainer of its backbone, whose grid all methods have")
    parser.add_argument("--vit_shapley", help="ViT-Shapley explainer of the classifier")
    parser.add_argument("--methods", nargs="+", required=True, help="names, sampling ones as name@samples")
    parser.add_argument("--files", required=True, nargs="+", help="held-out images; labels are not read")
    parser.add_argument("--num_images", type=int, default=50)
    parser.add_argument("--torch_compile", action="store_true", help="compile the passes of masked images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args(arguments)
    specs = list(dict.fromkeys(args.methods))

    try:
        classifier = with_channels_last(split_classifier(args.classifier, dtype=torch.float32))
        classifier = with_compiled_passes(classifier) if args.torch_compile else classifier
        explainer = TVEExplainer.from_pretrained(args.model, dtype=torch.float32).eval()
        offered: dict[str, Any] = {"explainer": explainer, "hops": explainer.config.hops}
        if args.vit_shapley:
            shapley = ShapleyExplainer.from_pretrained(args.vit_shapley, dtype=torch.float32).eval()
            offered["shapley_explainer"] = shapley
        grid = explainer.config.grid_shape
        for spec in specs:
            if error := refusal(classifier, spec, grid, offered):
                raise error
        images, rows = sample_images(open_images(args.files), args.num_images, args.seed)
        settings = {"classifier": digest(classifier), "files": args.files, "seed": args.seed}
        settings |= {name: digest(part) for name, part in offered.items() if name != "hops"}
        cells = Cells(args.output_dir / "cells", settings)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(str(error))
    copies = {check: randomized(classifier, part) for check, part in RANDOMIZED.items()}
    refused = {
        check: {spec: str(error) for spec in specs if (error := refusal(copy, spec, grid, offered))}
        for check, copy in copies.items()
    }
    data: Any = images.data

    def compute(check: str, spec: str, pixel_values: Tensor, class_idx: Tensor) -> dict[str, Tensor]:
        explain = partial(maps_of, spec, offered, grid, args.seed)
        return {"values": CHECKS[check](explain, classifier, pixel_values, class_idx)}

    parts: dict[str, dict[str, list[Tensor]]] = {check: {} for check in CHECKS}
    for start in tqdm(range(0, len(data), BATCH), unit="batch"):
        stop = min(start + BATCH, len(data))
        decoded = [read_image(image) for image in data[start:stop][images.column]]
        pixel_values = classifier.image_processor(decoded, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            class_idx = classifier(pixel_values).logits.argmax(-1)
        for check, columns in parts.items():
            for spec in specs:
                if spec not in refused.get(check, {}):
                    key = f"{check}/{spec}/{start:06}-{stop:06}"
                    found = cells.get(key, partial(compute, check, spec, pixel_values, class_idx))
                    columns.setdefault(spec, []).append(found["values"])
    table = {
        check: {spec: torch.cat(values).double() for spec, values in columns.items()}
        for check, columns in parts.items()
    }
    report = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "num_images": len(data),
        "rows": rows,
        "fits": {
            name: verdict(explainer.config, copy).fit for name, copy in {"classifier": classifier, **copies}.items()
        },
        "refused": refused,
        "summary": summarize(table),
        "per_image": {
            check: {spec: [round(value, 4) for value in values.tolist()] for spec, values in columns.items()}
            for check, columns in table.items()
        },
    }
    write_whole(args.output_dir / "report.json", lambda path: path.write_text(dumps(report, indent=1) + "\n"))
    print(dumps({check: report["summary"][check] for check in CHECKS}, indent=1))


if __name__ == "__main__":
    main()
