"""Does an explanation gain by the head that decides? Maps of a task by its own head, by a general one, and by a rival.

    python examples/study_transfer.py --classifier cats-vs-dogs --general tiny-imagenet --model tve \
        --vit_shapley vit-shapley --files 'cats_vs_dogs/test-*.parquet' --grid_size 8 --output_dir runs/transfer

All on one backbone, and nothing is trained on the task: `tve` reads the explainer's predictions by the task's head,
`tve_general` by the head that the backbone was trained with, for the class that this one gives, since the task has
other classes; `vit_shapley`, if it is given, explains that class likewise. Every map is judged by what masking does to
the class that the task's classifier predicts. `report.json` has the summary of `tve-hf evaluate`; started again, what
was computed is not computed again.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tve_hf import ShapleyExplainer, SplitClassifier, TVEExplainer, fidelity, methods, split_classifier
from tve_hf.benchmark.cells import Cells, digest
from tve_hf.classifiers.compiled import with_compiled_passes
from tve_hf.classifiers.layout import with_channels_last
from tve_hf.evaluation.report import summarize
from tve_hf.files import dumps, write_whole
from tve_hf.fingerprint import match
from tve_hf.sources import open_images, read_image, sample_images

REMOVALS = ["zero", "blur"]
BATCH = 20


def maps_of(
    spec: str, classifier: SplitClassifier, pixel_values: Tensor, explainers: dict[str, Any], grid: int, seed: int
) -> Tensor:
    """Maps (B, rows, cols) of the class that this classifier predicts."""
    class_idx = classifier(pixel_values).logits.argmax(-1)
    name = spec.removesuffix("_general")
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)} if name == "random" else {}
    if name in explainers:
        options["shapley_explainer" if name == "vit_shapley" else "explainer"] = explainers[name]
    return methods.explain(name, classifier, pixel_values, class_idx, grid, **options)


def judged(task: SplitClassifier, pixel_values: Tensor, make: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Areas of both curves, (B,), of maps under every removal operator."""
    scores, class_idx = make(), task(pixel_values).logits.argmax(-1)
    found = {name: fidelity(task, pixel_values, scores, class_idx, removal=name) for name in REMOVALS}
    return {
        f"{name}/{side}": getattr(curves, f"{side}_auc").clone()
        for name, curves in found.items()
        for side in ("plus", "minus")
    }


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True, help="of the task")
    parser.add_argument("--general", required=True, help="classifier with the head of the backbone's own training")
    parser.add_argument("--model", required=True, help="explainer of the backbone")
    parser.add_argument("--vit_shapley", help="ViT-Shapley explainer of the general classifier")
    parser.add_argument("--files", required=True, nargs="+", help="held-out images of the task")
    parser.add_argument("--grid_size", required=True, type=int)
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--torch_compile", action="store_true", help="compile the passes of masked images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args(arguments)

    names = args.classifier, args.general
    task, general = (with_channels_last(split_classifier(name, dtype=torch.float32)) for name in names)
    if match(task.fingerprint(), general.fingerprint()) != "same weights":
        raise SystemExit(f"{args.classifier} and {args.general} have different backbones; give heads of one.")
    if args.torch_compile:  # maps take one pass, and what judges them takes the others
        task = with_compiled_passes(task)
    explainers: dict[str, Any] = {"tve": TVEExplainer.from_pretrained(args.model, dtype=torch.float32).eval()}
    if args.vit_shapley:
        explainers["vit_shapley"] = ShapleyExplainer.from_pretrained(args.vit_shapley, dtype=torch.float32).eval()
    specs = ["tve", "tve_general", *(["vit_shapley"] if args.vit_shapley else []), "random"]
    try:
        images, _ = sample_images(open_images(args.files), args.num_images, args.seed)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    data: Any = images.data
    settings = {"digests": [digest(part) for part in (task, general, *explainers.values())]}
    settings |= {name: getattr(args, name) for name in ("files", "grid_size", "seed")}
    cells = Cells(args.output_dir / "cells", settings)

    table: dict[str, list[Tensor]] = {}
    for start in tqdm(range(0, len(data), BATCH), unit="batch"):
        stop = min(start + BATCH, len(data))
        decoded = [read_image(row) for row in data[start:stop][images.column]]
        pixel_values = task.image_processor(decoded, return_tensors="pt")["pixel_values"]
        for spec in specs:
            reading = task if spec == "tve" else general
            make = partial(maps_of, spec, reading, pixel_values, explainers, args.grid_size, args.seed + start)
            found = cells.get(f"{spec}/{start:06}-{stop:06}", partial(judged, task, pixel_values, make))
            for key, values in found.items():
                table.setdefault(f"{spec}/{key}", []).append(values)
    columns = {key: torch.cat(values).double() for key, values in table.items()}
    report = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "num_images": len(data),
        "summary": summarize(columns, specs, REMOVALS),
        "per_image": {key: [round(value, 4) for value in column.tolist()] for key, column in columns.items()},
    }
    write_whole(args.output_dir / "report.json", lambda path: path.write_text(dumps(report, indent=1) + "\n"))
    for removal in REMOVALS:
        print({spec: row["gap"][0] for spec, row in report["summary"]["fidelity"][removal].items()})


if __name__ == "__main__":
    main()
