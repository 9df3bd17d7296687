"""What do masked passes of the backbone buy in training? Both forms of the explainer at equal passes.

For each number of unlabelled images an explainer of two backgrounds (Eq. 6) and one of random backgrounds (Eq. 3) are
trained, with 16 masked passes of each image, the same layers and the same number of steps. Fidelity+ AUC - Fidelity-
AUC of their maps, each under the default rule of its kind, on the same held-out images.

    python examples/study_passes.py --classifier vit-tiny --train_files 'tiny_imagenet/train-*.parquet' \
        --test_files 'tiny_imagenet/test-*.parquet' --output_dir runs/passes --output_file passes.json

Images to measure on are drawn from the end of the order whose beginning `tve-hf evaluate` takes. Interrupted, the same
command goes on.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from tve_hf import TVEExplainer, fidelity, methods, split_classifier
from tve_hf.attribution import rule_of
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.files import dumps
from tve_hf.pretrain import PretrainArguments, pretrain
from tve_hf.sources import open_images, read_image

PASSES = 16  # of each image: 8 patches, each alone and removed, or 16 coalitions
REMOVALS = ("zero", "blur")
FORMS: dict[str, dict[str, Any]] = {
    "antithetical": {"patches_per_image": PASSES // 2},
    "random": {"coalitions_per_image": PASSES},
}


@dataclass
class Arguments:
    classifier: str
    train_files: list[str]
    test_files: list[str]
    output_dir: str
    output_file: str
    plot: str | None = None
    numbers: list[int] = field(default_factory=lambda: [1250, 5000, 10000])
    grid_size: int = 8
    hops: int = 1
    hidden_size: int = 192
    num_hidden_layers: int = 4
    max_steps: int = 625
    batch_size: int = 64
    coalition_scale: float | None = field(
        default=None, metadata={"help": "Of random backgrounds: blur of the fields, in patches."}
    )
    num_images: int = 100
    seed: int = 0


def train(args: Arguments, form: str, number: int) -> Path:
    """Train one explainer on the first images of a random order, unless that was done, and return its folder."""
    output = Path(args.output_dir) / f"{form}-{number}"
    if (output / "model.safetensors").is_file():
        return output
    images = Path(args.output_dir) / f"images-{number}.parquet"
    if not images.is_file():
        data: Any = open_images(args.train_files).data
        images.parent.mkdir(parents=True, exist_ok=True)
        data.shuffle(seed=args.seed).select(range(number)).to_parquet(images)
    settings: dict[str, Any] = {
        name: getattr(args, name)
        for name in (
            "grid_size",
            "hops",
            "hidden_size",
            "num_hidden_layers",
            "max_steps",
            "batch_size",
            "coalition_scale",
            "seed",
        )
    } | FORMS[form]
    pretrain(
        PretrainArguments(
            args.classifier,
            str(output),
            train_files=[str(images)],
            backgrounds=form,
            cache_labels=True,
            normalize_labels=True,
            **settings,
        )
    )
    return output


@torch.no_grad()
def measure(args: Arguments, folder: Path) -> dict[str, list[float]]:
    """Gaps of held-out images by removal operator."""
    classifier = split_classifier(args.classifier, dtype=torch.float32)
    explainer = TVEExplainer.from_pretrained(folder, dtype=torch.float32).eval()
    images = open_images(args.test_files)
    data: Any = images.data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).flip(0)
    data = data.select(order[: args.num_images].tolist())
    gaps: dict[str, list[float]] = {removal: [] for removal in REMOVALS}
    for start in tqdm(range(0, len(data), 20), desc=folder.name, unit="batch"):
        decoded = [read_image(row) for row in data[start : start + 20][images.column]]
        pixel_values = classifier.image_processor(decoded, return_tensors="pt")["pixel_values"]
        class_idx = classifier(pixel_values).logits.argmax(-1)
        scores = methods.explain("tve", classifier, pixel_values, class_idx, explainer=explainer)
        for removal in REMOVALS:
            gaps[removal] += fidelity(classifier, pixel_values, scores, class_idx, removal=removal).gap.tolist()
    return gaps


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Gap with its interval against masked passes, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(REMOVALS), figsize=(9, 3.6))
    for axis, removal in zip(axes, REMOVALS, strict=True):
        for form, colour in zip(FORMS, ("#0072b2", "#d55e00"), strict=True):
            own = [row for row in rows if row["backgrounds"] == form]
            passes, gaps = [row["passes"] for row in own], [row[removal]["gap"] for row in own]
            error = [
                [abs(gap - end) for gap, end in zip(gaps, ends, strict=True)]
                for ends in zip(*(row[removal]["interval"] for row in own), strict=True)
            ]
            axis.errorbar(passes, gaps, error, marker="o", capsize=3, color=colour, label=f"{form} backgrounds")
        numbers = sorted({row["passes"] for row in rows})
        axis.set(
            xscale="log", xlabel="masked passes in training", ylabel="fidelity gap", title=removal, ylim=(0, None)
        )
        axis.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axis.minorticks_off()
    axes[0].legend(loc="center")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    rows = []
    for number in args.numbers:
        for form in FORMS:
            folder = train(args, form, number)
            cell = folder / "gaps.json"
            if not cell.is_file():
                cell.write_text(json.dumps(measure(args, folder)))
            gaps = {name: torch.tensor(values) for name, values in json.loads(cell.read_text()).items()}
            row: dict[str, Any] = {"backgrounds": form, "images": number, "passes": number * PASSES}
            row["rule"] = rule_of(TVEExplainer.from_pretrained(folder).config)
            for removal, values in gaps.items():
                interval = [round(end, 4) for end in bootstrap_interval(values)]
                row[removal] = {"gap": round(values.mean().item(), 4), "interval": interval}
            rows.append(row)
            print(row)
    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", "output_file", "plot")}
    path = Path(args.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    if args.plot:
        draw(rows, Path(args.plot))


if __name__ == "__main__":
    main()
