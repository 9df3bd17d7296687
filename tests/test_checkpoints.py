"""What ships: small enough, consistent with its cards and reports, and as faithful as they say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

import tve_hf
from tve_hf.benchmark.run import EvaluateArguments, evaluate
from tve_hf.evaluation.statistics import bootstrap_interval
from tve_hf.hub.model_card import render_card
from tve_hf.released import CHECKPOINTS, DEFAULT_CLASSIFIER, DEFAULT_EXPLAINER
from tve_hf.verification import spearman

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "model_cards" / "results"
PETS = CHECKPOINTS / "vit-tiny-cats-vs-dogs"
TASKS = {"tiny_imagenet": DEFAULT_CLASSIFIER, "cats_vs_dogs": PETS}
REPORTS = [*TASKS]


def test_checkpoints_are_small_safetensors_only():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_both_tasks_share_one_backbone_that_the_explainer_knows():
    config = AutoModel.from_pretrained(DEFAULT_EXPLAINER).config
    weights = [AutoModelForImageClassification.from_pretrained(folder).vit.state_dict() for folder in TASKS.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for folder in TASKS.values():
        classifier = tve_hf.split_classifier(folder)
        assert tve_hf.fingerprint.match(config.backbone_fingerprint, classifier.fingerprint()) == "same weights"


def test_empty_embedding_is_that_of_the_empty_image():
    explainer = AutoModel.from_pretrained(DEFAULT_EXPLAINER)
    classifier = tve_hf.split_classifier(DEFAULT_CLASSIFIER)
    empty = classifier.embed(torch.zeros(1, 3, *explainer.config.image_shape))[0]
    assert torch.allclose(explainer.empty_embedding, empty, atol=5e-3)  # fp16 on disk


@pytest.mark.parametrize(("name", "least_gap"), [("tiny_imagenet", 0.38), ("cats_vs_dogs", 0.58)])
def test_explainer_is_more_faithful_than_its_rivals_of_one_pass_on_both_tasks(name, least_gap):
    """By paired intervals, than exact two-state maps of 128 passes too; cats against dogs it has never seen."""
    report = json.loads((RESULTS / name / "report.json").read_text())
    per_image, rows = report["per_image"], report["summary"]["fidelity"]
    assert report["num_images"] >= 300
    assert report["rule"] == "prob"

    def gap(method, removal="zero"):
        plus, minus = (torch.tensor(per_image[f"{method}/{removal}/{side}"]) for side in ("plus", "minus"))
        return plus - minus

    assert gap("tve").mean() >= least_gap
    for rival in rows["zero"].keys() - {"tve"}:
        assert bootstrap_interval(gap("tve") - gap(rival))[0] > 0, rival


def test_default_rule_is_the_winner_of_the_study():
    study = json.loads((RESULTS / "rules.json").read_text())
    assert study["winner"] == tve_hf.DEFAULT_RULE
    # Two backbones, two removal operators, exact and predicted maps of both.
    assert len(study["cases"]) == 2
    for table in study["cases"].values():
        assert set(table) == set(tve_hf.RULES) - {"prob"}  # which came with random backgrounds
        assert set(table["log_prob"]) == {f"{s}/{r}" for s in ("exact", "predicted") for r in ("zero", "blur")}
    # The share of the best rule's gap that a rule keeps, over all of them.
    shares = []
    for table in study["cases"].values():
        for column in table["log_prob"]:
            best = max(row[column]["gap"] for row in table.values())
            shares.append(table[study["winner"]][column]["gap"] / best)
    signed = [
        name for name in study["mean_share_of_best"] if tve_hf.RULES[name].kept and not tve_hf.RULES[name].standardized
    ]
    assert study["winner"] == max(signed, key=study["mean_share_of_best"].get)
    assert study["mean_share_of_best"][study["winner"]] == pytest.approx(sum(shares) / len(shares), abs=2e-3)


@pytest.mark.parametrize("folder", [*TASKS.values(), DEFAULT_EXPLAINER], ids=lambda folder: folder.name)
def test_card_is_what_the_reports_say(folder):
    results = [RESULTS / name for name in REPORTS] if folder == DEFAULT_EXPLAINER else []
    card = (ROOT / "model_cards" / f"{folder.name}.md").read_text()
    assert str(render_card(folder, results, license="cc-by-nc-4.0")).strip() == card.strip()


@pytest.mark.parametrize("task", TASKS)
def test_report_is_what_the_checkpoints_give(task, shared_data, tmp_path):
    report = json.loads((RESULTS / task / "report.json").read_text())
    settings = report["settings"] | {
        "classifier": str(TASKS[task]),
        "model": str(DEFAULT_EXPLAINER),
        "vit_shapley": None,
        "test_files": [str(path) for path in (shared_data / task).glob("test-*.parquet")],
        "num_images": 20,
        "methods": ["chefer_cam"],
        "removals": ["zero"],
        "num_gallery": 0,
        "output_dir": str(tmp_path),
    }
    again = evaluate(EvaluateArguments(**settings))["per_image"]
    assert {"r2", "tve/zero/plus", "chefer_cam/zero/minus"} <= again.keys() & report["per_image"].keys()
    for key in again.keys() & report["per_image"].keys():
        values = again[key]
        expected = [float(value) for value in report["per_image"][key][:20]]
        assert values == pytest.approx(expected, abs=5e-3, rel=1e-2), key


def test_explainer_reads_the_image_not_only_its_place(shared_data):
    """Its maps follow their own image: they agree with its sampled map better than the mean map does."""
    from datasets import load_dataset

    files = [str(path) for path in (shared_data / "tiny_imagenet").glob("test-*.parquet")]
    rows = load_dataset("parquet", data_files=files, split="train")[-24:]
    classifier = tve_hf.split_classifier(DEFAULT_CLASSIFIER)
    images = [image.convert("RGB") for image in rows["image"]]
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    class_idx = classifier(pixel_values).logits.argmax(-1)
    explainer = AutoModel.from_pretrained(DEFAULT_EXPLAINER)
    predicted = tve_hf.methods.explain("tve", classifier, pixel_values, class_idx, explainer=explainer).flatten(1)
    sampled = tve_hf.methods.explain("sampled", classifier, pixel_values, class_idx, 8, n_samples=256, rule="prob")
    sampled = sampled.flatten(1)
    by_mean_map = spearman(sampled.mean(0, keepdim=True).expand_as(sampled), sampled).median()
    assert spearman(predicted, sampled).median() > 0.2 + by_mean_map
