"""Draw explained images a second while the classifier grows, from the reports of `tve-hf bench`.

python examples/reproduce/draw_latency.py runs/latency/*/speed.json --output_file latency.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tve_hf.benchmark.plots import style

# What the bench alone names, drawn as what it is a form of.
FORMS = {"prediction": "random", "tve_vit_mae": "exact", "tve_research": "exact_sampled", "legrad_last_2": "libragrad"}


def points_of(reports: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """By row: operations of the prediction (GFLOP), images a second, and the classifier, the smallest first."""
    points: dict[str, list[tuple[float, float, str]]] = {}
    for report in reports:
        for entry in report["measured"]:
            (prediction,) = (row for row in entry["rows"] if row["name"] == "prediction")
            for row in entry["rows"]:
                rate = entry["batch_size"] / row["seconds"]
                points.setdefault(row["name"], []).append((prediction["gflops"], rate, entry["classifier"]))
    return {name: sorted(found) for name, found in points.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--output_file", required=True, type=Path)
    args = parser.parse_args(arguments)
    points = points_of([json.loads(path.read_text()) for path in args.reports])
    figure = Figure(figsize=(8, 5.5))
    axis = figure.subplots()
    for name, found in points.items():
        operations, rates, classifiers = zip(*found, strict=True)
        axis.plot(operations, rates, label=name, markersize=5, **style(FORMS.get(name, name)))
        if name == "prediction":
            axis.set_xticks(operations, [f"{c}\n{o:.0f}" for o, c in zip(operations, classifiers, strict=True)])
    axis.set(xscale="log", yscale="log", ylabel="images a second", xlabel="the classifier, and its GFLOP for an image")
    axis.minorticks_off()
    axis.tick_params("x", labelsize=8)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(args.output_file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
