"""Which rule should turn meta-attributions into scores? Fidelity of every rule, exact and predicted.

For each backbone, held-out images and removal operator: Fidelity+ AUC - Fidelity- AUC of every rule in
`tve_hf.RULES`, on the exact meta-attribution, and on the predicted one where there is an explainer. The same images
and classes for all, so that differences are paired. The winner is the signed rule that on average keeps most of the
best rule's gap.

    python examples/study_rules.py --output_file rules.json \
        --case vit-tiny 8 1 'tiny_imagenet/test-*.parquet' tve-vit-tiny \
        --case mobilenet_v1_0.5_160_imagenet 10 1 'imagenet_samples/test-*.parquet' none
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Image, load_dataset
from tqdm.auto import tqdm

from tve_hf import RULES, TVEExplainer, exact_meta_attribution, fidelity, split_classifier, transfer
from tve_hf.benchmark.cells import Cells, digest
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.images import load_image

REMOVALS = ("zero", "blur")


@torch.no_grad()
def study(name: str, grid_size: int, hops: int, files: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Gaps (n,) of every source ("exact", "predicted"), rule and removal operator."""
    classifier = split_classifier(name, dtype=torch.float32)
    explainer = None if model == "none" else TVEExplainer.from_pretrained(model, dtype=torch.float32).eval()
    data = load_dataset("parquet", data_files=files, split="train").cast_column("image", Image(decode=False))
    # Spread over the file: some sets are in the order of their labels.
    data = data.select(range(0, len(data), max(1, len(data) // args.num_images))).select(range(args.num_images))
    models = [classifier, *([explainer] if explainer else [])]
    settings = {"weights": digest(*models), "grid_size": grid_size, "hops": hops, "files": files, "rules": [*RULES]}
    cells = Cells(args.cells / f"{Path(name).name}-{args.num_images}", settings)

    def compute(rows: dict[str, list]) -> dict[str, torch.Tensor]:
        images = [load_image(row) for row in rows["image"]]
        pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
        seen = classifier(pixel_values)
        class_idx = seen.logits.argmax(-1)
        sources = {"exact": exact_meta_attribution(classifier, pixel_values, grid_size, hops)}
        if explainer is not None:
            predicted = explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
            sources["predicted"] = (predicted.kept, predicted.removed)
        found = {}
        for source, (kept, removed) in sources.items():
            for rule in RULES:
                scores = transfer(kept, removed, classifier, class_idx, rule, grid_size, hops)
                for removal in REMOVALS:
                    judged = fidelity(classifier, pixel_values, scores, class_idx, removal=removal)
                    found[f"{source}/{rule}/{removal}"] = judged.gap
        return found

    starts = range(0, len(data), args.batch_size)
    parts = [
        cells.get(f"{start:06}", lambda start=start: compute(data[start : start + args.batch_size]))
        for start in tqdm(starts, desc=Path(name).name, unit="batch")
    ]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=5, action="append", metavar=("CLASSIFIER", "P", "HOPS", "FILES", "EXPLAINER"))
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--cells", type=Path, default=Path("runs/rules"), help="where what is computed is kept")
    args = parser.parse_args()

    report: dict[str, Any] = {"num_images": args.num_images, "cases": {}}
    ranks: dict[str, list[float]] = {rule: [] for rule in RULES}
    for name, grid_size, hops, files, model in args.case:
        gaps = study(name, int(grid_size), int(hops), files, model, args)
        title = f"{Path(name).name}, P={grid_size}, hops={hops}"
        table: dict[str, Any] = {}
        columns = sorted({key.split("/")[0] + "/" + key.split("/")[2] for key in gaps})
        for column in columns:
            source, removal = column.split("/")
            best = max(gaps[f"{source}/{rule}/{removal}"].mean().item() for rule in RULES)
            for rule in RULES:
                values = gaps[f"{source}/{rule}/{removal}"]
                mean = values.mean().item()
                low, high = bootstrap_interval(values - gaps[f"{source}/log_prob/{removal}"])
                table.setdefault(rule, {})[column] = {
                    "gap": round(mean, 4),
                    "standard_error": round(values.std().item() / math.sqrt(len(values)), 4),
                    "above_log_prob": [round(low, 4), round(high, 4)],
                }
                # How much of the best rule's gap a rule keeps, whatever the scale of the case.
                ranks[rule].append(mean / best)
        report["cases"][title] = table
        print(title)
        for rule, row in table.items():
            print(f"  {rule:28}", "  ".join(f"{column} {cell['gap']:.3f}" for column, cell in row.items()))
    report["mean_share_of_best"] = {rule: round(sum(shares) / len(shares), 4) for rule, shares in ranks.items()}
    report["worst_share_of_best"] = {rule: round(min(shares), 4) for rule, shares in ranks.items()}
    # Scores are to be signed and in units, so that 0 means no support: a scaled map says only which patch is above the
    # average of its own image, and half a map has no zero.
    signed = [name for name, rule in RULES.items() if rule.kept and not rule.standardized]
    report["winner"] = max(signed, key=report["mean_share_of_best"].get)
    print(json.dumps({key: report[key] for key in ("mean_share_of_best", "worst_share_of_best", "winner")}, indent=1))
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    args.output_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
