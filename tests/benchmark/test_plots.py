"""What the plots say: the Pareto front by hand, names that can be read, one look for a method, what is counted."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tve_hf import methods
from tve_hf.benchmark.plots import draw, pareto_front, passes, style, styles, write_names


def test_pareto_front_by_hand():
    points = {"a": (1.0, 0.1), "b": (2.0, 0.3), "c": (2.0, 0.2), "d": (5.0, 0.3), "e": (9.0, 0.4)}
    assert pareto_front(points) == ["a", "b", "e"]
    assert pareto_front({}) == []


def test_every_picture_is_drawn(tmp_path):
    specs, removals = ["tve", "exact", "random", "rise@50"], ["zero", "blur"]
    curve = {"sparsity": [0.0, 0.5, 1.0], "plus": [0.9, 0.5, 0.0], "minus": [0.0, 0.2, 0.9]}
    rows = {spec: {"gap": [0.1 * i, 0.05]} for i, spec in enumerate(specs)}
    report = {
        "summary": {"fidelity": dict.fromkeys(removals, rows), "rank_agreement": {"zero/blur": 0.5}},
        "curves": {f"{removal}/{spec}": curve for removal in removals for spec in specs},
        "cost": {spec: {"forward": 10.0 * i, "backward": 0.0} for i, spec in enumerate(specs)},
    }
    draw(report, tmp_path)
    for name in ("fidelity", "cost", "removals"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 100
    del report["summary"]["rank_agreement"]
    draw(report, tmp_path)


def test_each_method_has_one_look_of_its_own_whatever_its_samples():
    looks = {name: style(name) for name in methods.available()}
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(looks)
    assert style("rise@50") == style("rise@400") == looks["rise"]
    assert style("kernel-shap") == looks["kernel_shap"]
    assert style("tve_small") not in looks.values()  # of a joined report
    in_one_plot = styles(["tve", "tve_small", "rise@50", "tve_scratch"])
    assert in_one_plot["tve"] == looks["tve"] and in_one_plot["rise@50"] == looks["rise"]
    assert in_one_plot["tve_small"]["linestyle"] != in_one_plot["tve_scratch"]["linestyle"]


@pytest.mark.parametrize("together", [1, 2, 5])
def test_names_of_points_that_coincide_do_not_overlap(together):
    figure = Figure(figsize=(6, 5))
    canvas, axis = FigureCanvasAgg(figure), figure.subplots()
    spread = [(1.0, 0.1), (400.0, 0.3), (400.0, 0.31), (390.0, 0.29)]
    places = [*spread, *[(20.0, 0.2)] * together]
    points = {f"a_method_{i}@{10 * i}": place for i, place in enumerate(places)}
    axis.scatter(*zip(*points.values(), strict=True))
    axis.set_xscale("log")
    canvas.draw()
    boxes = [note.get_window_extent() for note in write_names(axis, points)]
    assert len(boxes) == len(points)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for box in boxes:
        assert axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1
        assert not any(box.contains(*axis.transData.transform(place)) for place in places)


def test_cost_counts_backward_passes_twice_and_the_explainers_own_share():
    assert passes({"seconds": 3.0, "forward": 2.0, "backward": 3.0}) == 8.0
    assert passes({"forward": 1.0, "backward": 0.0, "explainer": 0.25}) == 1.25
