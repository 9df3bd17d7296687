"""Checkpoints are complete or absent, whenever a run is killed; a full disk is told from all other errors."""

import errno
import os
import pkgutil
import resource
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from interruptions import at_call, die, fill_disk, in_a_fork
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from tve_hf.pretrain import PretrainArguments, pretrain
from tve_hf.pretrain.checkpointing import is_disk_full, writing

# Where a run of six steps and three checkpoints is killed: what stands for which function, at which call.
KILLS = {
    "in a step": ("tve_hf.pretrain.loop.exact_labels", 4),
    "before a checkpoint": ("accelerate.Accelerator.save_state", 2),
    "weights written": ("accelerate.checkpointing.torch.save", 5),
    "all but progress written": ("tve_hf.pretrain.checkpointing.sync_to_disk", 2),
    "before the rename": ("tve_hf.pretrain.checkpointing.os.replace", 2),
    "after the rename": ("tve_hf.pretrain.checkpointing.os.replace", 3),
    "removing the old one": ("tve_hf.pretrain.checkpointing.shutil.rmtree", 1),
    "writing the explainer": ("tve_hf.TVEExplainer.save_pretrained", 1),
    "moving the explainer": ("tve_hf.pretrain.finish.os.replace", 7),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_at_any_moment_it_ends_with_the_same_weights(whole, isolated, tmp_path, moment):
    settings, weights, file = whole
    settings = settings | {"output_dir": str(tmp_path / "run")}
    place, number = KILLS[moment]

    def killed():
        owner, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        setattr(owner, name, at_call(number, die, getattr(owner, name)))
        pretrain(PretrainArguments(**settings))

    assert in_a_fork(killed) == -signal.SIGKILL
    assert list((tmp_path / "run").glob("checkpoint-*[0-9]"))
    torch.manual_seed(99)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == file
    assert not list((tmp_path / "run").glob("*.partial*"))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_killed_while_it_keeps_labels_it_ends_with_the_same_weights(whole, isolated, tmp_path):
    """The 2nd row is written before any checkpoint, the 6th in the last step of the first epoch, the 7th after it."""
    settings = whole[0] | {"cache_labels": True}
    weights = pretrain(PretrainArguments(**settings, output_dir=str(tmp_path / "whole"))).state_dict()
    write = os.pwrite

    def die_halfway(file, row, place):
        write(file, row[: len(row) // 2], place)
        die()

    for number in (2, 6, 7):
        AcceleratorState._reset_state(True)
        run = PretrainArguments(**settings, output_dir=str(tmp_path / f"{number}"))

        def killed(run=run, number=number):
            os.pwrite = at_call(number, die_halfway, write)
            pretrain(run)

        assert in_a_fork(killed) == -signal.SIGKILL
        assert (tmp_path / f"{number}" / "labels.f16").stat().st_size > 0
        torch.manual_seed(99)
        resumed = pretrain(run).state_dict()
        assert all(torch.equal(weights[name], resumed[name]) for name in weights), number


@pytest.mark.parametrize("name", ["accelerate.checkpointing.torch.save", "tve_hf.pretrain.checkpointing.os.replace"])
def test_a_full_disk_leaves_the_last_checkpoint(whole, isolated, tmp_path, monkeypatch, name):
    settings, weights, _ = whole
    settings = settings | {"output_dir": str(tmp_path / "run")}
    owner, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, at_call(5 if "torch" in name else 2, fill_disk, getattr(owner, attribute)))
        with pytest.raises(OSError, match="step 4 could not .*No space left.*checkpoint-2 is intact. Free"):
            pretrain(PretrainArguments(**settings))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    AcceleratorState._reset_state(True)
    resumed = pretrain(PretrainArguments(**settings)).state_dict()
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_a_limit_on_file_size_is_a_full_disk_too(whole, isolated, tmp_path):
    """No stand-in: the system itself refuses to write more than 20 KB in a file, by whichever library."""
    settings = whole[0] | {"output_dir": str(tmp_path / "run")}
    message = tmp_path / "message"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            pretrain(PretrainArguments(**settings))
        except OSError as error:
            message.write_text(str(error))
            raise SystemExit(7) from error

    assert in_a_fork(limited) == 7
    assert "checkpoint of step 2 could not be written" in message.read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_checkpoints_to_keep(settings, tmp_path):
    pretrain(PretrainArguments(**(settings | {"save_total_limit": 2})))
    names = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-6"}


def test_an_error_that_is_not_the_disks_is_not_blamed_on_it(whole, isolated, tmp_path, monkeypatch):
    settings = whole[0] | {"output_dir": str(tmp_path / "run")}

    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("accelerate.checkpointing.torch.save", at_call(5, fail, torch.save))
    with pytest.raises(RuntimeError, match="^CUDA error: an illegal memory access was encountered$"):
        pretrain(PretrainArguments(**settings))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


WRITERS = {
    "torch.save": lambda path: torch.save({"weight": torch.zeros(100_000)}, path),
    "torch.save to an open file": lambda path: torch.save({"weight": torch.zeros(100_000)}, path.open("wb")),
    "safetensors": lambda path: save_file({"weight": torch.zeros(100_000)}, path),
    "Python": lambda path: path.write_bytes(bytes(400_000)),
    "Pillow": lambda path: Image.effect_noise((400, 400), 50).save(path, "png"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_is_understood_on_a_full_disk(tmp_path, writer):
    """The system itself refuses: what each library makes of that is its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)) as caught:
            WRITERS[writer](tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_disk_full(caught.value)


def cut_short() -> RuntimeError:
    """What `torch.save` raises where another error ended it in the middle of a file."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    error.__context__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        cut_short(),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
        AttributeError("'NoneType' object has no attribute 'save'"),
    ],
)
def test_other_errors_surface_as_they_are(tmp_path, error):
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(type(error)) as caught, writing("The explainer", tmp_path, tmp_path / "new.partial"):
        raise error
    assert caught.value is error and not list(tmp_path.iterdir())
