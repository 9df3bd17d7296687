"""Theorem 1 on measured data: the mean error of every image against the bound of its own epsilon.

Reads the per-image values of a report that `tve-hf evaluate` has written, or `study_theorem_random.py` for an
explainer of random backgrounds, so nothing is computed again. If all ratios H_t(g^)/H_t(g) and H_t(h)/H_t(h^) of an
image lie in [1 - e, 1 + e], its mean error is at most -2 log(1 - e), and to first order 2 e. From e = 1 on there is no
bound.

    python examples/study_theorem.py --report results/report.json --output theorem.png

Writes the picture, and beside it as JSON what it counts.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tve_hf.files import dumps, write_whole

Columns = Mapping[str, np.ndarray]
# Rule -> what the names of its columns begin with: under Eq. 7 they are those of `tve-hf evaluate`.
PREFIXES = {"log_prob": "", "prob": "prob/", "logit": "logit/"}
# Of each bound: the rule of its map, and the column that it is.
BOUNDS = {
    "theorem": ("log_prob", "bound"),
    "spread": ("log_prob", "spread"),
    "prob": ("prob", "bound"),
    "logit": ("logit", "bound"),
}
ROUNDING = 1e-5  # of float32, and of numbers in reports


def columns_of(report: dict[str, Any], prefix: str = "") -> Columns:
    """The per-image values whose names begin so, (n,) each, by the rest of their names."""
    table = report["per_image"]
    return {
        name.removeprefix(prefix): np.array([float(value) for value in table[name]])
        for name in table
        if name.startswith(prefix)
    }


def counts(columns: Columns) -> dict[str, Any]:
    """How many images have a bound, and whether all of them keep it; where the report tells, what each bound is worth.

    A bound says something of a map if it is below the mean size of the true scores, which is how far from these a map
    of zeros is.
    """
    epsilon, error, bound = (columns[name] for name in ("epsilon", "error", "bound"))
    found: dict[str, Any] = {
        "images": len(epsilon),
        "with_bound": int((epsilon < 1).sum()),
        "within_bound": int((error <= bound + ROUNDING)[epsilon < 1].sum()),
        "median_error_nats": round(float(np.median(error)), 4),
        "median_epsilon": round(float(np.median(epsilon)), 4),
    }
    for name, (rule, which) in BOUNDS.items():
        keys = {part: PREFIXES[rule] + key for part, key in (("error", "error"), ("bound", which), ("size", "size"))}
        if all(key in columns for key in keys.values()):
            values = {part: columns[key] for part, key in keys.items()}
            found[name] = {f"median_{part}": round(float(np.median(value)), 4) for part, value in values.items()}
            found[name]["within"] = int((values["error"] <= values["bound"] + ROUNDING).sum())
            found[name]["below_size"] = int((values["bound"] < values["size"]).sum())
    return found


def study(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """Draw the plot; return the counts, and, where the report has halves of its passes, theirs and what they say.

    `sampling_share` is the share of the mean square of the error that the sampling of the truth has made: a quarter of
    that of the halves, or more where a ridge penalty holds back what they say.
    """
    columns, halves = columns_of(report), columns_of(report, "halves/")
    by_probabilities = "prob/error" in columns
    figure = Figure(figsize=(12 if by_probabilities else 6, 4.5))
    axes = figure.subplots(1, 2 if by_probabilities else 1, squeeze=False)[0]
    draw(axes[0], columns, halves)
    if by_probabilities:
        draw_probabilities(axes[1], columns, halves)
    FigureCanvasAgg(figure).print_figure(path, dpi=120, bbox_inches="tight")
    found = counts(columns)
    if halves:
        squares = {rule: f"{prefix}squared_error" for rule, prefix in PREFIXES.items()}
        found["halves"] = counts(halves)
        found["sampling_share"] = {
            rule: round(float(halves[name].mean() / 4 / columns[name].mean()), 4)
            for rule, name in squares.items()
            if name in columns
        }
    return found


def draw(axis: Axes, columns: Columns, halves: Columns) -> None:
    """Errors under Eq. 7 over epsilon, and the bound."""
    bounded = columns["epsilon"] < 1
    grid = np.linspace(1e-3, 0.999, 400)
    axis.plot(grid, -2 * np.log1p(-grid), color="black", label="bound, −2 log(1 − ε)")
    axis.plot(grid, 2 * grid, color="black", linestyle="--", label="to first order, 2 ε")
    for some, color, label in ((bounded, "C0", "images with ε < 1"), (~bounded, "C1", "images with ε ≥ 1: no bound")):
        axis.scatter(columns["epsilon"][some], columns["error"][some], s=12, color=color, label=label)
    _draw_halves(axis, halves, "epsilon", "error")
    axis.set_xlabel("ε: worst ratio over the patches of an image")
    axis.set_ylabel("mean |φ̂ − φ| over its patches, nats")
    _finish(axis)


def draw_probabilities(axis: Axes, columns: Columns, halves: Columns) -> None:
    """Errors of maps of differences of probabilities over their bounds."""
    bound, error = columns["prob/bound"], columns["prob/error"]
    grid = np.array([bound.min(), bound.max()])
    axis.plot(grid, grid, color="black", label="bound, ε · mean of H(g) + H(ĥ)")
    axis.scatter(bound, error, s=12, color="C0", label="images")
    _draw_halves(axis, halves, "prob/bound", "prob/error")
    axis.set_xlabel("bound")
    axis.set_ylabel("mean |φ̂ − φ| over its patches, probability")
    _finish(axis)


def _draw_halves(axis: Axes, halves: Columns, x: str, y: str) -> None:
    if halves:
        axis.scatter(halves[x], halves[y], s=12, color="0.6", label="one half of the passes by the other")


def _finish(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="report.json of tve-hf evaluate")
    parser.add_argument("--output", type=Path, required=True, help="picture")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = study(json.loads(args.report.read_text()), args.output)
    text = dumps({"report": str(args.report), "summary": found}, indent=1)
    write_whole(args.output.with_suffix(".json"), lambda path: path.write_text(text + "\n"))
    print(dumps(found, indent=1))


if __name__ == "__main__":
    main()
