"""Draw what explaining leaves of a classifier's images a second while it grows, from reports of `tve-hf bench`.

python examples/reproduce/draw_latency.py runs/latency/*/speed.json --output_file latency.png
"""

import argparse
import json
from math import nan
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tve_hf.benchmark.plots import style

# What the bench alone names, drawn as another.
FORMS = {"tve_vit_mae": "exact", "tve_research": "exact_sampled", "legrad_last_2": "libragrad"}


def shares_of(reports: list[dict[str, Any]]) -> tuple[list[str], dict[str, list[float]]]:
    """The classifiers, from few operations to many; and by row its images a second beside the prediction's, or NaN."""
    entries = [entry for report in reports for entry in report["measured"]]
    rows = [{row["name"]: row for row in entry["rows"]} for entry in entries]
    order = sorted(range(len(entries)), key=lambda place: rows[place]["prediction"]["gflops"])
    names = dict.fromkeys(name for place in order for name in rows[place])
    shares = {
        name: [1 / rows[place][name]["ratio"] if name in rows[place] else nan for place in order] for name in names
    }
    labels = [f"{entries[place]['classifier']}\n{rows[place]['prediction']['gflops']:.0f} GFLOP" for place in order]
    return labels, shares


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--output_file", required=True, type=Path)
    args = parser.parse_args(arguments)
    labels, shares = shares_of([json.loads(path.read_text()) for path in args.reports])
    figure = Figure(figsize=(9, 5.5))
    axis = figure.subplots()
    axis.axhline(shares.pop("prediction")[0], color="0.6", linewidth=1)
    for name, found in shares.items():
        axis.plot(range(len(found)), found, label=name, markersize=5, **style(FORMS.get(name, name)))
    axis.set(yscale="log", ylabel="images a second, beside the prediction's")
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(args.output_file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
