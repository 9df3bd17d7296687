"""`accelerate launch` with the configurations of examples/accelerate, on two CPU processes: stopped, and gone on."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from hub_server import User
from safetensors.torch import load_file
from tiny import GRID, HOPS, SIDE, save_run
from trunks import MAE

from tve_hf import TVEExplainer, split_classifier
from tve_hf.pretrain import PretrainArguments, config_for, pretrain

ROOT = Path(__file__).resolve().parents[2]
NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed; `make test-extras` makes a place that has it"
)

SHARDED = ("fsdp", "deepspeed")
CONFIGS = ROOT / "examples" / "accelerate"
ONE = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TWO = ["--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Settings for two processes, and what one process with the same images in each step ends with."""
    folder = tmp_path_factory.mktemp("alone")
    settings = save_run(folder) | {"num_epochs": 3}
    return settings, run_alone(settings | {"batch_size": 4}, folder)


def run_alone(settings: dict[str, Any], folder: Path) -> Path:
    """Pre-train in this process; return the folder of the explainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        AcceleratorState._reset_state(True)
        pretrain(PretrainArguments(**settings, output_dir=str(folder / "run")))
        AcceleratorState._reset_state(True)
    return folder / "run"


def launch(launcher: list[str], settings: dict[str, Any], folder: Path, **environment: str) -> CompletedProcess[str]:
    """Pre-train in `folder / "tve-tiny"` by `accelerate launch`, on CPUs."""
    sharded = any(Path(argument).stem in SHARDED for argument in launcher)
    arguments = []
    for name, value in (settings | {"output_dir": str(folder / "tve-tiny")}).items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    own = {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": str(not sharded).lower(),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(ROOT / "tests" / "launched.py")]
    environment = os.environ | own | environment
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, to rounding: they are written in half precision."""
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, other))
    return weights.keys() == expected.keys() and all(
        torch.allclose(weights[name].float(), expected[name].float(), rtol=2e-3, atol=2e-3) for name in expected
    )


def losses(folder: Path) -> list[float]:
    """Those of kept in a run's log."""
    return [row["kept_loss"] for row in json.loads((folder / "training.json").read_text())["log"]]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp", pytest.param("deepspeed", marks=NEEDS_DEEPSPEED)])
def test_a_launch_that_is_stopped_goes_on_and_ends_as_one_process_does(alone, tmp_path, hub, config):
    settings, whole = alone
    hub.users["hf_ada"] = User("ada")
    pushed = settings | {"push_to_hub": "true"}
    launcher = [*TWO, "--config_file", str(CONFIGS / f"{config}.yaml")]
    client = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_ada", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    stopped = launch(launcher, pushed, tmp_path, STOP="SIGTERM", **client)
    assert stopped.returncode != 0
    assert "Stopped by a signal; the same command goes on from step 4." in stopped.stdout, stopped.stderr
    run = tmp_path / "tve-tiny"
    assert [path.name for path in run.iterdir()] == ["checkpoint-4"]

    resumed = launch(launcher, pushed, tmp_path, **client)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed from step 4." in resumed.stdout
    assert json.loads((run / "config.json").read_text())["architectures"] == ["TVEExplainer"]
    assert same_weights(run, whole)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)
    # By the main process alone.
    assert sum(bool(re.match("POST .*/commit/", request)) for request in hub.requests) == 1
    assert hub.files("ada/tve-tiny")["model.safetensors"] == (run / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [(ONE, "SIGTERM"), ([*TWO, "--config_file", str(CONFIGS / "ddp.yaml")], "SIGUSR1")],
    ids=["one process", "two"],
)
def test_what_a_launcher_leaves_behind_saves_and_ends(tmp_path, launcher, number):
    stopped = launch(launcher, save_run(tmp_path) | {"num_epochs": 3}, tmp_path, STOP=number)
    assert stopped.returncode == -signal.Signals[number]
    assert "Stopped by a signal; the same command goes on from step 4." in stopped.stdout, stopped.stderr
    assert [path.name for path in (tmp_path / "tve-tiny").iterdir()] == ["checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rounding"), [("no", 1e-4), ("bf16", 2**-7)])
def test_fsdp_shards_the_trunk_of_the_paper(tmp_path, precision, rounding):
    settings = save_run(tmp_path) | {"mixed_precision": precision, "explainer": str(tmp_path / "explainer")}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        del settings[name]
    classifier = split_classifier(settings["classifier"])
    shape = {"trunk": "vit_mae", "num_head_layers": 3, "mae_config": MAE | {"image_size": SIDE, "patch_size": 8}}
    torch.manual_seed(0)
    TVEExplainer(config_for(classifier, GRID, HOPS, **shape)).save_pretrained(tmp_path / "explainer")
    whole = run_alone(settings | {"batch_size": 4}, tmp_path / "alone")
    config = ["--config_file", str(CONFIGS / "fsdp.yaml")]
    wrapped = ["--fsdp_transformer_layer_cls_to_wrap", "ViTMAELayer,TVEMixerLayer"]
    ended = launch([*TWO, *config, *wrapped], settings, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "tve-tiny") == pytest.approx(losses(whole), rel=rounding)
    if precision == "no":  # Adam makes whole steps of what half precision rounds
        assert same_weights(tmp_path / "tve-tiny", whole)
