"""What do masked images take when their passes are compiled, beside the same passes as they were written? Prints JSON.

    python benchmarks/compiled.py [classifier ...] [--num_masks 100] [--repeats 9]

One image of noise, masked in so many ways, by one thread, in the layout in memory that evaluations use. Both take
turns, and every other round goes backwards; a ratio is that of the seconds of one round. Compiling is in no round.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from tve_hf import SplitClassifier, split_classifier
from tve_hf.classifiers.compiled import with_compiled_passes
from tve_hf.classifiers.layout import with_channels_last
from tve_hf.released import CHECKPOINTS

SHIPPED = [str(CHECKPOINTS / name) for name in ("mobilenet-v2-tiny-imagenet", "vit-tiny-tiny-imagenet")]


@torch.no_grad()
def measured(classifier: SplitClassifier, num_masks: int, repeats: int) -> dict[str, Any]:
    """The ratios of all rounds, and their median."""
    both = [classifier, with_compiled_passes(classifier)]
    images = classifier.probe()[:1]
    grid = classifier.default_grid(images)
    keep = torch.rand(1, num_masks, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.5
    seconds: list[list[float]] = [[], []]
    for turn in range(-1, repeats):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            both[which].embed_masked(images, keep, grid)
            if turn >= 0:  # the first round compiles what a last, smaller batch needs
                seconds[which].append(time.perf_counter() - start)
    ratios = [round(compiled / plain, 3) for plain, compiled in zip(*seconds, strict=True)]
    return {"image_size": list(images.shape[-2:]), "ratio": statistics.median(ratios), "ratios": ratios}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "classifiers", nargs="*", default=SHIPPED, help="names or folders; by default the shipped ones"
    )
    parser.add_argument("--num_masks", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {}
    for name in args.classifiers:
        classifier = with_channels_last(split_classifier(name, dtype=torch.float32))
        found[classifier.name.rsplit("/", 1)[-1]] = measured(classifier, args.num_masks, args.repeats)
    print(json.dumps({"num_masks": args.num_masks, "measured": found}, indent=1))


if __name__ == "__main__":
    main()
