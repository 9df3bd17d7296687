"""Theorem 1 on measured data: the mean error of every image against the bound of its own epsilon.

Reads the per-image values of a report that `tve-hf evaluate` has written, so nothing is computed again. If all ratios
H_t(g^)/H_t(g) and H_t(h)/H_t(h^) of an image lie in [1 - e, 1 + e], its mean error is at most -2 log(1 - e), and to
first order 2 e. From e = 1 on there is no bound.

    python examples/study_theorem.py --report results/report.json --output theorem.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def study(report: dict, path: Path) -> dict[str, float]:
    """Draw the plot; return how many images have a bound, and whether all of them keep it."""
    epsilon, error, bound = (
        np.array([float(value) for value in report["per_image"][key]]) for key in ("epsilon", "error", "bound")
    )
    bounded = epsilon < 1
    figure = Figure(figsize=(6, 4.5))
    axis = figure.subplots()
    grid = np.linspace(1e-3, 0.999, 400)
    axis.plot(grid, -2 * np.log1p(-grid), color="black", label="bound, −2 log(1 − ε)")
    axis.plot(grid, 2 * grid, color="black", linestyle="--", label="to first order, 2 ε")
    axis.scatter(epsilon[bounded], error[bounded], s=12, color="C0", label="images with ε < 1")
    axis.scatter(epsilon[~bounded], error[~bounded], s=12, color="C1", label="images with ε ≥ 1: no bound")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("ε: worst ratio over the patches of an image")
    axis.set_ylabel("mean |φ̂ − φ| over its patches, nats")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_figure(path, dpi=120, bbox_inches="tight")
    return {
        "images": len(epsilon),
        "with_bound": int(bounded.sum()),
        "within_bound": int((error[bounded] <= bound[bounded] + 1e-6).sum()),
        "median_error_nats": round(float(np.median(error)), 4),
        "median_epsilon": round(float(np.median(epsilon)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="report.json of tve-hf evaluate")
    parser.add_argument("--output", type=Path, required=True, help="picture")
    args = parser.parse_args()
    print(json.dumps(study(json.loads(args.report.read_text()), args.output), indent=1))


if __name__ == "__main__":
    main()
