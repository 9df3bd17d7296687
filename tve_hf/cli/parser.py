"""What all commands have in common: exit codes, recipes, both spellings of each option, --version and --traceback."""

import argparse
from collections.abc import Callable
from typing import Any

from .. import __version__

VERSION = f"tve-hf {__version__}"
# What shells report of a process that SIGINT, SIGPIPE or SIGTERM ended.
INTERRUPTED, NOBODY_READS, TERMINATED = 130, 141, 143
_AT_SIGN = "@"  # before the name of a file of arguments


class _Parser(argparse.ArgumentParser):
    """Takes `--top-k` and `--top_k` alike, as `HfArgumentParser` does."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        spellings = [spelling for name in names for spelling in (name, _with_underscores(name))]
        return super().add_argument(*dict.fromkeys(spellings), **settings)


def _with_underscores(name: str) -> str:
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


def _settings_of(command: Callable[[list[str]], int]) -> dict[str, Any]:
    """Settings of a command's parser, whose docstring is the description."""
    return {
        "prog": f"tve-hf {command.__name__}",
        "description": command.__doc__,
        "fromfile_prefix_chars": _AT_SIGN,
        # What is short for one option now may be short for another in the next version.
        "allow_abbrev": False,
    }


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("--traceback", action="store_true", help="show where an error arose, for a report of a bug")


def parser_of(command: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """A parser for a command."""
    parser = _Parser(**_settings_of(command))
    _add_common(parser)
    return parser


def dataclass_of(command: Callable[[list[str]], int], kind: type, arguments: list[str]) -> Any:
    """Parse the arguments of a command into its dataclass of settings."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, **_settings_of(command))
    _add_common(parser)
    return parser.parse_args_into_dataclasses(arguments)[0]
