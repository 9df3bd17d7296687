"""The two antithetical states against sampled backgrounds: Eq. 5 beside Eq. 3, with 16 and with 32 samples.

For every image, the exact attribution of the predicted class on all patches, and the same with sampled backgrounds
(`exact_sampled`). If the two grow together, two states may stand for all.

    python examples/study_sampling.py --classifier vit-tiny --files 'tiny_imagenet/test-*.parquet' --grid_size 8 \
        --hops 1 --num_images 100 --output_file sampling.json --plot sampling.png
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Image, load_dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from tve_hf import methods, split_classifier
from tve_hf.comparison import bootstrap_interval, pearson, spearman
from tve_hf.images import load_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--files", required=True)
    parser.add_argument("--grid_size", type=int, required=True)
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--n_samples", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()

    classifier = split_classifier(args.classifier, dtype=torch.float32)
    data = load_dataset("parquet", data_files=args.files, split="train").cast_column("image", Image(decode=False))
    data = data.select(range(0, len(data), max(1, len(data) // args.num_images))).select(range(args.num_images))
    pairs: dict[int, list[torch.Tensor]] = {n: [] for n in args.n_samples}
    shared = {"grid_size": args.grid_size, "hops": args.hops}
    for start in tqdm(range(0, len(data), 10), unit="batch"):
        images = [load_image(row) for row in data[start : start + 10]["image"]]
        pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            class_idx = classifier(pixel_values).logits.argmax(-1)
        two_states = methods.explain("exact", classifier, pixel_values, class_idx, rule="log_prob", **shared)
        for n in args.n_samples:
            sampled = methods.explain(
                "exact_sampled",
                classifier,
                pixel_values,
                class_idx,
                n_samples=n,
                generator=torch.Generator().manual_seed(args.seed + start),
                **shared,
            )
            pairs[n].append(torch.stack([two_states.flatten(1), sampled.flatten(1)]))

    report = {
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "num_images": len(data),
        "found": {},
    }
    figure = Figure(figsize=(4.6 * len(pairs), 4.2))
    for axis, (n, parts) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True):
        one, other = torch.cat(parts, dim=1)
        found = {}
        for name, correlation in (("pearson", pearson), ("spearman", spearman)):
            values = correlation(one, other).double()
            low, high = bootstrap_interval(values)
            found[name] = {"mean": round(values.mean().item(), 4), "interval": [round(low, 4), round(high, 4)]}
        report["found"][str(n)] = found
        axis.scatter(one.flatten(), other.flatten(), s=2, alpha=0.2, linewidths=0)
        axis.set_xlabel("Eq. 5, two states, nats")
        axis.set_ylabel(f"Eq. 3, {n} sampled backgrounds, nats")
        axis.set_title(f"mean correlation of an image's patches {found['pearson']['mean']:.2f}", fontsize=10)
        axis.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_figure(args.plot, dpi=120, bbox_inches="tight")
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    args.output_file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["found"], indent=1))


if __name__ == "__main__":
    main()
