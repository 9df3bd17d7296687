"""What runs on a GPU gives what it gives on a CPU: `pytest -m gpu`, on a machine that has one."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import noise_image, save_run
from transformers import pipeline

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def test_the_pipeline_on_a_gpu_explains_as_on_a_cpu(pair) -> None:
    classifier, explainer = map(str, pair)
    on_cpu, on_gpu = (
        pipeline("transferable-attribution", model=explainer, classifier=classifier, device=device)
        for device in ("cpu", DEVICE)
    )
    images = [noise_image(seed) for seed in range(3)]
    for (one,), (other,) in zip(on_cpu(images, verify=8), on_gpu(images, verify=8), strict=True):
        assert one["label"] == other["label"]
        assert one["attribution"] == pytest.approx(other["attribution"], abs=1e-4)
        measured, expected = (dict(answer["verification"]) for answer in (one, other))
        assert measured.pop("rule") == expected.pop("rule") and measured.keys() == expected.keys()
        for name, value in measured.items():  # of one patch alone, correlations would be NaN
            assert math.isfinite(value) and value == pytest.approx(expected[name], rel=1e-3, abs=1e-3), name


def test_a_run_on_a_gpu_ends_as_on_a_cpu(tmp_path, monkeypatch, isolated) -> None:
    from accelerate.state import AcceleratorState

    from tve_hf.pretrain import PretrainArguments, pretrain

    settings = save_run(tmp_path) | {"normalize_labels": True, "validation_files": [str(tmp_path / "noise.parquet")]}
    for device in ("cpu", DEVICE):
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
        AcceleratorState._reset_state(True)
        pretrain(PretrainArguments(**settings, output_dir=str(tmp_path / f"on {device}")))
    one, other = (load_file(tmp_path / f"on {device}" / "model.safetensors") for device in ("cpu", DEVICE))
    for name, weight in one.items():
        assert torch.allclose(weight.float(), other[name].float(), rtol=1e-2, atol=1e-2), name
    logs = [json.loads((tmp_path / f"on {device}" / "training.json").read_text())["log"] for device in ("cpu", DEVICE)]
    for row, expected in zip(*logs, strict=True):
        assert row["kept_loss"] == pytest.approx(expected["kept_loss"], rel=1e-3)
        assert row["kept_error"] == pytest.approx(expected["kept_error"], rel=1e-2)


def test_half_precision_and_compiled_layers_on_a_gpu_learn(tmp_path, isolated) -> None:
    from tve_hf.pretrain import PretrainArguments, pretrain

    changed = {"mixed_precision": "bf16", "torch_compile": True, "num_epochs": 10, "save_steps": 4}
    pretrain(PretrainArguments(**(save_run(tmp_path) | changed), output_dir=str(tmp_path / "run")))
    log = json.loads((tmp_path / "run" / "training.json").read_text())["log"]
    assert log[-1]["kept_loss"] < log[0]["kept_loss"]
