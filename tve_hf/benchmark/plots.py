"""Plots of a report: fidelity against sparsity, fidelity against cost, agreement of removal operators."""

from itertools import cycle
from math import cos, pi, sin
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

# What a family of methods has in common, and its methods, each of which has its colour in every plot. Colours are of
# Okabe and Ito, and of Tol, for all forms of colour blindness; those that repeat have another marker and another line.
_COLORS = "#d55e00 #0072b2 #009e73 #cc79a7 #e69f00 #56b4e9 #882255 #332288 #999933".split()
_FAMILIES: list[tuple[str, str, str]] = [
    ("o", "-", "rise occlusion lime kernel_shap"),
    ("s", "--", "grad_cam saliency ig grad_shap deep_lift"),
    (
        "^",
        "-.",
        "chefer_cam legrad libragrad text_span rollout attention_cam raw_attention"
        " partial_lrp transformer_attribution",
    ),
]
_STYLES: dict[str, dict[str, Any]] = {
    name: {"color": color, "marker": marker, "linestyle": line}
    for marker, line, names in _FAMILIES
    for name, color in zip(names.split(), _COLORS, strict=False)
} | {
    "tve": {"color": "black", "marker": "*", "linestyle": "-"},  # these stand out
    "tve_other": {"color": "0.35", "marker": "*", "linestyle": "--"},  # another explainer, in joined reports
    "vit_shapley": {"color": "#0072b2", "marker": "P", "linestyle": ":"},
    "exact": {"color": "black", "marker": "D", "linestyle": "--"},
    "exact_sampled": {"color": "0.35", "marker": "D", "linestyle": ":"},
    "sampled": {"color": "0.35", "marker": "d", "linestyle": "-"},
    "random": {"color": "0.65", "marker": "x", "linestyle": ":"},  # the floors are pale
    "centre": {"color": "0.65", "marker": "+", "linestyle": "--"},
}
# Of further explainers in one plot, in their order.
_OTHER_LINES = ("--", ":", "-.")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=120, bbox_inches="tight")


def style(spec: str) -> dict[str, Any]:
    """Colour, marker and line of a method, whatever its samples; `tve_...` is another explainer than `tve`."""
    name = spec.partition("@")[0].replace("-", "_")
    return _STYLES["tve_other" if name.startswith("tve_") else name]


def styles(specs: list[str]) -> dict[str, dict[str, Any]]:
    """The looks of methods in one plot, where further explainers, `tve_...`, are told apart by their lines."""
    others = [spec for spec in specs if spec.startswith("tve_")]
    lines = dict(zip(others, cycle(_OTHER_LINES), strict=False))
    return {spec: style(spec) | ({"linestyle": lines[spec]} if spec in lines else {}) for spec in specs}


def _samples(spec: str) -> int:
    return int(spec.partition("@")[2] or 0)


def passes(cost: dict[str, float]) -> float:
    """What an image costs in passes of the classifier: a backward one as two, an explainer's own by its operations."""
    return cost["forward"] + 2 * cost["backward"] + cost.get("explainer", 0.0)


def fidelity_curves(report: dict[str, Any], path: Path) -> None:
    """Mean Fidelity+ and Fidelity- against sparsity, one row for each removal operator."""
    removals = list(report["summary"]["fidelity"])
    figure = Figure(figsize=(10, 3.6 * len(removals)))
    axes = figure.subplots(len(removals), 2, squeeze=False, sharex=True)
    for row, removal in zip(axes, removals, strict=True):
        specs = [key.split("/", 1)[1] for key in report["curves"] if key.startswith(f"{removal}/")]
        looks = styles(specs)
        for axis, side, title in zip(row, ("plus", "minus"), ("Fidelity+ ↑", "Fidelity− ↓"), strict=True):
            for spec in specs:
                curve = report["curves"][f"{removal}/{spec}"]
                most = max(_samples(other) for other in specs if style(other) is style(spec))
                width = 2.2 if spec in ("tve", "exact") else 1.6 if _samples(spec) == most else 0.8
                look = looks[spec] | {"marker": "", "linewidth": width}
                axis.plot(curve["sparsity"], curve[side], label=spec, **look)
            axis.set_title(f"{title}, removed pixels: {removal}", fontsize=10)
            axis.set_xlabel("sparsity: share of patches not in S*")
            axis.grid(alpha=0.3)
    # Each method once, in whichever rows it is.
    names = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(names.values(), names, loc="center left", bbox_to_anchor=(0.92, 0.5), fontsize=8, frameon=False)
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
    figure = Figure(figsize=(6.5 * len(removals), 5))
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(removals), squeeze=False)[0]
    axes[0].set_ylabel("Fidelity+ AUC − Fidelity− AUC")
    # A method without any pass is drawn at a tenth of one.
    costs = {spec: max(0.1, passes(cost)) for spec, cost in report["cost"].items()}
    plotted = [{spec: (cost, rows[spec]["gap"][0]) for spec, cost in costs.items()} for rows in removals.values()]
    has_share = any("explainer" in cost for cost in report["cost"].values())
    counted = "counts by its operations" if has_share else "pass is not counted"
    for axis, removal, points in zip(axes, removals, plotted, strict=True):
        front = pareto_front(points)
        axis.plot(*zip(*(points[spec] for spec in front), strict=True), color="0.8", linewidth=4, zorder=1)
        for spec, (x, y) in points.items():
            look = {key: value for key, value in style(spec).items() if key != "linestyle"}
            axis.scatter([x], [y], zorder=3, s=110 if spec.startswith("tve") else 36, **look)
        for look in {id(style(spec)): style(spec) for spec in points}.values():  # one method, by its samples
            same = sorted((spec for spec in points if style(spec) is look), key=_samples)
            line = {"color": look["color"], "linewidth": 0.7, "zorder": 2}
            axis.plot(*zip(*(points[spec] for spec in same), strict=True), **line)
        axis.set_xscale("log")
        axis.set_xlabel(
            f"passes of the classifier for each image\n(a backward one counts as two; an explainer's own {counted})"
        )
        axis.set_title(f"removed pixels: {removal}; pale line: Pareto front", fontsize=10)
        axis.margins(x=0.12, y=0.12)
        axis.grid(alpha=0.3)
    canvas.draw()  # places everything, so that names can be written where nothing else stands
    for axis, points in zip(axes, plotted, strict=True):
        write_names(axis, points)
    _save(figure, path)


