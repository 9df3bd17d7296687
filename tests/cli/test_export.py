"""tve-hf export: files that torch loads back, and what is said where there are none."""

import pytest
import torch
from hub_server import User

from tve_hf.cli import main


@pytest.fixture
def owner(online, monkeypatch):
    """Log in as someone who may write to org, where the tiny models are."""
    online.users["hf_owner"] = User("someone", orgs={"org": "write"})
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    return online


def test_a_graph_beside_the_weights(owner, pair, tmp_path, capsys):
    before = owner.files("org/tve")
    output = tmp_path / "new" / "model.pt2"
    names = ["--classifier", "org/vit", "--model", "org/tve"]
    assert main(["export", *names, "--output", str(output), "--top-k", "2", "--push-to-hub"]) == 0
    assert torch.export.load(output).module()(torch.zeros(3, 3, 32, 32))[3].shape == (3, 2, 4, 4)
    assert owner.files("org/tve") == before | {"model.pt2": output.read_bytes()}
    assert str(output) in capsys.readouterr().out


def test_what_is_wrong_is_one_sentence(owner, pair, tmp_path, capsys):
    classifier, explainer = map(str, pair)
    names = ["export", "--classifier", classifier, "--model", explainer, "--output"]
    for arguments, said in (
        ([str(tmp_path / "model.bin")], "name the file .onnx or .pt2"),
        ([str(tmp_path / "model.pt2"), "--push-to-hub", "--hub-model-id", "org/none"], "no repository at"),
        ([str(tmp_path / "model.pt2"), "--top-k", "0"], "top_k is 0; pass a whole number from 1 on."),
    ):
        assert main([*names, *arguments]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("tve-hf: ") and said in line
    assert not [*tmp_path.glob("model*")]
