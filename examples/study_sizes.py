"""How small may an explainer be? Fidelity against what it computes, for explainers of several widths and depths.

Each is trained on random backgrounds with the images, masked passes and steps of `study_passes.py`, whose arguments
these are, and measured on the same held-out images. Its cost are the operations that an explanation adds to those of
the prediction. On the Pareto front are the sizes that no cheaper one reaches.

    python examples/study_sizes.py --classifier vit-tiny --train_files 'tiny_imagenet/train-*.parquet' \
        --test_files 'tiny_imagenet/test-*.parquet' --sizes 64x1 128x2 256x4 --numbers 5000 --output_dir runs/sizes \
        --output_file sizes.json --plot sizes.png

Interrupted, the same command goes on.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from study_passes import REMOVALS, Arguments, measure, train
from transformers import HfArgumentParser

from tve_hf import TVEExplainer, methods, split_classifier
from tve_hf.benchmark.cost import own_share
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import dumps


@dataclass
class SizeArguments(Arguments):
    sizes: list[str] = field(
        default_factory=lambda: ["64x1", "128x1", "128x2", "192x2", "192x4"],
        metadata={"help": "Width and layers of each explainer."},
    )


def share_of(classifier_name: str, folder: Path) -> float:
    """What an explanation computes beside the prediction, in predictions."""
    classifier = split_classifier(classifier_name, dtype=torch.float32)
    explainer = TVEExplainer.from_pretrained(folder, dtype=torch.float32).eval()
    class_idx = torch.zeros(1, dtype=torch.int64)

    def explain(pixel_values: torch.Tensor) -> torch.Tensor:
        return methods.explain("tve", classifier, pixel_values, class_idx, explainer=explainer)

    explain(classifier.probe()[:1])  # that the explainer fits takes passes, once
    return own_share(classifier, explain)


def on_front(rows: list[dict[str, Any]], removal: str) -> list[str]:
    """The sizes that are more faithful than every one that costs no more."""
    best, front = -float("inf"), []
    for row in sorted(rows, key=lambda row: (row["share"], -row[removal]["gap"])):
        if row[removal]["gap"] > best:
            best = row[removal]["gap"]
            front.append(row["size"])
    return front


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Gap with its interval against operations, and the front as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(REMOVALS), figsize=(9, 3.6))
    for axis, removal in zip(axes, REMOVALS, strict=True):
        front = [row for row in rows if row["size"] in on_front(rows, removal)]
        front.sort(key=lambda row: row["share"])
        axis.plot([row["share"] for row in front], [row[removal]["gap"] for row in front], color="#d55e00", zorder=0)
        for row in rows:
            gap, (low, high) = row[removal]["gap"], row[removal]["interval"]
            axis.errorbar(row["share"], gap, [[gap - low], [high - gap]], marker="o", capsize=3, color="#0072b2")
            axis.annotate(row["size"], (row["share"], gap), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axis.margins(x=0.15)
        axis.set(xlabel="operations beside the prediction's, as a share of them", ylabel="fidelity gap", title=removal)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(SizeArguments).parse_args_into_dataclasses(arguments)
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        width, layers = map(int, size.split("x"))
        own = replace(args, hidden_size=width, num_hidden_layers=layers, output_dir=f"{args.output_dir}/{size}")
        folder = train(own, "random", args.numbers[0])
        cell = folder / "gaps.json"
        if not cell.is_file():
            cell.write_text(json.dumps(measure(own, folder)))
        parameters = sum(weight.numel() for weight in TVEExplainer.from_pretrained(folder).parameters())
        row: dict[str, Any] = {"size": size, "parameters": parameters}
        row["share"] = round(share_of(args.classifier, folder), 4)
        for removal, values in json.loads(cell.read_text()).items():
            interval = [round(end, 4) for end in bootstrap_interval(torch.tensor(values))]
            row[removal] = {"gap": round(sum(values) / len(values), 4), "interval": interval}
        rows.append(row)
        print(row)
    left_out = ("output_dir", "output_file", "plot", "hidden_size", "num_hidden_layers")
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    path = Path(args.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    front = {removal: on_front(rows, removal) for removal in REMOVALS}
    path.write_text(dumps({"settings": settings, "rows": rows, "front": front}, indent=1) + "\n")
    if args.plot:
        draw(rows, Path(args.plot))


if __name__ == "__main__":
    main()
