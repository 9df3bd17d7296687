"""What the plots say: the Pareto front by hand, and that every picture is drawn."""

from PIL import Image

from tve_hf.benchmark.plots import draw, pareto_front


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
