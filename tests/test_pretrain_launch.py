"""`accelerate launch` with the configurations of examples/accelerate, on two CPU processes: stopped, and gone on."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import save_run

from tve_hf.pretrain import PretrainArguments, pretrain

ROOT = Path(__file__).resolve().parents[1]
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs `pip install deepspeed`")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Settings for two processes, and what one process with the same images in each step ends with."""
    folder = tmp_path_factory.mktemp("alone")
    settings = save_run(folder) | {"num_epochs": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        AcceleratorState._reset_state(True)
        pretrain(PretrainArguments(**(settings | {"batch_size": 4}), output_dir=str(folder / "run")))
        AcceleratorState._reset_state(True)
    return settings, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp", pytest.param("deepspeed", marks=NEEDS_DEEPSPEED)])
def test_a_launch_that_is_stopped_goes_on_and_ends_as_one_process_does(alone, tmp_path, config):
    settings, whole = alone
    arguments = []
    for name, value in (settings | {"output_dir": str(tmp_path / "run")}).items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "examples" / "accelerate" / f"{config}.yaml")]
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": str(config == "ddp").lower(),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
    }

    def run(**more: str) -> subprocess.CompletedProcess:
        command = [*launch, str(ROOT / "tests" / "launched.py"), *arguments]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=900)

    stopped = run(STOP="1")
    assert stopped.returncode != 0
    assert "Stopped by a signal; the same command goes on from step 4." in stopped.stdout, stopped.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-4"]
    resumed = run()
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed from step 4." in resumed.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["architectures"] == ["TVEExplainer"]
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", whole))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():  # written in half precision
        assert torch.allclose(weights[name].float(), weight.float(), rtol=2e-3, atol=2e-3), name
    logs = [json.loads((folder / "training.json").read_text())["log"] for folder in (tmp_path / "run", whole)]
    for one, other in zip(*logs, strict=True):
        assert one["kept_loss"] == pytest.approx(other["kept_loss"], rel=1e-3)
