"""How many photographs a second `tve-hf explain` explains, beside the pipeline alone, in one run on one machine.

    python benchmarks/explain_rate.py [IMAGE ...] [--repeats 5] [--batch_size 16] [--output_file rate.json]

With no image, 128 of noise, which compress badly. Rows take turns, every other round backwards; loading counts for none:

- `pipeline`: `explainer(files, batch_size=...)`, of which no picture is drawn;
- `pipeline, drawn`: and every figure drawn; `pipeline, saved`: and written as the command writes them;
- `command`: `tve-hf explain FILES`, figures; `command, plain`: with `--plain`.

`of_pipeline` has the median over the rounds of each row's rate as a share of the pipeline's, and the quartiles.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

import tve_hf  # noqa: F401  (registers the task)
from tve_hf.cli import explain as command
from tve_hf.cli.allocator import keep_freed_memory
from tve_hf.cli.explain import PictureRun
from tve_hf.cli.options import options_of


def noise(folder: Path, number: int) -> list[str]:
    """JPEG files of noise, (340, 256) pixels."""
    generator = np.random.default_rng(0)
    files = [folder / f"{index:04}.jpg" for index in range(number)]
    for file in files:
        Image.fromarray(generator.integers(0, 256, (256, 340, 3), np.uint8)).save(file)
    return [str(file) for file in files]


def rates(files: list[str], batch_size: int, repeats: int, folder: Path) -> dict[str, list[float]]:
    """Images a second of every row in every round; a first round warms up and does not count."""
    keep_freed_memory()
    explainer = pipeline("transferable-attribution")

    def run(number: int, *options: str) -> None:
        arguments = [*files, "--batch-size", str(batch_size), "--output", str(folder / f"out-{number}"), *options]
        PictureRun(options_of(command).parse_args([*arguments, "--quiet"])).go(explainer)

    def drawn(save: bool) -> None:
        for begin in range(0, len(files), batch_size):
            for index, (explanation,) in enumerate(explainer(files[begin : begin + batch_size], batch_size=batch_size)):
                figure = explanation["figure"]
                if save:
                    figure.save(folder / f"{index}.png", compress_level=1)

    rows: dict[str, Callable[[], Any]] = {
        "pipeline": lambda: explainer(files, batch_size=batch_size),
        "pipeline, drawn": lambda: drawn(False),
        "pipeline, saved": lambda: drawn(True),
        "command": lambda: run(0),
        "command, plain": lambda: run(1, "--plain"),
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(repeats + 1):
        for name in list(rows) if number % 2 else list(reversed(rows)):
            start = time.perf_counter()
            rows[name]()
            if number:
                found[name].append(len(files) / (time.perf_counter() - start))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="files")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output_file", type=Path)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2, or there are no quartiles")
    with tempfile.TemporaryDirectory() as folder:
        files = args.images or noise(Path(folder), 128)
        found = rates(files, args.batch_size, args.repeats, Path(folder))
    settings = {"images": len(files), "batch_size": args.batch_size, "repeats": args.repeats}
    report: dict[str, Any] = {
        "settings": settings | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "images_per_second": {name: round(statistics.median(values), 1) for name, values in found.items()},
        "of_pipeline": {},
    }
    for name, values in found.items():
        shares = [rate / alone for rate, alone in zip(values, found["pipeline"], strict=True)]
        low, _, high = statistics.quantiles(shares, n=4)
        report["of_pipeline"][name] = [round(share, 3) for share in (statistics.median(shares), low, high)]
    text = json.dumps(report, indent=1)
    print(text)
    if args.output_file:
        args.output_file.write_text(text + "\n")


if __name__ == "__main__":
    main()
