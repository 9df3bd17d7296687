"""Judge an explainer and its rivals on held-out images: agreement with the exact attribution, and fidelity."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Image, load_dataset
from torch import Tensor
from tqdm.auto import tqdm

from . import methods
from .attribution import DEFAULT_RULE, exact_meta_attribution, pearson, prediction_errors, spearman, transfer
from .classifiers import SplitClassifier, split_classifier
from .fidelity import fidelity
from .images import load_image
from .modeling_tve import TVEExplainer
from .strict_json import dumps


@dataclass
class EvaluateArguments:
    """Settings of one evaluation."""

    classifier: str = field(metadata={"help": "Classifier to explain: a name or folder."})
    model: str = field(metadata={"help": "Explainer of its backbone: a name or folder."})
    test_files: list[str] = field(metadata={"help": "Parquet files (or patterns) of held-out images."})
    output_file: str = field(metadata={"help": "JSON file for settings, per-image values and summary."})
    image_column: str = field(default="image")
    label_column: str = field(default="label", metadata={"help": "Used for the accuracy, where it exists."})
    num_images: int = field(default=300)
    methods: list[str] = field(default_factory=lambda: ["random", "rollout", "grad_cam"])
    removals: list[str] = field(default_factory=lambda: ["zero", "blur"])
    rule: str = field(default=DEFAULT_RULE)
    batch_size: int = field(default=20)
    seed: int = field(default=0)


def bootstrap_interval(values: Tensor, samples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of per-image values, (n,)."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (samples, len(values)), generator=generator)
    low, high = values[index].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


@torch.no_grad()
def agreement(
    classifier: SplitClassifier, explainer: TVEExplainer, pixel_values: Tensor, class_idx: Tensor, rule: str
) -> dict[str, Tensor]:
    """Compare predicted with exact meta-attributions on all patches.

    Returns:
        Per-image values, (B,): `spearman` and `pearson` of the maps under `rule`, and those of `prediction_errors`;
        and the two maps, `tve` and `exact`, (B, rows, cols).
    """
    config = explainer.config
    seen = classifier(pixel_values)
    output = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
    predicted = output.kept, output.removed
    exact = exact_meta_attribution(classifier, pixel_values, config.grid_size, config.hops)
    maps = [
        transfer(kept, removed, classifier, class_idx, rule, config.grid_size, config.hops)
        for kept, removed in (predicted, exact)
    ]
    return {
        "spearman": spearman(*maps),
        "pearson": pearson(*maps),
        **prediction_errors(classifier, pixel_values, class_idx, predicted, exact),
        "tve": maps[0].unflatten(1, config.grid_shape),
        "exact": maps[1].unflatten(1, config.grid_shape),
    }


def evaluate(args: EvaluateArguments) -> dict[str, Any]:
    """Run one evaluation and write its report as JSON."""
    classifier = split_classifier(args.classifier, dtype=torch.float32)
    explainer = TVEExplainer.from_pretrained(args.model, dtype=torch.float32).eval()
    grid = explainer.config.grid_shape
    data = load_dataset("parquet", data_files=args.test_files, split="train")
    column, names = args.image_column, ", ".join(data.column_names)
    if column not in data.column_names:
        raise ValueError(f"No column {column!r} in {args.test_files}; choose image_column among {names}.")
    if min(args.num_images, len(data)) < 1:
        raise ValueError(f"{args.test_files} give no image with num_images={args.num_images}; pass at least one.")
    data = data.select(range(min(args.num_images, len(data)))).cast_column(column, Image(decode=False))
    generator = torch.Generator().manual_seed(args.seed)

    values: dict[str, list[Tensor]] = {}
    seconds = dict.fromkeys(["tve + exact", *args.methods], 0.0)
    start = 0
    for rows in tqdm(data.iter(batch_size=args.batch_size), total=math.ceil(len(data) / args.batch_size)):
        images = [load_image(row) for row in rows[column]]
        pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            class_idx = classifier(pixel_values).logits.argmax(-1)
        began = time.perf_counter()
        found = agreement(classifier, explainer, pixel_values, class_idx, args.rule)
        seconds["tve + exact"] += time.perf_counter() - began
        maps = {"tve": found.pop("tve"), "exact": found.pop("exact")}
        for name in args.methods:
            options = {"generator": generator} if name == "random" else {}
            began = time.perf_counter()
            maps[name] = methods.explain(name, classifier, pixel_values, class_idx, grid, **options)
            seconds[name] += time.perf_counter() - began
        if args.label_column in rows:
            found["correct"] = (class_idx == torch.tensor(rows[args.label_column])).float()
        for removal in args.removals:
            for name, scores in maps.items():
                result = fidelity(classifier, pixel_values, scores, class_idx, removal=removal)
                found[f"{name}/{removal}/plus"] = result.plus_auc
                found[f"{name}/{removal}/minus"] = result.minus_auc
        for key, value in found.items():
            values.setdefault(key, []).append(value)
        start += len(images)

    table = {key: torch.cat(parts).double() for key, parts in values.items()}
    report = {
        "settings": asdict(args),
        "num_images": start,
        "summary": summarize(table, [*maps], args.removals),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "per_image": {key: [round(v, 5) for v in column.tolist()] for key, column in table.items()},
    }
    path = Path(args.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(report, indent=1) + "\n")
    return report


def summarize(table: dict[str, Tensor], names: list[str], removals: list[str]) -> dict[str, Any]:
    """Reduce per-image values, (n,) each, to what a model card reports."""
    summary: dict[str, Any] = {
        "median_spearman": table["spearman"].nanmedian().item(),
        "median_pearson": table["pearson"].nanmedian().item(),
        "mean_kept_error": table["kept_error"].mean().item(),
        "mean_removed_error": table["removed_error"].mean().item(),
        "median_epsilon": table["epsilon"].median().item(),
        "median_bound": table["bound"].median().item(),
        "mean_error_nats": table["error"].mean().item(),
        "fidelity": {},
    }
    if "correct" in table:
        summary["accuracy"] = table["correct"].mean().item()
    for removal in removals:
        gaps = {name: table[f"{name}/{removal}/plus"] - table[f"{name}/{removal}/minus"] for name in names}
        rows = {}
        for name in names:
            plus, minus = table[f"{name}/{removal}/plus"], table[f"{name}/{removal}/minus"]
            rows[name] = {
                "plus_auc": [plus.mean().item(), plus.std().item()],
                "minus_auc": [minus.mean().item(), minus.std().item()],
                "gap": [gaps[name].mean().item(), gaps[name].std().item()],
                "gap_above_random": list(bootstrap_interval(gaps[name] - gaps["random"]))
                if "random" in gaps
                else None,
            }
        summary["fidelity"][removal] = rows | {
            "tve_share_of_exact": gaps["tve"].mean().item() / gaps["exact"].mean().item()
        }

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return round(value, 4) if isinstance(value, float) else value

    return rounded(summary)