def write_names(axis: Axes, points: dict[str, tuple[float, float]]) -> list[Annotation]:
    """Write the name of each point beside it, as near as no other name and no point is covered."""
    places = {name: axis.transData.transform(point) for name, point in points.items()}  # pixels
    scale = axis.figure.dpi / 72
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in places.values()]
    written = []
    for name in sorted(points, key=lambda name: tuple(places[name])):
        note = axis.annotate(name, points[name], (0, 0), textcoords="offset points", fontsize=8, va="center")
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])
        extent = note.get_window_extent()

        def box(offset: tuple[float, float], extent: Bbox = extent) -> Bbox:
            return extent.translated(offset[0] * scale, offset[1] * scale)

        offsets = [
            # From the point to the nearer end of the name.
            (reach * cos(turn) - (extent.width / scale if cos(turn) < -0.1 else 0), reach * sin(turn))
            for reach in range(8, 90, 4)
            for turn in (step * pi / 8 for step in (0, 8, 1, -1, 7, 9, 2, -2, 6, 10, 3, -3, 5, 11))
        ]
        free = (
            offset
            for offset in offsets
            if axis.bbox.containsx(box(offset).x0)
            and axis.bbox.containsx(box(offset).x1)
            and axis.bbox.containsy(box(offset).y0)
            and axis.bbox.containsy(box(offset).y1)
            and not box(offset).count_overlaps(taken)
        )
        offset = next(free, offsets[0])
        note.set_position(offset)
        if abs(offset[1]) > 12:  # too far to tell whose name it is
            end = box(offset)
            x = min(max(places[name][0], end.x0), end.x1)
            ends: Any = [places[name], (x, end.y1 if offset[1] < 0 else end.y0)]
            line = axis.transData.inverted().transform(ends)
            axis.plot(*line.T, color="0.5", linewidth=0.5, zorder=2, scalex=False, scaley=False)
        taken.append(box(offset))
        written.append(note)
    return written


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


def speed(report: dict[str, Any], path: Path) -> None:
    """Ratios to the prediction's time with their intervals, a panel for each classifier, on a logarithmic axis."""
    names = list(dict.fromkeys(entry["classifier"] for entry in report["measured"]))
    most = max(len(entry["rows"]) for entry in report["measured"])
    figure = Figure(figsize=(4.2 * len(names) + 1.5, 0.28 * most + 1.4))
    for name, axis in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        entries = [entry for entry in report["measured"] if entry["classifier"] == name]
        labels = list(dict.fromkeys(row["name"] for entry in entries for row in entry["rows"]))
        for number, (entry, color) in enumerate(zip(entries, _COLORS, strict=False)):
            rows = entry["rows"]
            ratios = [row["ratio"] for row in rows]
            ends = [row["interval"] for row in rows]
            below = [max(0.0, ratio - low) for ratio, (low, _) in zip(ratios, ends, strict=True)]
            above = [max(0.0, high - ratio) for ratio, (_, high) in zip(ratios, ends, strict=True)]
            heights = [labels.index(row["name"]) + 0.15 * (number - (len(entries) - 1) / 2) for row in rows]
            label = f"batch of {entry['batch_size']}"
            axis.errorbar(ratios, heights, xerr=[below, above], fmt="o", color=color, markersize=4, label=label)
        axis.set_yticks(range(len(labels)), labels)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.axvline(1, color="0.7", linewidth=0.8)
        axis.set_xlabel("time, in predictions")
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)
