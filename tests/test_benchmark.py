"""The evaluation of an explainer on a parquet file of noise: its report, recomputed."""

import json
import statistics

import datasets
import numpy as np
import pytest
import torch
from tiny import GRID, HOPS, noise_image, save_pair
from transformers import pipeline

import tve_hf
from tve_hf.benchmark import EvaluateArguments, bootstrap_interval, evaluate
from tve_hf.cli import main

NUM_IMAGES, METHODS = 5, ["tve", "exact", "random", "rollout"]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    classifier, explainer = save_pair(folder)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [noise_image(seed) for seed in range(NUM_IMAGES)], "label": [3, 3, 1, 0, 3]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "noise.parquet")
    return {
        "classifier": str(classifier),
        "model": str(explainer),
        "test_files": [str(folder / "noise.parquet")],
        "methods": ["random", "rollout"],
        "removals": ["zero"],
        "rule": "log_prob",
        "batch_size": 3,
    }


@pytest.fixture
def report(settings, tmp_path):
    evaluate(EvaluateArguments(**settings, output_file=str(tmp_path / "deep" / "report.json")))
    return json.loads((tmp_path / "deep" / "report.json").read_text())


def test_summary_is_recomputed_from_the_images(report):
    per_image = {key: np.array([float(value) for value in column]) for key, column in report["per_image"].items()}
    assert all(column.shape == (NUM_IMAGES,) for column in per_image.values())
    summary = report["summary"]
    assert report["num_images"] == NUM_IMAGES
    for name, reduce, column in (
        ("median_spearman", np.median, "spearman"),
        ("median_pearson", np.median, "pearson"),
        ("mean_kept_error", np.mean, "kept_error"),
        ("mean_removed_error", np.mean, "removed_error"),
        ("median_epsilon", np.median, "epsilon"),
        ("median_bound", np.median, "bound"),
        ("mean_error_nats", np.mean, "error"),
        ("accuracy", np.mean, "correct"),
    ):
        assert float(summary[name]) == pytest.approx(reduce(per_image[column]), abs=1e-4), name
    fidelity = summary["fidelity"]["zero"]
    assert set(fidelity) == {*METHODS, "tve_share_of_exact"}
    gaps = {}
    for method in METHODS:
        plus, minus = (per_image[f"{method}/zero/{side}"] for side in ("plus", "minus"))
        gaps[method] = plus - minus
        for name, column in (("plus_auc", plus), ("minus_auc", minus), ("gap", plus - minus)):
            expected = [column.mean(), statistics.stdev(column.tolist())]
            assert fidelity[method][name] == pytest.approx(expected, abs=2e-4)
    for method in METHODS:
        low, high = fidelity[method]["gap_above_random"]
        assert low - 1e-4 <= (gaps[method] - gaps["random"]).mean() <= high + 1e-4
    share = gaps["tve"].mean() / gaps["exact"].mean()
    assert fidelity["tve_share_of_exact"] == pytest.approx(share, rel=0.05, abs=1e-3)


def test_images_are_those_of_the_pipeline(report, settings):
    explain = pipeline("transferable-attribution", model=settings["model"], classifier=settings["classifier"])
    labels = [3, 3, 1, 0, 3]
    for seed in range(NUM_IMAGES):
        (result,) = explain(noise_image(seed), rule="log_prob", verify=GRID * GRID)
        found = result["verification"]
        for name in ("pearson", "spearman", "kept_error", "removed_error", "epsilon", "error"):
            value = float(report["per_image"][name][seed])
            assert value == pytest.approx(found[name], rel=1e-3, abs=2e-4), name
        assert report["per_image"]["correct"][seed] == (result["class_idx"] == labels[seed])
        pixel_values = explain.image_processor(noise_image(seed), return_tensors="pt")["pixel_values"]
        scores = torch.from_numpy(result["attribution"]).view(1, -1)
        class_idx = torch.tensor([result["class_idx"]])
        curves = tve_hf.fidelity(explain.classifier, pixel_values, scores, class_idx, removal="zero")
        assert report["per_image"]["tve/zero/plus"][seed] == pytest.approx(float(curves.plus_auc), abs=1e-4)
        assert report["per_image"]["tve/zero/minus"][seed] == pytest.approx(float(curves.minus_auc), abs=1e-4)
    assert explain.model.config.hops == HOPS


def test_same_seed_same_report(report, settings, tmp_path):
    again = evaluate(EvaluateArguments(**settings, output_file=str(tmp_path / "again.json")))
    assert json.loads((tmp_path / "again.json").read_text())["per_image"] == report["per_image"]
    assert again["summary"]["fidelity"] == report["summary"]["fidelity"]


def test_command_line(settings, tmp_path, capsys):
    arguments = []
    for name, value in (settings | {"num_images": 2, "output_file": str(tmp_path / "report.json")}).items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    assert main(["evaluate", *arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(capsys.readouterr().out) == report["summary"]
    assert report["num_images"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "photo"}, "No column 'photo'.*image, label"),
        ({"num_images": 0}, "no image with num_images=0"),
        ({"methods": ["magic"]}, "Unknown method 'magic'"),
        ({"rule": "magic"}, "Unknown rule 'magic'"),
    ],
)
def test_mistakes_are_named(settings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateArguments(**(settings | changes), output_file=str(tmp_path / "report.json")))


def test_bootstrap_interval_holds_the_mean():
    values = torch.arange(100, dtype=torch.float64)
    low, high = bootstrap_interval(values)
    error = values.std().item() / 10
    assert low == pytest.approx(49.5 - 1.96 * error, abs=0.5) and high == pytest.approx(49.5 + 1.96 * error, abs=0.5)
    assert bootstrap_interval(torch.full((5,), 2.0)) == (2.0, 2.0)
