"""The study of Theorem 1 counts what a report says, and sees a bound that is broken."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from tve_hf.files import dumps

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("study_theorem", ROOT / "examples" / "study_theorem.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_counts_images_with_a_bound_and_those_that_keep_it(example, tmp_path, monkeypatch, capsys) -> None:
    epsilon = [0.1, 0.5, 0.5, 1.0, 7.0]
    bounds = [-2 * math.log(1 - e) if e < 1 else math.inf for e in epsilon]  # 0.21, 1.39, 1.39
    errors = [0.2, 1.38, 1.4, 0.3, 2.0]  # the third breaks its bound, as no real one can
    report = tmp_path / "report.json"
    report.write_text(dumps({"per_image": {"epsilon": epsilon, "bound": bounds, "error": errors}}))
    monkeypatch.setattr(
        sys, "argv", ["study_theorem.py", "--report", str(report), "--output", str(tmp_path / "theorem.png")]
    )
    example.main()
    assert json.loads(capsys.readouterr().out) == {
        "images": 5,
        "with_bound": 3,
        "within_bound": 2,
        "median_error_nats": 1.38,
        "median_epsilon": 0.5,
    }
    assert (tmp_path / "theorem.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "theorem.json").read_text())
    assert written["summary"]["with_bound"] == 3 and written["report"] == str(report)


def test_what_is_said_of_the_antithetical_explainer_is_what_its_report_gives(example, tmp_path) -> None:
    results = ROOT / "docs" / "comparison" / "antithetical" / "tiny_imagenet_log_prob"
    found = example.study(json.loads((results / "report.json").read_text()), tmp_path / "theorem.png")
    said = (ROOT / "docs" / "comparison.md").read_text()
    if found["with_bound"] == 0:
        assert f"on the {found['images']} images" in said and "no image has an ε below 1" in said
    else:
        assert "no image has an ε below 1" not in said
    assert found["within_bound"] == found["with_bound"]


def test_bounds_are_counted_where_they_say_more_than_a_map_of_zeros(example, tmp_path) -> None:
    per_image = {
        "epsilon": [0.5, 3.0, 0.1],
        "bound": [1.386, "inf", 0.211],
        "error": [0.3, 0.4, 0.1],
        "squared_error": [0.2, 0.3, 0.1],
        "size": [1.0, 2.0, 0.5],
        "spread": [0.9, 2.5, 0.2],
        "prob/error": [0.1, 0.2, 0.3],
        "prob/squared_error": [0.01, 0.04, 0.1],
        "prob/size": [0.05, 0.5, 0.2],
        "prob/bound": [0.2, 0.4, 0.25],  # the last one is broken, as no real one can
    }
    report = {"per_image": per_image | {f"halves/{name}": per_image[name] for name in per_image}}
    found = example.study(report, tmp_path / "theorem.png")
    assert (found["images"], found["with_bound"], found["within_bound"]) == (3, 2, 2)
    assert found["theorem"] == {
        "median_error": 0.3, "median_bound": 1.386, "median_size": 1.0, "within": 3, "below_size": 1,
    }  # fmt: skip
    assert (found["spread"]["within"], found["spread"]["below_size"]) == (3, 2)
    assert found["prob"] == {
        "median_error": 0.2, "median_bound": 0.25, "median_size": 0.2, "within": 2, "below_size": 1,
    }  # fmt: skip
    assert "logit" not in found and found["halves"] == example.counts(example.columns_of(report))
    assert found["sampling_share"] == {"log_prob": 0.25, "prob": 0.25}
