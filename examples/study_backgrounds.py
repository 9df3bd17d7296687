"""Which backgrounds should stand for all? Fidelity of maps from two states and from random ones, before any training.

For each backbone, removal operator and head: Fidelity+ AUC - Fidelity- AUC of the exact meta-attribution of two states
(Eq. 5) and of that sampled over random backgrounds (Eq. 3), for every distribution of coalitions, for labels with
removed pixels at zero or blurred in every second pair, for each kind of evidence, and for scores as they are, averaged
over a neighbourhood, or smoothed by the coalitions' own correlation, which turns the coefficients of least squares
into differences of conditional means. The same images and classes for all, so that differences are paired.

    python examples/study_backgrounds.py --output_file backgrounds.json --plot backgrounds.png \
        --case vit-tiny 8 1 'tiny_imagenet/test-*.parquet' \
        --case mobilenet_v2_1.0_224_imagenet 14 1 'photos/train-*.parquet'

Images are drawn from the end of the order whose beginning `tve-hf evaluate` takes. What was computed is kept.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from tve_hf import exact_meta_attribution, fidelity, sampled_meta_attribution, split_classifier, transfer
from tve_hf.benchmark.cells import Cells, digest
from tve_hf.classifiers import SplitClassifier
from tve_hf.coalitions import Coalitions
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import dumps
from tve_hf.patches import average_over_neighborhoods
from tve_hf.sources import open_images, read_image

REMOVALS = ("zero", "blur")
RULES = ("prob", "logit", "log_prob")
SOURCES: dict[str, Coalitions] = {
    "smooth 0.7": Coalitions("smooth", scale=0.7),
    "smooth 1.5": Coalitions("smooth", scale=1.5),
    "independent": Coalitions("independent"),
    "uniform": Coalitions("uniform"),
    "shapley": Coalitions("shapley"),
}
MIXED = "smooth 0.7, half blurred"


def correlation(how: Coalitions, grid: tuple[int, int]) -> Tensor:
    """Correlation of which patches are kept, (N, N), from 20,000 coalitions."""
    keep = how.draw(1, 20_000, grid, torch.Generator().manual_seed(0))[0].float()
    return torch.corrcoef(keep.T)


def meta_attributions(
    classifier: SplitClassifier, pixel_values: Tensor, grid_size: int, hops: int, num_samples: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Kept and removed, (B, N, D) each, by the name of the backgrounds."""
    found = {"two states": exact_meta_attribution(classifier, pixel_values, grid_size, hops)}
    for name, how in SOURCES.items():
        sampled = sampled_meta_attribution(classifier, pixel_values, grid_size, num_samples, how)
        found[name] = (sampled.kept, sampled.removed)
    how = SOURCES["smooth 0.7"]
    halves = [
        sampled_meta_attribution(
            classifier, pixel_values, grid_size, num_samples // 2, how, removal, torch.Generator().manual_seed(seed)
        )
        for seed, removal in enumerate(REMOVALS)
    ]
    kept, removed = (torch.stack([getattr(half, part) for half in halves]).mean(0) for part in ("kept", "removed"))
    return found | {MIXED: (kept, removed)}


