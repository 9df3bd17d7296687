"""The two antithetical states against sampled backgrounds: Eq. 5 beside Eq. 3, with 16 and with 32 samples.

For every image, the attribution of the predicted class on all its patches, or on some drawn at random, by two states
and by the mean over sampled backgrounds. If the two grow together, two states may stand for all. The smaller samples
are the first of the largest, so that 16 and 32 cost 32: 2 * 32 + 2 passes a patch.

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
from torch import Tensor
from tqdm.auto import tqdm

from tve_hf import SplitClassifier, exact_meta_attribution, split_classifier, transfer
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.images import load_image
from tve_hf.methods.exact_sampled import sampled_attribution
from tve_hf.patches import GridSize, as_pair, sample_patches
from tve_hf.verification import pearson, spearman


@torch.no_grad()
def compare(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    grid_size: GridSize,
    hops: int,
    n_samples: list[int],
    num_patches: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Attribute one image's predicted class, by Eq. 5 and by Eq. 3 with each number of samples; nats, (k,) each."""
    rows, columns = grid = as_pair(grid_size)
    class_idx = classifier(pixel_values).logits.argmax(-1)
    patch_idx = sample_patches(1, rows * columns, num_patches or rows * columns, generator).sort().values
    kept, removed = exact_meta_attribution(classifier, pixel_values, grid, hops, patch_idx)
    two_states = transfer(kept, removed, classifier, class_idx, rule="log_prob")
    total, drawn, sampled = torch.zeros_like(two_states), 0, {}
    for n in sorted(set(n_samples)):
        more = n - drawn
        total += more * sampled_attribution(
            classifier, pixel_values, class_idx, grid, patch_idx, hops, more, generator
        )
        sampled[n], drawn = (total / n)[0], n
    return two_states[0], sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--files", required=True)
    parser.add_argument("--grid_size", type=int, required=True)
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--n_samples", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--num_patches", type=int, help="patches of each image, drawn at random; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()

    classifier = split_classifier(args.classifier, dtype=torch.float32)
    data = load_dataset("parquet", data_files=args.files, split="train").cast_column("image", Image(decode=False))
    data = data.shuffle(seed=args.seed).select(range(min(args.num_images, len(data))))  # it may be sorted by class
    generator = torch.Generator().manual_seed(args.seed)
    pairs: dict[int, list[Tensor]] = {n: [] for n in args.n_samples}
    for row in tqdm(data, unit="image"):
        pixel_values = classifier.image_processor(load_image(row["image"]), return_tensors="pt")["pixel_values"]
        two_states, sampled = compare(
            classifier, pixel_values, args.grid_size, args.hops, args.n_samples, args.num_patches, generator
        )
        for n, values in sampled.items():
            pairs[n].append(torch.stack([two_states, values]))

    report = {
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "num_images": len(data),
        "found": {},
        "per_image": {},
    }
    figure = Figure(figsize=(4.6 * len(pairs), 4.2))
    for axis, (n, parts) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True):
        one, other = torch.stack(parts, dim=1)  # (images, patches) each
        found, per_image = {}, {}
        for name, correlation in (("pearson", pearson), ("spearman", spearman)):
            values = correlation(one, other).double()
            low, high = bootstrap_interval(values)
            found[name] = {"mean": round(values.mean().item(), 4), "interval": [round(low, 4), round(high, 4)]}
            per_image[name] = [round(value, 4) for value in values.tolist()]
        report["found"][str(n)], report["per_image"][str(n)] = found, per_image
        axis.scatter(one.flatten(), other.flatten(), s=2, alpha=0.2, linewidths=0)
        axis.set_xlabel("Eq. 5, two states, nats")
        axis.set_ylabel(f"Eq. 3, {n} sampled backgrounds, nats")
        axis.set_title(f"mean correlation of an image's patches {found['pearson']['mean']:.2f}", fontsize=10)
        axis.grid(alpha=0.3)
    for path in (args.output_file, args.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(args.plot, dpi=120, bbox_inches="tight")
    args.output_file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["found"], indent=1))


if __name__ == "__main__":
    main()
