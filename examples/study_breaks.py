"""Where maps break, and whether `verify` says so: one explainer on images that are spoilt more and more.

    python examples/study_breaks.py --classifier tve_hf/checkpoints/mobilenet-v2-tiny-imagenet \
        --model tve_hf/checkpoints/tve-mobilenet-v2-tiny-imagenet --files 'imagenette/test-*.parquet' \
        --output_dir runs/breaks --plot

Every photograph is blurred, made noisy or shrunk before the image processor sees it, and goes through the pipeline
with `verify`, for the class that is predicted then. Its map is judged by the fidelity gap, Fidelity+ AUC less
Fidelity- AUC, beside that of noise, the floor, and of `sampled` with many masked passes, the ceiling.

`verify` gives a number and no verdict. A map is called trusted here where that number is at least what the package
asks of an explainer, `compatibility.LEAST`: an R2 of the class's logit over random coalitions, or, for explainers of
two backgrounds, a Spearman with the exact scores of random patches.

`report.json` has all values, and a summary of [value, low, high], with 95 % bootstrap intervals in which an image is
drawn with all that was done to it; one is "nan" where some draws have no image of a kind, which are too few to say.
Started again, the command goes on where it was.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm.auto import tqdm

from tve_hf import TransferableAttributionPipeline, TVEExplainer, fidelity, methods, split_classifier
from tve_hf.attribution import rule_of
from tve_hf.benchmark.cells import Cells, digest
from tve_hf.classifiers.compiled import with_compiled_passes
from tve_hf.classifiers.layout import with_channels_last
from tve_hf.coalitions import check_number
from tve_hf.compatibility import LEAST
from tve_hf.evaluation.report import rounded
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import dumps, write_whole
from tve_hf.sources import open_images, read_image, sample_images
from tve_hf.verification import pearson, spearman

REMOVALS = ["zero", "blur"]
BATCH = 20
SAMPLES = 2000  # of a bootstrap
LOWEST = -1.0  # R2 in the figure; there is no bound to how bad a map can be
# What `verify` says of a map of each kind of explainer, and below what it is not trusted.
CHECKS = {"random": ("r2", LEAST["logit_r2"]), "antithetical": ("spearman", LEAST["spearman"])}


def clean(image: Image.Image, row: int) -> Image.Image:
    return image


def blurred(image: Image.Image, row: int, share: float) -> Image.Image:
    """A Gaussian whose deviation is this share of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))


def noisy(image: Image.Image, row: int, deviation: float) -> Image.Image:
    """Normal noise in each value, its deviation a share of the range; drawn by the row, so the same in every run."""
    noise = np.random.default_rng(row).standard_normal((image.height, image.width, 3))
    pixels = np.asarray(image) + 255 * deviation * noise
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def shrunk(image: Image.Image, row: int, factor: int) -> Image.Image:
    """As a photograph of fewer pixels looks, in as many as before."""
    small = [max(1, round(side / factor)) for side in image.size]
    return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


# Each takes an image and which row of the files it is.
CONDITIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "clean": clean,
    **{f"blur_{share}": partial(blurred, share=share) for share in (0.01, 0.02, 0.04)},
    **{f"noise_{deviation}": partial(noisy, deviation=deviation) for deviation in (0.1, 0.2, 0.4)},
    **{f"shrunk_{factor}": partial(shrunk, factor=factor) for factor in (2, 4, 8)},
}
COLOURS = {"clean": "Greys", "blur": "Blues", "noise": "Oranges", "shrunk": "Greens"}  # of matplotlib


@torch.no_grad()
def judged(
    explain: TransferableAttributionPipeline, images: list[Image.Image], ceiling_samples: int, seed: int
) -> dict[str, Tensor]:
    """What the pipeline says of some images, and how faithful its maps are, (B,) each.

    Returns:
        `class_idx` and `score` of the prediction; what `verify` says; `gap/REMOVAL/METHOD`; and `sampled_spearman`,
        the rank correlation of the map with that of `sampled`, where there is one.
    """
    classifier, config = explain.classifier, explain.model.config
    results: list[Any] = [result for (result,) in explain(images, batch_size=len(images))]
    found = {
        name: torch.tensor([result["verification"][name] for result in results])
        for name in (CHECKS[config.backgrounds][0], "pearson")
    }
    found = {name: values.nan_to_num() for name, values in found.items()}  # a constant map foretells nothing
    found["score"] = torch.tensor([result["score"] for result in results])
    found["class_idx"] = class_idx = torch.tensor([result["class_idx"] for result in results])
    pixel_values = explain.image_processor(images, return_tensors="pt")["pixel_values"]
    asked: Any = classifier, pixel_values, class_idx, config.grid_shape
    generator = torch.Generator().manual_seed(seed)
    maps = {
        "tve": torch.stack([torch.from_numpy(result["attribution"]) for result in results]),
        "random": methods.explain("random", *asked, generator=generator),
    }
    if ceiling_samples:
        how: Any = {"n_samples": ceiling_samples, "hops": config.hops}
        if config.backgrounds == "random":  # the means that the explainer learnt to predict
            how |= {"coalitions": config.distribution, "rule": rule_of(config)}
        maps["sampled"] = methods.explain("sampled", *asked, **how)
        own, sampled = (maps[name].flatten(1) for name in ("tve", "sampled"))
        found["sampled_spearman"] = spearman(own, sampled).nan_to_num()
    for spec, scores in maps.items():
        for removal in REMOVALS:
            found[f"gap/{removal}/{spec}"] = fidelity(
                classifier, pixel_values, scores, class_idx, removal=removal
            ).gap.clone()
    return found


