"""`tve-hf bench` on a tiny classifier: what it writes, counts and refuses; what it times is not tested."""

import json

import pytest
from tiny import make_explainer, save_classifier

from tve_hf import split_classifier
from tve_hf.cli import main
from tve_hf.cli.bench import _RANDOM

SMALL = [
    "--batch_sizes",
    "2",
    "--repeats",
    "2",
    "--grid_size",
    "4",
    "--hidden_size",
    "16",
    "--num_attention_heads",
    "2",
]


def test_it_writes_json_table_and_plot(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    folder, out = save_classifier(tmp_path / "classifier"), tmp_path / "out"
    methods = ["tve", "legrad_last_2", "legrad", "rise@40", "rise@10", "libragrad"]
    arguments = ["--classifiers", str(folder), "--methods", *methods, *SMALL, "--output_dir", str(out)]
    assert main(["bench", *arguments]) == 0
    table = capsys.readouterr().out
    report = json.loads((out / "speed.json").read_text())
    assert {path.name for path in out.iterdir()} == {"speed.json", "speed.md", "speed.png"}
    assert (out / "speed.md").read_text().strip() == table.strip()
    (entry,) = report["measured"]
    rows = {row["name"]: row for row in entry["rows"]}
    assert list(rows) == ["prediction", *methods]
    one = rows["prediction"]["gflops"]
    assert rows["rise@40"]["scale"] == 2 and rows["rise@10"]["scale"] == 1
    # A pass for each masked image, and what weighs the masks, which is little.
    assert 40 * one < rows["rise@40"]["gflops"] < 41 * one
    assert 10 * one < rows["rise@10"]["gflops"] < 11 * one
    assert one < rows["tve"]["gflops"] and 1.2 * one < rows["legrad"]["gflops"] < 3 * one  # one pass and its gradient
    assert rows["legrad_last_2"]["memory_mb"] == rows["legrad"]["memory_mb"]  # it has two blocks
    assert all(len(row["all_seconds"]) == 2 for row in rows.values())


def test_what_cannot_serve_a_classifier_is_named(monkeypatch, capsys) -> None:
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1]}
    monkeypatch.setitem(_RANDOM, "tiny", ("resnet", sizes))
    arguments = ["--classifiers", "tiny", "--image_size", "64", "--methods", "rollout", "grad_cam", *SMALL]
    assert main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    assert "| rollout | refused: " in out and "| grad_cam | " in out and "| grad_cam | refused" not in out


def test_an_explainer_of_the_classifier(tmp_path, capsys) -> None:
    classifier = save_classifier(tmp_path / "classifier")
    make_explainer(split_classifier(classifier)).save_pretrained(tmp_path / "explainer")
    arguments = ["--classifiers", str(classifier), "--model", str(tmp_path / "explainer"), "--methods", "tve", *SMALL]
    assert main(["bench", *arguments, "--rule", "logit"]) == 0
    assert "| tve |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "1"], "repeats is 1; pass a whole number from 2 on"),
        (["--batch_sizes", "0"], "batch_sizes is 0; pass a whole number from 1 on"),
        (["--dtype", "int8"], "Unknown dtype 'int8'; choose one of float32, bfloat16, float16"),
        (["--rule", "magic"], "Unknown rule 'magic'"),
        (["--methods", "magic"], "Unknown method 'magic'"),
        (["--methods", "legrad@5"], "legrad draws no samples"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path, capsys, arguments, message) -> None:
    assert main(["bench", "--classifiers", str(tmp_path / "none"), *arguments]) == 1  # before anything is loaded
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
