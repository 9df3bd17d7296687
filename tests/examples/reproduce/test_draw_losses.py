"""Losses of trainings: what is drawn is what they logged."""

import json

import pytest
from PIL import Image
from scripts import load_example


@pytest.fixture
def training(tmp_path):
    rows = [{"step": 5, "loss": 1.5, "learning_rate": 0.1}, {"step": 5, "logit_r2": 0.2}, {"step": 10, "loss": 1.25}]
    (tmp_path / "training.json").write_text(json.dumps({"log": rows}))
    return tmp_path / "training.json"


def test_losses_are_those_of_the_log_without_its_validations(training):
    draw = load_example("reproduce/draw_losses")
    assert draw.losses_of(json.loads(training.read_text())) == ([5, 10], [1.5, 1.25])
    draw.main([f"one={training}", f"two={training}", "--output_file", str(training.parent / "new" / "a.png")])
    assert Image.open(training.parent / "new" / "a.png").width > 300


@pytest.mark.parametrize(
    ("given", "said"), [(["{}"], "has no name; write NAME=FILE"), (["a={}"] * 4, "4 trainings are more than 3 lines")]
)
def test_what_cannot_be_drawn_is_said(training, tmp_path, capsys, given, said):
    with pytest.raises(SystemExit):
        load_example("reproduce/draw_losses").main(
            [*(word.format(training) for word in given), "--output_file", str(tmp_path / "a.png")]
        )
    assert said in capsys.readouterr().err and not (tmp_path / "a.png").exists()