mean = partial(torch.mean, dim=1)
median = partial(torch.quantile, q=0.5, dim=1)


def estimate(statistic: Callable[..., Tensor], *tables: Tensor) -> list[float]:
    """A statistic and both ends of its interval.

    Args:
        statistic: of values (rows, m), one argument for each table -> (rows,).
        tables: (conditions, images); an image is drawn with all its conditions.
    """

    def of(rows: Tensor) -> Tensor:
        return statistic(*(table[:, rows.long()].transpose(0, 1).flatten(1) for table in tables))

    images = torch.arange(tables[0].shape[1], dtype=torch.float64)
    return [of(images[None]).item(), *bootstrap_interval(images, SAMPLES, statistic=of)]


def mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of those that are chosen, by ones among zeros; NaN if none is."""
    return (values * chosen).sum(1) / chosen.sum(1)


def difference(values: Tensor, chosen: Tensor) -> Tensor:
    return mean_of(values, chosen) - mean_of(values, 1 - chosen)


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman of each row; as `verification.spearman`, whose memory would grow with the square of the images."""

    def ranks(values: Tensor) -> Tensor:
        ordered = values.sort(1).values
        return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double()

    return pearson(ranks(one.contiguous()), ranks(other.contiguous())).double()


def summarize(tables: dict[str, Tensor], conditions: list[str], check: str, least: float) -> dict[str, Any]:
    """Reduce values (conditions, images) to [value, low, high] of each condition and of `all`.

    Returns:
        Means of `gap`, `score` and `sampled_spearman`, medians of `verify`, and the share `trusted`. Over all:
        `trust`, mean gaps of the maps that are trusted, of the others, and their difference. `relation`: rank
        correlations of gaps with what may foretell them. `shortfall` is the gap of `sampled` less that of `tve`.
    """
    trusted = (tables[check] >= least).double()
    some = {name: slice(i, i + 1) for i, name in enumerate(conditions)} | {"all": slice(None)}

    def of_each(statistic: Callable[..., Tensor], *values: Tensor) -> dict[str, list[float]]:
        return {name: estimate(statistic, *(table[rows] for table in values)) for name, rows in some.items()}

    def of_both(gaps: Tensor) -> dict[str, list[float]]:
        groups = {"trusted": (mean_of, trusted), "not trusted": (mean_of, 1 - trusted)}
        groups["difference"] = (difference, trusted)
        return {name: estimate(statistic, gaps, chosen) for name, (statistic, chosen) in groups.items()}

    gaps: dict[str, dict[str, Tensor]] = {removal: {} for removal in REMOVALS}
    for key in [key for key in tables if key.startswith("gap/")]:
        _, removal, spec = key.split("/")
        gaps[removal][spec] = tables[key]
    for own in gaps.values():
        if "sampled" in own:
            own["shortfall"] = own["sampled"] - own["tve"]
    signs = [name for name in (check, "pearson", "sampled_spearman", "score") if name in tables]
    return {
        "check": {"measure": check, "least": least},
        "verify": {name: of_each(median, tables[name]) for name in (check, "pearson")},
        "trusted": of_each(mean, trusted),
        **{name: of_each(mean, tables[name]) for name in ("score", "sampled_spearman") if name in tables},
        "gap": {
            removal: {spec: of_each(mean, values) for spec, values in own.items()} for removal, own in gaps.items()
        },
        "trust": {removal: {spec: of_both(values) for spec, values in own.items()} for removal, own in gaps.items()},
        "relation": {
            removal: {
                spec: {
                    name: {sign: estimate(rank_correlation, tables[sign][rows], own[spec][rows]) for sign in signs}
                    for name, rows in some.items()
                }
                for spec in ("tve", "shortfall")
                if spec in own
            }
            for removal, own in gaps.items()
        },
    }


