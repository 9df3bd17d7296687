"""The command line: tve-hf explain | info | pretrain | evaluate | bench | card | push | export.

Each command also reads arguments from files, one a line: `tve-hf pretrain @recipe.args --classifier ...`.
"""

import os
import sys
from collections.abc import Callable

from ..messages import REPORT, is_expected, message
from .allocator import keep_freed_memory
from .bench import bench
from .explain import explain
from .export import export
from .hub import card, info, push
from .parser import INTERRUPTED, NOBODY_READS, VERSION
from .training import evaluate, pretrain

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "explain": explain,
    "info": info,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "bench": bench,
    "card": card,
    "push": push,
    "export": export,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends with one sentence and exit code 1, one of ours with its traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("tve-hf: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _let_go_of_stdout()
        print("tve-hf: stopped, since nobody reads the output any more.", file=sys.stderr)
        return NOBODY_READS
    except Exception as error:  # told apart below, and raised again unless input can bring it about
        if not is_expected(error):
            error.add_note(REPORT)
            raise
        _let_go_of_stdout()
        print(message(error, full="--traceback" in arguments), file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command in COMMANDS:
        keep_freed_memory()
        return COMMANDS[command](rest)
    if command == "--version":
        print(VERSION)
        return 0
    helped = command in ("-h", "--help")
    stream = sys.stdout if helped else sys.stderr
    print("usage: tve-hf COMMAND ...\n", file=stream)
    for name, function in COMMANDS.items():
        print(f"  {name:10} {(function.__doc__ or '').splitlines()[0]}", file=stream)
    print("\n`tve-hf COMMAND --help` names its options; `tve-hf --version` says which version this is.", file=stream)
    if command and not helped:
        print(f"\ntve-hf: {command!r} is not a command; choose one of the above.", file=stream)
    return 0 if helped else 2


def _let_go_of_stdout() -> None:
    """Drop what cannot be written any more, or Python fails on it once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = ["COMMANDS", "main"]
