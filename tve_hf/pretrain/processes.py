"""The processes of a run: joined, alone in their folder, asked to stop, or killed."""

import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from transformers.utils import logging

from .arguments import PretrainArguments

logger = logging.get_logger(__name__)

LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"}  # by Accelerate's launcher, by torchrun's
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # the last by Ctrl-C
WORKER_DIED = "DataLoader worker (pid"  # so begins what torch says of a worker that was killed


def join_processes(args: PretrainArguments) -> Accelerator:
    """Let Accelerate join the processes of this launch.

    Raises:
        ValueError: If it does not, and each would train alone.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / "logs")),
    )
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate joins {accelerator.num_processes}, since it finds no "
            "GPU; mend that, or set ACCELERATE_USE_CPU=true to train on CPUs."
        )
    return accelerator


@contextmanager
def lock_folder(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of `output_dir`, in a with-block. The lock dies with this process, whatever kills it.

    Raises:
        OSError: If another run is in it.
    """
    path = output_dir / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by workers
            if os.fstat(file.fileno()).st_nlink == 0:
                raise BlockingIOError("removed by a run that has just ended")
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise OSError(
                f"Another run{file.read()} is writing in {output_dir}; "
                "wait for it, end it, or choose another output_dir."
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning(f"{output_dir} cannot be locked ({error}); see to it that no other run writes there.")
        file.truncate(0)
        file.write(f" (process {os.getpid()} on {socket.gethostname()})")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def end_together(accelerator: Accelerator) -> None:
    """End trackers, and what the processes have in common, once all are here: one that leaves may take others down."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        # Gloo's threads drop what they have sent, and need Python's lock for that: a process that ends, or deletes its
        # group, meanwhile aborts or hangs (pytorch/pytorch#179291).
        time.sleep(1)
    accelerator.end_training()


class StopSignals:
    """Remember SIGTERM, SIGUSR1 and SIGINT, in a with-block, instead of dying of them.

    A second Ctrl-C ends the process at once; but not one that a launcher has started, which may pass on what its
    terminal has sent to both. A launcher that such a signal or another ends without passing it on counts as SIGTERM:
    what it launched would go on unseen.
    """

    def __init__(self) -> None:
        self._number = 0
        self._launcher = os.getppid() if LAUNCHED & os.environ.keys() else None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> int:
        """The signal's number, or 0."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        return self._number or (signal.SIGTERM if orphaned else 0)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._launcher is None:
            if self._number == signal.SIGINT:
                raise KeyboardInterrupt
            # Not by print, in the middle of which the signal may have come.
            os.write(2, b"\nStopping after this step, with a checkpoint; Ctrl-C again ends without one.\n")
        self._number = number

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # where alone handlers can be set
            for number in STOPS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def report_killed_workers(number: int) -> Iterator[None]:
    """Say in a sentence that one of the `number` processes that decode images was killed in a with-block.

    Raises:
        ChildProcessError: In place of torch's RuntimeError, which comes in the middle of whatever goes on.
    """
    try:
        yield
    except RuntimeError as error:
        if WORKER_DIED not in str(error):
            raise
        raise ChildProcessError(
            f"A process that decodes images was killed, perhaps for want of memory ({' '.join(str(error).split())}); "
            "the same command goes on from the last checkpoint. If it happens again, lower "
            f"dataloader_num_workers={number}."
        ) from error


def over_processes(accelerator: Accelerator, values: list[int]) -> list[int]:
    """Sum whole numbers over all processes."""
    if accelerator.num_processes == 1:
        return values
    tensor = torch.tensor(values, device=accelerator.device)
    return accelerator.reduce(tensor, "sum").tolist()