@torch.no_grad()
def study(name: str, grid_size: int, hops: int, files: str, args: argparse.Namespace) -> dict[str, Tensor]:
    """Gaps (n,) by "backgrounds/evidence/averaging/removal"."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    classifier = split_classifier(name, dtype=dtype).to(memory_format=torch.channels_last)
    head = split_classifier(name, dtype=torch.float32)  # differences of embeddings have no digit to lose
    images = open_images([files])
    data: Any = images.data
    assert isinstance(data, Dataset)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).flip(0)
    data = data.select(order[: args.num_images].tolist())
    settings = {"weights": digest(classifier), "grid_size": grid_size, "hops": hops, "files": files}
    settings |= {"num_samples": args.num_samples, "num_levels": args.num_levels, "seed": args.seed}
    cells = Cells(args.cells / f"{Path(name).name}-{grid_size}", settings)
    grid = (grid_size, grid_size)
    smoothing = {name: correlation(how, grid) for name, how in SOURCES.items() if how.name == "smooth"}
    smoothing[MIXED] = smoothing["smooth 0.7"]

    def compute(rows: dict[str, list]) -> dict[str, Tensor]:
        decoded = [read_image(row) for row in rows[images.column]]
        pixel_values = classifier.image_processor(decoded, return_tensors="pt")["pixel_values"].to(dtype)
        class_idx = classifier.head(classifier.embed(pixel_values)).argmax(-1)
        found = {}
        pairs = meta_attributions(classifier, pixel_values, grid_size, hops, args.num_samples)
        for source, (kept, removed) in pairs.items():
            for rule in RULES:
                scores = transfer(kept.float(), removed.float(), head, class_idx, rule, grid_size)
                maps = {"as they are": scores, "one hop": average_over_neighborhoods(scores, grid, 1)}
                if source in smoothing:
                    maps["correlation"] = scores @ smoothing[source]
                for averaging, scores in maps.items():
                    for removal in REMOVALS:
                        judged = fidelity(classifier, pixel_values, scores, class_idx, args.num_levels, grid, removal)
                        found[f"{source}/{rule}/{averaging}/{removal}"] = judged.gap.float()
        return found

    starts = range(0, len(data), args.batch_size)
    parts = [
        cells.get(f"{start:06}", lambda start=start: compute(data[start : start + args.batch_size]))
        for start in tqdm(starts, desc=Path(name).name, unit="batch")
    ]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def summary(gaps: dict[str, Tensor]) -> dict[str, Any]:
    """Mean gap of every map under each removal operator, and how far it is from that of two states, with 95 %."""
    table: dict[str, Any] = {}
    for key, values in gaps.items():
        way, _, removal = key.rpartition("/")
        baseline = gaps[f"two states/logit/one hop/{removal}"]
        low, high = bootstrap_interval(values - baseline)
        table.setdefault(way, {})[removal] = {
            "gap": round(values.mean().item(), 4),
            "above_two_states": [round(low, 4), round(high, 4)],
        }
    return table


def draw(report: dict[str, Any], path: Path) -> None:
    """For every backbone the best map of each distribution, and the others of it in grey; zero against blur."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    cases = report["cases"]
    known = ["two states", *SOURCES, MIXED]
    rows = -(-len(cases) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 6.2 * rows), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, (title, table) in zip(axes.flat, cases.items(), strict=False):
        for number, source in enumerate(known):
            points = {
                way: [row[r]["gap"] for r in REMOVALS] for way, row in table.items() if way.split("/")[0] == source
            }
            axis.scatter(*zip(*points.values(), strict=True), s=12, color=f"C{number}", alpha=0.35)
            best = max(points, key=lambda way: sum(points[way]))
            label = f"{source}: {', '.join(best.split('/')[1:])}"
            axis.scatter(*points[best], s=60, color=f"C{number}", label=label)
        axis.set(title=title, xlabel="fidelity gap, zero", ylabel="fidelity gap, blur")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs=4, action="append", required=True, metavar=("CLASSIFIER", "P", "HOPS", "FILES")
    )
    parser.add_argument("--num_images", type=int, default=24)
    parser.add_argument("--num_samples", type=int, default=400, help="masked passes of each random distribution")
    parser.add_argument("--num_levels", type=int, default=8, help="levels of the fidelity curves")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="masked passes in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--cells", type=Path, default=Path("runs/backgrounds"), help="where what is computed is kept")
    args = parser.parse_args()

    report: dict[str, Any] = {
        name: getattr(args, name) for name in ("num_images", "num_samples", "num_levels", "bf16", "seed")
    } | {"cases": {}}
    for name, grid_size, hops, files in args.case:
        table = summary(study(name, int(grid_size), int(hops), files, args))
        title = f"{Path(name).name}, P={grid_size}"
        report["cases"][title] = table
        print(title)
        for way, row in sorted(table.items(), key=lambda item: -sum(cell["gap"] for cell in item[1].values())):
            print(f"  {way:52}", "  ".join(f"{removal} {cell['gap']:.3f}" for removal, cell in row.items()))
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    args.output_file.write_text(dumps(report, indent=1) + "\n")
    if args.plot:
        draw(report, args.plot)


if __name__ == "__main__":
    main()
