"""What does fidelity cost beside the classifier's own passes?

For each batch of images, in turn: the bare passes that both curves need, on images masked before the clock starts, and
`tve_hf.fidelity` on the same ones. Prints the ratio of the two times as JSON. Take one near 1 to mean that masks and
ranking are free; the first batch warms up and does not count.

    python benchmarks/fidelity.py CLASSIFIER --files 'images/*.parquet'

Noise takes the place of images where no files are given: the cost is the same.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tve_hf import SplitClassifier, fidelity, split_classifier
from tve_hf.images import load_image
from tve_hf.patches import as_pair, mask_patches


def batches(classifier: SplitClassifier, files: str | None, num_images: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of pixel_values, on the classifier's device, one more than asked for."""
    starts = range(0, num_images, batch_size)
    sizes = [batch_size, *(min(batch_size, num_images - start) for start in starts)]
    if files is None:
        generator = torch.Generator().manual_seed(0)
        for size in sizes:
            noise = torch.randn(size, *classifier.probe().shape[1:], generator=generator)
            yield noise.to(classifier.device, classifier.dtype)
        return
    from datasets import Image, load_dataset

    rows = load_dataset("parquet", data_files=files, split="train").cast_column("image", Image(decode=False))
    for index, size in enumerate(sizes):
        images = [load_image(rows[(index * batch_size + i) % len(rows)]["image"]) for i in range(size)]
        pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
        yield pixel_values.to(classifier.device, classifier.dtype)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, work queued on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", help="name or folder")
    parser.add_argument("--files", help="parquet files of images")
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--num_levels", type=int, default=14)
    parser.add_argument("--grid_size", type=int, nargs="+", default=[14])
    parser.add_argument("--removal", default="zero")
    parser.add_argument("--chunk_size", type=int, help="images in one pass; that of the package by default")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    grid = as_pair(args.grid_size[0] if len(args.grid_size) == 1 else args.grid_size)
    classifier = split_classifier(args.classifier, dtype=torch.float32).to(args.device)
    model, device = classifier.backbone.model, classifier.device
    generator = torch.Generator().manual_seed(0)
    # f(Z), f of the empty image, and K - 2 levels of either curve.
    passes_per_image = 2 * args.num_levels - 2
    bare, ours = [], []
    for pixel_values in batches(classifier, args.files, args.num_images, args.batch_size):
        scores = torch.randn(len(pixel_values), *grid, generator=generator).to(device)
        class_idx = classifier(pixel_values).logits.argmax(-1)
        chunk_size = classifier.images_per_pass(pixel_values, args.chunk_size)
        # As many images in each bare pass as `embed_masked` takes: whole images, or even parts of one.
        parts = math.ceil(passes_per_image / chunk_size)
        per_pass = max(1, chunk_size // passes_per_image) * math.ceil(passes_per_image / parts)
        # Of all sizes, as on the curves.
        share = torch.linspace(0, 1, passes_per_image).view(1, -1, 1)
        keep = torch.rand(len(pixel_values), passes_per_image, grid[0] * grid[1], generator=generator) < share
        masked = mask_patches(pixel_values, keep.to(device), grid, args.removal).flatten(0, 1).split(per_pass)

        def run_bare(masked: tuple[Tensor, ...] = masked) -> None:
            for part in masked:
                model(part)

        def run_ours(
            pixel_values: Tensor = pixel_values,
            scores: Tensor = scores,
            class_idx: Tensor = class_idx,
            chunk_size: int = chunk_size,
        ) -> None:
            options = {"removal": args.removal, "chunk_size": chunk_size}
            fidelity(classifier, pixel_values, scores, class_idx, args.num_levels, **options)

        # Turn by turn, and who goes first too, since other work on the machine comes and goes.
        order = [(bare, run_bare), (ours, run_ours)]
        for seconds, run in order if len(bare) % 2 else reversed(order):
            seconds.append(timed(run, device))
    ratios = [one / other for one, other in zip(ours[1:], bare[1:], strict=True)]
    report = vars(args) | {
        "passes_per_image": passes_per_image,
        "bare_seconds": round(sum(bare[1:]), 4),
        "fidelity_seconds": round(sum(ours[1:]), 4),
        "ratio": round(sum(ours[1:]) / sum(bare[1:]), 4),
        "median_ratio_of_batches": round(statistics.median(ratios), 4),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
