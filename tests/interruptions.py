"""Ends of pre-training runs that no test wants for its own process, at a moment that the test chooses."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from tve_hf.pretrain import loop


def before_step(number: int, interrupt: Callable[[], Any]) -> Callable[..., Any]:
    """A stand-in for `loop.take_step` that interrupts a run before its step of this number, which starts at 1."""
    take_step = loop.take_step

    def stand_in(run: Any, *arguments: Any) -> Any:
        if run.done == number - 1:
            interrupt()
        return take_step(run, *arguments)

    return stand_in


def at_call(number: int, interrupt: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in for `function` that does `interrupt` instead at one of its calls."""
    calls = []

    def stand_in(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return (interrupt if len(calls) == number else function)(*arguments, **options)

    return stand_in


def in_a_fork(function: Callable[[], Any]) -> int | None:
    """Run in a forked process; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    process.kill()
    return process.exitcode


def die(*arguments: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(*arguments: Any, **options: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")
