"""Runs that would disturb one another, processes that do not know of each other, and workers that are killed."""

import fcntl
import logging
import multiprocessing
import os
import pkgutil
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from interruptions import before_step
from tiny import save_run

from tve_hf.pretrain import PretrainArguments, loop, pretrain
from tve_hf.pretrain.processes import StopSignals, lock_folder

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def settings(tmp_path):
    return save_run(tmp_path) | {"output_dir": str(tmp_path / "run")}


def test_a_second_run_is_kept_out_until_the_first_is_killed(settings, tmp_path, monkeypatch):
    """The first hangs in its step 4, with a worker that outlives it for a while."""
    arrived = multiprocessing.Event()

    def hang():
        arrived.set()
        time.sleep(600)

    settings["dataloader_num_workers"] = 1
    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", before_step(4, hang))
    first = multiprocessing.get_context("fork").Process(target=lambda: pretrain(PretrainArguments(**settings)))
    first.start()
    try:
        assert arrived.wait(120)
        monkeypatch.setattr(loop, "take_step", take_step)
        with pytest.raises(
            OSError, match=rf"Another run \(process {first.pid} on .*\) is writing in .*run; wait for it"
        ):
            pretrain(PretrainArguments(**settings))
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "checkpoint-2"}
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    AcceleratorState._reset_state(True)
    whole = pretrain(PretrainArguments(**(settings | {"output_dir": str(tmp_path / "whole")}))).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    logger = logging.getLogger("tve_hf")
    logger.addHandler(caplog.handler)
    with lock_folder(tmp_path):
        pass
    logger.removeHandler(caplog.handler)
    assert "cannot be locked (" in caplog.text and "no other run writes there" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="Accelerate joins processes that have a GPU")
def test_processes_that_are_not_joined_are_refused(settings, tmp_path, monkeypatch):
    """As on a machine whose driver is broken: each process would train alone, in the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **settings: None)  # would wait for the other
    with pytest.raises(ValueError, match="2 processes were launched, but Accelerate joins 1, since it finds no GPU; "):
        pretrain(PretrainArguments(**settings))
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("moment", ["tve_hf.pretrain.loop.take_step", "accelerate.Accelerator.save_state"])
def test_a_killed_worker_is_told_and_the_next_start_resumes(settings, tmp_path, monkeypatch, moment):
    """Killed in a step, or while a checkpoint is being written: then it is not the disk that is blamed."""
    settings["dataloader_num_workers"] = 1
    whole = pretrain(PretrainArguments(**(settings | {"output_dir": str(tmp_path / "whole")}))).state_dict()
    AcceleratorState._reset_state(True)
    before, calls = pkgutil.resolve_name(moment), []

    def kill_worker(*arguments, **options):
        calls.append(1)
        if len(calls) == (4 if "step" in moment else 2):
            (worker,) = multiprocessing.active_children()
            worker.kill()
            time.sleep(120)  # from which the worker's end wakes
        return before(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(moment, kill_worker)
        with pytest.raises(ChildProcessError) as caught:
            pretrain(PretrainArguments(**settings))
    assert "A process that decodes images was killed, perhaps for want of memory (DataLoader worker" in str(
        caught.value
    )
    assert "lower dataloader_num_workers=1." in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**(settings | {"dataloader_num_workers": 0}))).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_second_ctrl_c_ends_at_once(settings, tmp_path, monkeypatch):
    """In the middle of the step after whose end the first would have ended the run."""

    def impatient():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(loop, "take_step", before_step(4, impatient))
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainArguments(**settings))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_ctrl_c_that_a_launcher_passes_on_too_is_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopSignals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == signal.SIGINT
