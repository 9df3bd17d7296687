"""What an explanation costs beside its prediction, as images, grids, classes and batches grow; JSON and a plot.

    python benchmarks/growth.py --output_dir benchmarks/results/growth

Classifiers and explainers have random weights, as for `tve-hf bench`, whose measurements these are: for each value of
one setting, the others as they are by default, the time of prediction and explanation less that of the prediction
alone in the same round, median over the rounds, and the operations likewise.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tve_hf.cli.bench import BenchArguments, compare
from tve_hf.files import dumps, write_whole

GROWING: dict[str, list[int]] = {
    "image_size": [96, 160, 224, 288, 384],  # with the classifier's own patches, and so the grid
    "grid_size": [4, 7, 8, 14, 16],
    "num_labels": [10, 100, 1000, 5000, 21841],
    "batch_size": [1, 2, 4, 8, 16],
}


def growth(args: BenchArguments, growing: dict[str, list[int]]) -> list[dict[str, Any]]:
    """For each setting, value and classifier, what an explanation adds to a prediction, per image."""
    found = []
    for setting, values in growing.items():
        for value in values:
            changed = {"batch_sizes": [value]} if setting == "batch_size" else {setting: value}
            for entry in compare(replace(args, **changed))["measured"]:
                alone, explained = entry["rows"]
                rounds = zip(explained["all_seconds"], alone["all_seconds"], strict=True)
                added = statistics.median(both - one for both, one in rounds)  # of large numbers, so of the same round
                found.append(
                    {
                        "classifier": entry["classifier"],
                        "setting": setting,
                        "value": value,
                        "ratio": explained["ratio"],
                        "milliseconds": 1000 * added / entry["batch_size"],
                        "gflops": explained["gflops"] - alone["gflops"],
                    }
                )
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Operations and time of an image against each setting, all on logarithmic axes."""
    settings = list(dict.fromkeys(row["setting"] for row in found))
    figure = Figure(figsize=(3.4 * len(settings), 5.6))
    axes = figure.subplots(2, len(settings), squeeze=False, sharey="row")
    for column, setting in enumerate(settings):
        for axis, unit in zip(axes[:, column], ("gflops", "milliseconds"), strict=True):
            for name in dict.fromkeys(row["classifier"] for row in found):
                rows = [row for row in found if (row["classifier"], row["setting"]) == (name, setting)]
                axis.plot([row["value"] for row in rows], [row[unit] for row in rows], marker="o", label=name)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel(setting)
    axes[0, 0].set_ylabel("GFLOP added to an image")
    axes[1, 0].set_ylabel("ms added to an image")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    FigureCanvasAgg(figure).print_figure(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--classifiers", nargs="+", default=["vit-base", "resnet-101"], help="as of tve-hf bench")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device")
    for setting, values in GROWING.items():
        parser.add_argument(f"--{setting}", type=int, nargs="*", default=values)
    given = parser.parse_args()
    args = BenchArguments(
        classifiers=given.classifiers,
        methods=["tve"],
        batch_sizes=[1],
        repeats=given.repeats,
        hidden_size=given.hidden_size,
        device=given.device,
    )
    found = growth(args, {setting: getattr(given, setting) for setting in GROWING})
    given.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(given.output_dir / "growth.json", lambda path: path.write_text(dumps(found, indent=1) + "\n"))
    write_whole(given.output_dir / "growth.png", lambda path: draw(found, path))


if __name__ == "__main__":
    main()
