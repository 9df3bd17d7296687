"""The script for SLURM with stand-ins for its commands, and the recipe as the script reads it."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tve_hf.pretrain

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# What the script calls. `accelerate` ends as MODE says; SIGTERM ends it after a while.
COMMANDS = {
    "srun": 'export SLURM_NODEID=1; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$LOG"; [ "$1" = show ] && printf "first\\nsecond\\n"; true',
    "scancel": 'echo "scancel $*" >> "$LOG"; kill -TERM "$(cat "$LOG.pid")"',
    "accelerate": """
        trap 'sleep 0.2; exit 143' TERM
        echo "accelerate $*" >> "$LOG"
        echo $$ > "$LOG.pid.new"; mv "$LOG.pid.new" "$LOG.pid"
        [ "$MODE" = wait ] || exit "$MODE"
        while true; do sleep 0.1; done""",
}


@pytest.mark.parametrize(("mode", "status", "requeued"), [("0", 0, False), ("3", 3, False), ("wait", 143, True)])
def test_a_slurm_job_queues_itself_again_only_when_its_time_is_up(tmp_path, mode, status, requeued):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "MODE": mode}
    environment |= {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    job = subprocess.Popen([str(EXAMPLES / "slurm.sh"), "--classifier", "a b"], env=environment)
    if mode == "wait":
        for _ in range(600):
            if (tmp_path / "log.pid").exists():
                break
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == status
    lines = log.read_text().splitlines()
    assert "--num_machines 2 --num_processes 16 --machine_rank 1 --main_process_ip first" in lines[1]
    assert "examples/pretrain.py --classifier a b" in lines[1]
    assert lines[2:] == (["scancel --signal=TERM 7", "scontrol requeue 7"] if requeued else [])


def read(monkeypatch, *arguments):
    """The settings that the script would train with."""
    found = []
    monkeypatch.setattr(tve_hf.pretrain, "pretrain", found.append)
    needed = ["--classifier", "c", "--output_dir", "o"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments, *needed])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "pretrain.py"), run_name="__main__")
    assert ended.value.code == 0
    return found[0]


def test_the_recipe_holds_the_settings_of_the_paper(monkeypatch, capsys):
    """Those of arXiv 2312.15359."""
    recipe = f"@{EXAMPLES / 'recipes' / 'paper.args'}"
    settings = read(monkeypatch, recipe)
    assert (settings.grid_size, settings.hops, settings.patches_per_image) == (14, 2, 1)
    assert (settings.batch_size, settings.num_epochs, settings.learning_rate) == (64, 50, 1e-3)
    assert (settings.weight_decay, settings.warmup_ratio) == (0.05, 0.05)
    assert read(monkeypatch, recipe, "--num_epochs", "1").num_epochs == 1  # the command line goes before it
    with pytest.raises(AssertionError):
        read(monkeypatch, "@no-such-recipe")
    assert "no-such-recipe" in capsys.readouterr().err
