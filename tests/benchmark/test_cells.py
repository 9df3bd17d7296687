"""Cells are computed once, never half-written; passes are counted."""

import json

import pytest
import torch
from torch import nn

from tve_hf.benchmark.cells import Cells, digest
from tve_hf.benchmark.cost import counting
from tve_hf.classifiers.parts import Backbone, HeadPart


def test_a_cell_is_computed_once_and_survives(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"scores": torch.arange(6.0).view(2, 3).T}

    first = Cells(tmp_path, {"a": 1}).get("maps/x/0", compute)
    again = Cells(tmp_path, {"a": 1}).get("maps/x/0", compute)
    assert calls == [1] and torch.equal(first["scores"], again["scores"])
    with pytest.raises(KeyError):
        Cells(tmp_path, {"a": 1}).get("maps/y/0")


def test_a_failed_cell_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    cells = Cells(tmp_path, {})
    monkeypatch.setattr("tve_hf.benchmark.cells.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        cells.get("x", lambda: {"a": torch.ones(1)})
    monkeypatch.undo()
    assert not (tmp_path / "x.safetensors").exists()
    assert torch.equal(cells.get("x", lambda: {"a": torch.zeros(1)})["a"], torch.zeros(1))


def test_other_settings_are_refused_by_name(tmp_path):
    Cells(tmp_path, {"seed": 0, "grid": (4, 4)})
    with pytest.raises(ValueError, match=r"seed was 0, now 1"):
        Cells(tmp_path, {"seed": 1, "grid": (4, 4)})
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 0


def test_a_setting_may_come_later_but_not_change(tmp_path):
    Cells(tmp_path, {"seed": 0})
    Cells(tmp_path, {"rule": "a"})
    with pytest.raises(ValueError, match=r"rule was 'a', now 'b'"):
        Cells(tmp_path, {"seed": 0, "rule": "b"})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 0, "rule": "a"}


def test_digest_sees_one_changed_bit():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    before = digest(model)
    assert digest(model) == before
    with torch.no_grad():
        model.bias[1] += 1
    assert digest(model) != before


def test_passes_are_counted_forwards_and_backwards():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with counting(Backbone(model, [HeadPart("2", input_shape=(4,))])) as cost:
        with torch.no_grad():
            model(torch.randn(5, 3))
        model(torch.randn(2, 3)).sum().backward()
        model(torch.randn(2, 3))
    assert (cost.forward, cost.backward) == (9, 2)
    assert cost.seconds > 0
    model(torch.randn(7, 3))
    assert cost.forward == 9 and not model._forward_pre_hooks and not model[2]._forward_pre_hooks
