"""What explaining leaves of images a second: what is drawn is what the reports say."""

import json
import math

import pytest
from PIL import Image
from scripts import load_example


@pytest.fixture
def reports(tmp_path):
    """Of two classifiers, the larger one first."""
    paths = []
    for name, gflops, seconds in (("large", 8.0, 0.5), ("small", 2.0, 0.25)):
        rows = [
            {"name": "prediction", "ratio": 1.0, "gflops": gflops},
            {"name": "tve", "ratio": 1 + seconds, "gflops": gflops + 1},
        ]
        if name == "small":
            rows.append({"name": "legrad_last_2", "ratio": 4.0, "gflops": 3 * gflops})
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"measured": [{"classifier": name, "batch_size": 2, "rows": rows}]}))
        paths.append(path)
    return paths


def test_shares_are_of_the_predictions_rate_and_the_smallest_classifier_comes_first(reports):
    labels, shares = load_example("reproduce/draw_latency").shares_of(
        [json.loads(path.read_text()) for path in reports]
    )
    assert labels == ["small\n2 GFLOP", "large\n8 GFLOP"]
    assert shares["prediction"] == [1, 1] and shares["tve"] == [1 / 1.25, 1 / 1.5]
    assert shares["legrad_last_2"][0] == 0.25 and math.isnan(shares["legrad_last_2"][1])  # it cannot serve the other


def test_it_draws_a_picture(reports, tmp_path):
    load_example("reproduce/draw_latency").main([*map(str, reports), "--output_file", str(tmp_path / "new" / "a.png")])
    assert Image.open(tmp_path / "new" / "a.png").width > 500