def draw(tables: dict[str, Tensor], conditions: list[str], summary: dict[str, Any], path: Path) -> None:
    """Gap of each map against what `verify` says of it, and the mean of those that it trusts and of the others."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    families = [name.partition("_")[0] for name in conditions]
    colours = [
        matplotlib.colormaps[COLOURS[family]](0.95 if family == "clean" else 0.4 + 0.25 * families[:i].count(family))
        for i, family in enumerate(families)
    ]
    check, least = summary["check"].values()
    x = tables[check].clamp(min=LOWEST)
    is_trusted = tables[check] >= least
    figure, axes = plt.subplots(1, len(REMOVALS), figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, removal in zip(axes, REMOVALS, strict=True):
        gaps = tables[f"gap/{removal}/tve"]
        for i, colour in enumerate(colours):
            for marker, chosen in (("o", is_trusted[i]), ("x", ~is_trusted[i])):
                axis.scatter(x[i, chosen], gaps[i, chosen], s=14, color=colour, marker=marker, linewidths=0.8)
        axis.axvline(least, color="black", linewidth=0.8, linestyle=":")
        means = summary["trust"][removal]["tve"]
        for name, ends in (("not trusted", (x.min(), least)), ("trusted", (least, x.max()))):
            axis.hlines(means[name][0], *map(float, ends), color="black", linewidth=2)
        told = ", ".join(
            f"{name} {means[name][0]:.3f}" for name in ("trusted", "not trusted") if isfinite(means[name][0])
        )
        axis.set_title(f"removed pixels: {removal}; means: {told}", fontsize=9)
        clipped = f", {LOWEST:g} and below at {LOWEST:g}" if (tables[check] < LOWEST).any() else ""
        axis.set(xlabel=f"{'R²' if check == 'r2' else check} of verify{clipped}")
    axes[0].set(ylabel="fidelity gap of the map")
    marks = [Line2D([], [], linestyle="", marker="o", color=colour) for colour in colours]
    marks += [Line2D([], [], linestyle="", marker=marker, color="grey") for marker in "ox"]
    marks += [Line2D([], [], color="black", linewidth=2), Line2D([], [], color="black", linewidth=0.8, linestyle=":")]
    labels = [*conditions, "trusted", "not trusted", "means of both", f"threshold, {least:g}"]
    figure.legend(marks, labels, loc="outside right center", fontsize=8)
    write_whole(path, lambda place: figure.savefig(place, dpi=110))
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--model", required=True, help="explainer of its backbone")
    parser.add_argument("--files", required=True, nargs="+", help="held-out images; labels are not read")
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS))
    parser.add_argument("--verify", type=int, default=64, help="as for the pipeline")
    parser.add_argument("--ceiling_samples", type=int, default=200, help="masked passes of `sampled`; 0 leaves it out")
    parser.add_argument("--num_images", type=int, default=100, help="for each condition, the same ones")
    parser.add_argument("--torch_compile", action="store_true", help="compile the passes of masked images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--plot", action="store_true", help="draw gaps.png beside the report")
    args = parser.parse_args(arguments)

    try:
        if args.ceiling_samples:
            check_number(args.ceiling_samples, "ceiling_samples")
        explainer = TVEExplainer.from_pretrained(args.model, dtype=torch.float32).eval()
        classifier = with_channels_last(split_classifier(args.classifier, dtype=torch.float32))
        classifier = with_compiled_passes(classifier) if args.torch_compile else classifier
        explain = TransferableAttributionPipeline(explainer, classifier, device="cpu", verify=args.verify)
        images, rows = sample_images(open_images(args.files), args.num_images, args.seed)
        settings = {"digests": [digest(part) for part in (classifier, explainer)]}
        settings |= {name: getattr(args, name) for name in ("files", "seed", "verify")}
        cells = Cells(args.output_dir / "cells", settings)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    data: Any = images.data

    def compute(condition: str, start: int, stop: int) -> dict[str, Tensor]:
        decoded = [read_image(image) for image in data[start:stop][images.column]]
        spoilt = [CONDITIONS[condition](image, row) for image, row in zip(decoded, rows[start:stop], strict=True)]
        return judged(explain, spoilt, args.ceiling_samples, args.seed + start)

    conditions = list(dict.fromkeys(args.conditions))
    parts: dict[str, list[list[Tensor]]] = {}
    for condition in tqdm(conditions, unit="condition"):
        for start in range(0, len(rows), BATCH):
            stop = min(start + BATCH, len(rows))
            key = f"{condition}/ceiling={args.ceiling_samples}/{start:06}-{stop:06}"
            for name, values in cells.get(key, partial(compute, condition, start, stop)).items():
                parts.setdefault(name, [[] for _ in conditions])[conditions.index(condition)].append(values)
    tables = {name: torch.stack([torch.cat(row) for row in of]).double() for name, of in parts.items()}
    summary = rounded(summarize(tables, conditions, *CHECKS[explainer.config.backgrounds]))
    report = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "num_images": len(rows),
        "rows": rows,
        "summary": summary,
        "per_image": {
            condition: {name: [round(value, 4) for value in values[i].tolist()] for name, values in tables.items()}
            for i, condition in enumerate(conditions)
        },
    }
    write_whole(args.output_dir / "report.json", lambda path: path.write_text(dumps(report, indent=1) + "\n"))
    if args.plot:
        draw(tables, conditions, summary, args.output_dir / "gaps.png")
    print(dumps({name: summary[name] for name in ("trusted", "trust")}, indent=1))


if __name__ == "__main__":
    main()
