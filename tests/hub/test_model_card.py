"""Cards say what the JSON files say, parse as the Hub parses them, and their code runs."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from shipped import VIT, VIT_EXPLAINER
from tiny import noise_image
from transformers import pipeline

from tve_hf import TVEConfig
from tve_hf.cli import main
from tve_hf.hub.model_card import render_card
from tve_hf.released import CHECKPOINTS


@pytest.fixture
def explainer_folder(tmp_path):
    folder = tmp_path / "tve-toy"
    folder.mkdir()
    config = {
        "model_type": "tve",
        "backbone_name": "toy/vit",
        "backbone_fingerprint": "abc-def",
        "grid_size": 4,
        "image_size": [32, 32],
        "hops": 1,
        "embedding_dim": 24,
    }
    arguments = {"batch_size": 64, "patches_per_image": 8, "learning_rate": 0.001, "num_epochs": 2, "seed": 0}
    arguments["train_files"] = ["toy/train.parquet", "hf://datasets/toy/cats@main/data/*.parquet"]
    log = [{"step": 12, "images_per_second": 1.0}, {"step": 1234, "images_per_second": 56.78}]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training.json").write_text(json.dumps({"arguments": arguments, "log": log}))
    return folder


@pytest.fixture
def report(tmp_path):
    """A report with numbers that are easy to find again, in the form of those that `evaluate` writes."""
    method = {"plus_auc": [0.31, 0.11], "minus_auc": [0.12, 0.07], "gap": [0.19, 0.13]}
    compared = method | {"gap_above_random": [0.15, 0.21], "p_random": 0.0123}
    summary = {
        "accuracy": 0.4321,
        "median_spearman": 0.765,
        "mean_kept_error": 0.283,
        "mean_removed_error": 0.1234,
        "mean_error_nats": 0.456,
        "median_epsilon": "inf",
        "fidelity": {"zero": {"tve": compared, "random": method}},
        "tve_share_of_exact": {"zero": 0.913},
    }
    cost = {name: {"seconds": 0.0321, "forward": 1.0, "backward": 0.0} for name in ("tve", "random")}
    found = {"num_images": 321, "settings": {"rule": "log_prob"}, "summary": summary, "cost": cost}
    folder = tmp_path / "toy_task"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(found))
    return folder


def test_explainer_card_holds_the_numbers(explainer_folder, report):
    text = render_card(explainer_folder, [report]).text
    for part in (
        "| toy_task |",
        "43.2%",
        "0.77",
        "0.28",
        "0.123",
        "0.46",
        "| inf |",
        "321",
        "1234 steps, at the end 56.8 images a second",
        "`toy/vit`",
        "fingerprint `abc-def`",
        "toy/train.parquet",
        "on toy_task 91% (zero)",
        '    model="tve-toy",\n    classifier="toy/vit",',
        "docs/chelsea.png",
    ):
        assert part in text, part
    row = "| tve | 0.310 ± 0.110 | 0.120 ± 0.070 | 0.190 ± 0.130 | +0.150 to +0.210 (p 0.012) |"
    assert row in text.split("### toy_task")[1]
    assert "$" not in text


def test_explainer_card_is_metadata_for_the_hub(explainer_folder, report):
    data = ModelCard(str(render_card(explainer_folder, [report], "org/tve-toy"))).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert data.base_model == "toy/vit" and data.datasets == ["toy/cats"]
    assert {"tve_hf", "transferable-attribution"} <= set(data.tags)
    assert data.model_name == "tve-toy"
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("toy_task", "spearmanr"): 0.765, ("toy_task", "fidelity_gap_zero"): 0.19}


@pytest.mark.parametrize("measured", [True, False])
def test_licence_is_the_one_that_is_given(explainer_folder, report, measured):
    reports = [report] if measured else []
    card = ModelCard(str(render_card(explainer_folder, reports, license="mit")))
    assert card.data.license == "mit" and "| licence of the weights | `mit` |" in card.text
    none = ModelCard(str(render_card(explainer_folder, reports)))
    assert "license" not in none.data.to_dict() and "| licence of the weights | none is named |" in none.text


def test_local_names_are_not_given_as_those_of_the_hub(explainer_folder, report):
    for name, changes in (("config.json", {"backbone_name": "vit"}), ("training.json", None)):
        stored = json.loads((explainer_folder / name).read_text())
        if changes is None:
            stored["arguments"]["train_files"] = ["images/*.parquet", "data/toy_task/train-*.parquet"]
        (explainer_folder / name).write_text(json.dumps(stored | (changes or {})))
    data = render_card(explainer_folder, [report]).data
    assert data.base_model is None
    assert data.datasets == ["toy_task"]  # it is called so by the one who evaluated on it


def test_report_is_taken_by_folder_or_file_and_two_of_a_name_are_refused(explainer_folder, report, tmp_path):
    one, other = (str(render_card(explainer_folder, [path])) for path in (report, report / "report.json"))
    assert one == other
    again = tmp_path / "again" / "toy_task"
    again.mkdir(parents=True)
    (again / "report.json").write_text((report / "report.json").read_text())
    with pytest.raises(ValueError, match="Two reports of one task"):
        render_card(explainer_folder, [report, again])


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("size", [32, [32, 48]])
def test_size_in_either_form_of_the_config(explainer_folder, report, measured, size):
    """As transformers saves them: one number, the default form, is a square."""
    config = TVEConfig(image_size=size, grid_size=4, embedding_dim=24, backbone_name="toy/vit")
    config.save_pretrained(explainer_folder)
    assert json.loads((explainer_folder / "config.json").read_text())["image_size"] == size
    text = render_card(explainer_folder, [report] if measured else []).text
    (line,) = (line for line in text.splitlines() if line.startswith("| image, grid, hops |"))
    assert f"| {'32 × 32' if size == 32 else '32 × 48'} pixels, 4 × 4 patches, 2 |" in line


def test_own_picture_is_shown(explainer_folder, report):
    (explainer_folder / "example.png").touch()
    assert "](example.png)" in render_card(explainer_folder, [report]).text


def test_card_of_what_evaluate_writes(reports):
    """Every number of the metadata and of the agreement is in the reports."""
    card = render_card(VIT_EXPLAINER, reports)
    data = ModelCard(str(card)).data
    summaries = {path.name: json.loads((path / "report.json").read_text())["summary"] for path in reports}
    assert data.datasets == ["tiny_imagenet"] and data.base_model is None
    assert {result.dataset_name for result in data.eval_results} == set(summaries)
    for result in data.eval_results:
        summary = summaries[result.dataset_name]
        _, _, removal = result.metric_type.rpartition("_")
        gap = summary["fidelity"][removal]["tve"]["gap"][0] if removal in summary["fidelity"] else None
        assert result.metric_value == (summary["median_r2"] if gap is None else gap)
    for task, summary in summaries.items():
        table = card.text.split(f"### {task}\n")[1].split("\n#")[0]
        for removal, rows in summary["fidelity"].items():
            block = table.split(f"Removed pixels: {removal}")[1].split("**")[1]
            for method in ("tve", "exact", "random"):
                mean, deviation = rows[method]["gap"]
                (line,) = (line for line in block.splitlines() if line.startswith(f"| {method} |"))
                assert f"{mean:.3f} ± {deviation:.3f}" in line


@pytest.mark.parametrize(
    ("name", "measured"),
    [*((path.name, False) for path in sorted(CHECKPOINTS.iterdir())), (VIT_EXPLAINER.name, True)],
)
def test_code_of_the_cards_runs(name, measured, reports, tmp_path, monkeypatch):
    """Where the names in the cards are those of folders at hand."""
    card = render_card(CHECKPOINTS / name, reports if measured else [])
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert blocks
    for folder in CHECKPOINTS.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    noise_image(0).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    if "explanation" in namespace:
        pair = {"model": str(VIT_EXPLAINER), "classifier": str(VIT)} if name == VIT_EXPLAINER.name else {}
        (expected,) = pipeline("transferable-attribution", **pair)("photo.jpg")
        assert namespace["explanation"]["label"] == expected["label"]
        assert (tmp_path / "why.png").exists()
    else:
        assert namespace["classify"]("photo.jpg")


def test_classifier_card(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "image_size": 48, "patch_size": 6, "id2label": {"0": "a", "1": "b"}})
    )
    (tmp_path / "training.json").write_text(json.dumps({"test_accuracy": 0.875, "arguments": {"seed": 3}}))
    card = render_card(tmp_path, [])
    assert "48 × 48 pixels in patches of 6 × 6" in card.text
    assert "87.5%" in card.text and "2 classes" in card.text and "`seed`: `3`" in card.text
    assert "model-index" not in card.data.to_dict()
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mobilenet_v2", "image_size": 48, "id2label": {"0": "a", "1": "b"}})
    )
    log = [{"test_accuracy": 0.5}, {"test_accuracy": 0.6875, "large_test_accuracy": 0.81, "large_test_images": 84}]
    arguments = {"classifier": "models/big", "classifier_license": "apache-2.0"}
    (tmp_path / "training.json").write_text(json.dumps({"arguments": arguments, "log": log}))
    text = render_card(tmp_path, []).text
    assert (
        "`mobilenet_v2`" in text
        and "48 × 48 pixels. It is right on 68.8% of its held-out images, and on 81.0% of 84" in text
    )
    assert "Fine-tuned from `models/big`, apache-2.0." in text


def test_missing_file_is_named(tmp_path, capsys):
    output = tmp_path / "card.md"
    assert main(["card", str(tmp_path), "--output", str(output)]) == 1
    assert "config.json does not exist" in capsys.readouterr().err
    assert not output.exists()


def test_command_writes_the_card(explainer_folder, report, tmp_path):
    output = tmp_path / "card.md"
    arguments = [str(explainer_folder), "--results", str(report), "--license", "mit", "--output", str(output)]
    assert main(["card", *arguments]) == 0
    assert output.read_text().strip() == str(render_card(explainer_folder, [report], license="mit")).strip()
