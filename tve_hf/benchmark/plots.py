"""Plots of a report: fidelity against sparsity, fidelity against cost, agreement of removal operators."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_FLOORS = ("random", "centre")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=120, bbox_inches="tight")


def _style(index: int, spec: str) -> dict[str, Any]:
    """Colour and line of a method: tve and exact stand out, the floors are grey."""
    if spec in _FLOORS:
        return {"color": "0.6", "linestyle": ":" if spec == "random" else "--", "linewidth": 1.5}
    if spec in ("tve", "exact"):
        return {"color": "black", "linestyle": "-" if spec == "tve" else "--", "linewidth": 2.2, "zorder": 5}
    return {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "-.", "linewidth": 1.2}


def fidelity_curves(report: dict[str, Any], path: Path) -> None:
    """Mean Fidelity+ and Fidelity- against sparsity, one row for each removal operator."""
    removals = list(report["summary"]["fidelity"])
    figure = Figure(figsize=(10, 3.6 * len(removals)))
    axes = figure.subplots(len(removals), 2, squeeze=False, sharex=True)
    for row, removal in zip(axes, removals, strict=True):
        specs = [key.split("/", 1)[1] for key in report["curves"] if key.startswith(f"{removal}/")]
        for axis, side, title in zip(row, ("plus", "minus"), ("Fidelity+ ↑", "Fidelity− ↓"), strict=True):
            for index, spec in enumerate(specs):
                curve = report["curves"][f"{removal}/{spec}"]
                axis.plot(curve["sparsity"], curve[side], label=spec, **_style(index, spec))
            axis.set_title(f"{title}, removed pixels: {removal}", fontsize=10)
            axis.set_xlabel("sparsity: share of patches not in S*")
            axis.grid(alpha=0.3)
        row[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    _save(figure, path)


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the (cost, value) points that none with at most their cost exceeds in value, the cheapest first."""
    front: list[str] = []
    best = float("-inf")
    for name, (_, value) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if value > best:
            front.append(name)
            best = value
    return front


def fidelity_against_cost(report: dict[str, Any], path: Path) -> None:
    """Fidelity+ AUC - Fidelity- AUC against passes of the classifier for each image, with the Pareto front."""
    removals = report["summary"]["fidelity"]
    figure = Figure(figsize=(6 * len(removals), 5))
    axes = figure.subplots(1, len(removals), squeeze=False)[0]
    axes[0].set_ylabel("Fidelity+ AUC − Fidelity− AUC")
    for axis, (removal, rows) in zip(axes, removals.items(), strict=True):
        # A backward pass costs about two forward ones; a method without any is drawn at a tenth of one.
        points = {
            spec: (max(0.1, cost["forward"] + 2 * cost["backward"]), rows[spec]["gap"][0])
            for spec, cost in report["cost"].items()
        }
        front = pareto_front(points)
        axis.plot(*zip(*(points[spec] for spec in front), strict=True), color="0.7", zorder=1)
        middle = max(x for x, _ in points.values()) ** 0.5  # of the axis, which begins about 1
        span = max(y for _, y in points.values()) - min(y for _, y in points.values())
        for index, (spec, (x, y)) in enumerate(points.items()):
            axis.scatter([x], [y], color=_style(index, spec)["color"], zorder=3, s=28)
            # To the side where there is room; the lower of two that nearly coincide has its name below.
            higher = any(1 / 1.5 < x / a < 1.5 and 0 < b - y < span / 30 for a, b in points.values())
            side, offset = ("right", -5) if x > middle else ("left", 5)
            place = {"xytext": (offset, -9 if higher else 4), "ha": side}
            axis.annotate(spec, (x, y), textcoords="offset points", fontsize=8, **place)
        axis.set_xscale("log")
        axis.set_xlabel("forward passes for each image (a backward one counts as two)")
        axis.set_title(f"removed pixels: {removal}; grey: Pareto front", fontsize=10)
        axis.margins(x=0.15, y=0.1)
        axis.grid(alpha=0.3)
    _save(figure, path)


def removal_agreement(report: dict[str, Any], path: Path) -> None:
    """Kendall's tau between the rankings of the methods under each two removal operators."""
    removals = list(report["summary"]["fidelity"])
    taus = report["summary"]["rank_agreement"]
    values = [[1.0 if a == b else taus.get(f"{a}/{b}", taus.get(f"{b}/{a}")) for b in removals] for a in removals]
    figure = Figure(figsize=(1.2 * len(removals) + 1.5, 1.2 * len(removals) + 0.8))
    axis = figure.subplots()
    axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu")
    axis.set_xticks(range(len(removals)), removals)
    axis.set_yticks(range(len(removals)), removals)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    axis.set_title("Kendall's τ of the methods' ranking", fontsize=10)
    _save(figure, path)


def draw(report: dict[str, Any], folder: Path) -> None:
    """Write fidelity.png, cost.png and, for two removal operators or more, removals.png."""
    fidelity_curves(report, folder / "fidelity.png")
    fidelity_against_cost(report, folder / "cost.png")
    if "rank_agreement" in report["summary"]:
        removal_agreement(report, folder / "removals.png")
