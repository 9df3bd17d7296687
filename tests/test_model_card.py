"""Cards say what the JSON files say, and parse as the Hub parses them."""

import json

import pytest
from huggingface_hub import ModelCard

from tve_hf.cli import main
from tve_hf.model_card import render_card


@pytest.fixture
def explainer_folder(tmp_path):
    folder = tmp_path / "tve-toy"
    folder.mkdir()
    config = {
        "model_type": "tve",
        "backbone_name": "toy-vit",
        "backbone_fingerprint": "abc-def",
        "grid_size": 4,
        "image_size": [32, 32],
        "hops": 1,
        "embedding_dim": 24,
    }
    arguments = {"batch_size": 64, "patches_per_image": 8, "learning_rate": 0.001, "num_epochs": 2, "seed": 0}
    arguments["train_files"] = ["toy/train.parquet"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training.json").write_text(json.dumps({"arguments": arguments, "log": [{"step": 1234}]}))
    return folder


@pytest.fixture
def report(tmp_path):
    method = {
        "plus_auc": [0.31, 0.11],
        "minus_auc": [0.12, 0.07],
        "gap": [0.19, 0.13],
        "gap_above_random": [0.15, 0.21],
    }
    summary = {
        "accuracy": 0.4321,
        "median_spearman": 0.765,
        "mean_kept_error": 0.283,
        "mean_removed_error": 0.1234,
        "mean_error_nats": 0.456,
        "median_epsilon": 0.789,
        "fidelity": {"zero": {"tve": method, "random": method, "tve_share_of_exact": 0.913}},
    }
    path = tmp_path / "toy_task.json"
    path.write_text(json.dumps({"num_images": 321, "settings": {"rule": "log_prob"}, "summary": summary}))
    return path


def test_explainer_card_holds_the_numbers_and_parses(explainer_folder, report):
    card = render_card(explainer_folder, [report])
    parsed = ModelCard(str(card))
    assert parsed.data.license == "cc-by-nc-4.0"
    assert parsed.data.to_dict()["library_name"] == "transformers"
    for text in (
        "| toy_task",
        "43.2%",
        "0.77",
        "0.28",
        "0.123",
        "0.46",
        "0.79",
        "321",
        "1234 steps",
        "`toy-vit`",
        "toy/train.parquet",
    ):
        assert text in parsed.text, text
    assert "| toy_task | zero | tve | 0.310 ± 0.110 | 0.120 ± 0.070 | 0.190 ± 0.130 | 0.150 to 0.210 |" in parsed.text
    assert "91% on toy_task" in parsed.text
    assert "$" not in parsed.text


def test_classifier_card(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "image_size": 48, "patch_size": 6, "id2label": {"0": "a", "1": "b"}})
    )
    (tmp_path / "training.json").write_text(json.dumps({"test_accuracy": 0.875, "arguments": {"seed": 3}}))
    card = render_card(tmp_path, [])
    assert "48 × 48 pixels in patches of 6 × 6" in card.text
    assert "87.5%" in card.text and "2 classes" in card.text and "`seed`: `3`" in card.text


def test_missing_file_is_named(tmp_path, capsys):
    output = tmp_path / "card.md"
    assert main(["card", str(tmp_path), "--output", str(output)]) == 1
    assert "config.json does not exist" in capsys.readouterr().err
    assert not output.exists()


def test_command_writes_the_card(explainer_folder, report, tmp_path):
    output = tmp_path / "card.md"
    assert main(["card", str(explainer_folder), "--results", str(report), "--output", str(output)]) == 0
    assert ModelCard.load(output).text.strip() == render_card(explainer_folder, [report]).text.strip()
