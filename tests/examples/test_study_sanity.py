"""The study of sanity: its values are those of the checks, what an explainer refuses is said, and it goes on."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from scripts import words
from tiny import GRID, HOPS, noise_image, save_classifier, save_models

from tve_hf import ShapleyExplainer, TVEExplainer, methods, split_classifier
from tve_hf.evaluation.sanity import class_sensitivity, randomization, sensitivity_max

CHECKS = ("randomization_head", "randomization_backbone", "class_sensitivity", "sensitivity_max")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("sanity"), 4)


def arguments(models, output, *specs, more=()):
    given = {"--classifier": models / "classifier", "--model": models / "random", "--files": models / "noise.parquet"}
    given |= {"--vit_shapley": models / "shapley", "--output_dir": output}
    return words(given, "--methods", *specs, *more)


def test_values_are_those_of_the_checks(study, models, tmp_path, monkeypatch):
    study.main(arguments(models, tmp_path, "tve", "exact", "centre", "vit_shapley"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == (rows := torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist())
    classifier = split_classifier(models / "classifier")
    x = classifier.image_processor([noise_image(row) for row in rows], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        y = classifier(x).logits.argmax(-1)
    options = {
        "tve": {"explainer": TVEExplainer.from_pretrained(models / "random").eval()},
        "exact": {"hops": HOPS},
        "centre": {},
        "vit_shapley": {"shapley_explainer": ShapleyExplainer.from_pretrained(models / "shapley").eval()},
    }
    for spec, more in options.items():
        explain = partial(methods.explain, spec, grid_size=GRID, **more)
        expected = {
            "randomization_backbone": randomization(explain, classifier, x, y, "backbone"),
            "class_sensitivity": class_sensitivity(explain, classifier, x),
            "sensitivity_max": sensitivity_max(explain, classifier, x, y),
        }
        if spec != "vit_shapley":
            expected["randomization_head"] = randomization(explain, classifier, x, y, "head")
        for check, values in expected.items():
            assert report["per_image"][check][spec] == pytest.approx(values.tolist(), abs=2e-4)
            low_median = sorted(values.tolist())[1]
            value, low, high = report["summary"][check][spec]
            assert value == pytest.approx(low_median, abs=2e-4) and low <= value <= high
    # An explainer of one head has no map of another; one of a backbone has, but no longer fits another backbone.
    refused = report["refused"]
    assert list(refused["randomization_head"]) == ["vit_shapley"] and refused["randomization_backbone"] == {}
    assert "vit_shapley" not in report["summary"]["randomization_head"]
    other = "same architecture, other weights"
    assert list(report["fits"].values()) == ["same weights", "same weights", other]

    monkeypatch.setattr(study, "CHECKS", dict.fromkeys(CHECKS))  # nothing is computed again
    study.main(arguments(models, tmp_path, "tve", "exact", "centre", "vit_shapley"))
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_methods_that_draw_have_the_same_draws_in_each_map(study, models, tmp_path):
    study.main(arguments(models, tmp_path, "random", "rise@20"))
    values = json.loads((tmp_path / "report.json").read_text())["per_image"]
    assert values["class_sensitivity"]["random"] == values["randomization_head"]["random"] == [1] * 4
    assert values["sensitivity_max"]["random"] == [0] * 4
    classifier = split_classifier(models / "classifier")
    x = classifier.image_processor([noise_image(row) for row in range(4)], return_tensors="pt")["pixel_values"]
    one, other = (
        methods.explain("rise", classifier, x, 0, GRID, n_samples=20, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    by_draws = (one - other).flatten(1).norm(dim=1) / one.flatten(1).norm(dim=1)
    assert max(values["sensitivity_max"]["rise@20"]) < by_draws.min()


def test_constant_maps_are_counted_and_left_out(study):
    nan = float("nan")
    summary = study.summarize(
        {"class_sensitivity": {"a": torch.tensor([0.5, nan, 0.1, 0.3]), "b": torch.full((3,), nan)}}
    )
    assert summary["constant"] == {"class_sensitivity": {"a": 1, "b": 3}}
    value, low, high = summary["class_sensitivity"]["a"]
    assert (value, low, high) == pytest.approx((0.3, 0.1, 0.5))
    assert np.isnan(summary["class_sensitivity"]["b"]).all()


def test_bad_input_is_refused_before_anything_is_computed(study, models, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CHECKS", dict.fromkeys(CHECKS))
    other = save_classifier(tmp_path / "other", hidden_size=32)
    for specs, more, said in (
        (["tve"], ["--classifier", str(other)], "The explainer .*random predicts embeddings of 24 dimensions"),
        (["tve", "grad"], [], "Unknown method 'grad'; choose one of"),
        (["centre@5"], [], "centre draws no samples; pass it without @"),
        (["tve"], ["--num_images", "0"], "gives no image with num_images=0; pass at least one"),
        (["tve"], ["--files", str(tmp_path / "none.parquet")], "none.parquet"),
    ):
        with pytest.raises(SystemExit, match=said):
            study.main(arguments(models, tmp_path / "out", *specs, more=more))
    assert not (tmp_path / "out").exists()
