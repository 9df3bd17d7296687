"""Explained images a second against the classifier's operations: what is drawn is what the reports say."""

import json

import pytest
from PIL import Image
from scripts import load_example


@pytest.fixture
def reports(tmp_path):
    """Of two classifiers, the larger one first."""
    paths = []
    for name, gflops, seconds in (("large", 8.0, 0.5), ("small", 2.0, 0.25)):
        rows = [
            {"name": "prediction", "seconds": seconds, "gflops": gflops},
            {"name": "tve", "seconds": 2 * seconds, "gflops": gflops + 1},
        ]
        if name == "small":
            rows.append({"name": "legrad_last_2", "seconds": 4 * seconds, "gflops": 3 * gflops})
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"measured": [{"classifier": name, "batch_size": 2, "rows": rows}]}))
        paths.append(path)
    return paths


def test_rates_are_of_images_and_the_smallest_classifier_comes_first(reports):
    points_of = load_example("reproduce/draw_latency").points_of
    assert points_of([json.loads(path.read_text()) for path in reports]) == {
        "prediction": [(2.0, 8.0, "small"), (8.0, 4.0, "large")],
        "tve": [(2.0, 4.0, "small"), (8.0, 2.0, "large")],
        "legrad_last_2": [(2.0, 2.0, "small")],  # which cannot serve the other
    }


def test_it_draws_a_picture(reports, tmp_path):
    load_example("reproduce/draw_latency").main([*map(str, reports), "--output_file", str(tmp_path / "new" / "a.png")])
    assert Image.open(tmp_path / "new" / "a.png").width > 500
