"""The study of small explainers: its Pareto front against the definition, and the command from end to end."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import GRID, HOPS, save_run

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("study_sizes", EXAMPLES / "study_sizes.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study_sizes", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(5))
def test_the_front_holds_what_nothing_cheaper_reaches(study, seed):
    values = torch.rand(8, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    values[3][0] = values[4][0]  # two of one cost: the better one alone
    rows = [{"size": str(i), "share": share, "zero": {"gap": gap}} for i, (share, gap) in enumerate(values)]
    expected = {
        str(i)
        for i, (share, gap) in enumerate(values)
        if not any(other_share <= share and other > gap for other_share, other in values)
    }
    assert set(study.on_front(rows, "zero")) == expected


@pytest.mark.usefixtures("isolated")
def test_the_command_goes_on_and_counts(study, tmp_path, monkeypatch):
    settings = save_run(tmp_path, 6)
    arguments = ["--classifier", settings["classifier"], "--train_files", *settings["train_files"]]
    arguments += ["--test_files", *settings["train_files"], "--numbers", "6", "--max_steps", "2", "--batch_size", "4"]
    arguments += ["--grid_size", str(GRID), "--hops", str(HOPS), "--num_images", "4", "--sizes", "8x1", "32x2"]
    arguments += ["--output_dir", str(tmp_path / "runs"), "--output_file", str(tmp_path / "sizes.json")]
    arguments += ["--plot", str(tmp_path / "sizes.png")]
    AcceleratorState._reset_state(True)
    study.main(arguments)
    first = json.loads((tmp_path / "sizes.json").read_text())
    small, large = first["rows"]
    assert [small["size"], large["size"]] == ["8x1", "32x2"]
    assert small["share"] < large["share"] and small["parameters"] < large["parameters"]
    assert (tmp_path / "sizes.png").is_file()
    monkeypatch.setattr("study_passes.pretrain", None)  # nothing is trained again
    study.main(arguments)
    assert json.loads((tmp_path / "sizes.json").read_text()) == first
