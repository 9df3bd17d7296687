"""An explainer that is made over to another backbone."""

import json
import logging

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import GRID, SIDE
from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification

import tve_hf
from tve_hf.pretrain import PretrainArguments, pretrain


def test_fine_tuning_on_a_fine_tuned_backbone(settings, classifier, tmp_path, caplog):
    first = pretrain(PretrainArguments(**settings))
    AcceleratorState._reset_state(True)
    model = ViTForImageClassification.from_pretrained(classifier)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "tuned")
    AutoImageProcessor.from_pretrained(classifier).save_pretrained(tmp_path / "tuned")
    changed = {name: value for name, value in settings.items() if name not in ("grid_size", "hops", "hidden_size")}
    changed |= {"classifier": str(tmp_path / "tuned"), "explainer": str(tmp_path / "run"), "num_epochs": 1}
    changed |= {"output_dir": str(tmp_path / "ft"), "learning_rate": 1e-6}
    with caplog.at_level("WARNING"):
        logging.getLogger("tve_hf").addHandler(caplog.handler)
        tuned = pretrain(PretrainArguments(**changed))
        logging.getLogger("tve_hf").removeHandler(caplog.handler)
    assert "other backbone weights" in caplog.text
    split = tve_hf.split_classifier(tmp_path / "tuned")
    saved = AutoModel.from_pretrained(tmp_path / "ft")
    assert saved.config.backbone_fingerprint == split.fingerprint() != first.config.backbone_fingerprint
    assert saved.config.backbone_name == "tuned"
    empty = split.embed(torch.zeros(1, 3, SIDE, SIDE))[0]
    assert torch.allclose(saved.empty_embedding, empty, rtol=1e-3, atol=1e-3)
    for name, weight in first.named_parameters():  # a start from the old weights, hardly moved
        assert torch.allclose(tuned.get_parameter(name), weight, atol=1e-2), name
    report = json.loads((tmp_path / "ft" / "training.json").read_text())
    assert report["arguments"]["grid_size"] == GRID and report["arguments"]["hidden_size"] == 16
    with pytest.raises(ValueError, match="has hops=1; leave hops=0 out"):
        pretrain(PretrainArguments(**(changed | {"hops": 0, "output_dir": str(tmp_path / "other")})))
