"""The directive `commands`: every command of tve-hf with every option, as its own parser describes them."""

import argparse
import re
from typing import Any
from unittest.mock import patch

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tve_hf.cli import COMMANDS


class _Found(Exception):
    """Carries a parser out of the command that made it."""


def parser_behind(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, taken at the moment when it would print its help."""

    def found(self: argparse.ArgumentParser, file: Any = None) -> None:
        raise _Found(self)

    with patch.object(argparse.ArgumentParser, "print_help", found):
        try:
            COMMANDS[name](["--help"])
        except _Found as caught:
            return caught.args[0]
    raise RuntimeError(f"tve-hf {name} --help printed no help.")


def _spelling(action: argparse.Action) -> str:
    """The spelling with hyphens of the commands that take both; of the others their own."""
    return next((name for name in action.option_strings if "_" not in name), action.option_strings[-1])


def _value(action: argparse.Action) -> str:
    if action.nargs == 0 or not action.option_strings:
        return ""
    name = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar or action.dest.upper()
    return f" {name}{' ...' if action.nargs in ('+', '*') else ''}"


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""  # with %(default)s filled in
    default = action.default
    said = "default" in text or default in (None, False, argparse.SUPPRESS) or default == []
    needed = " Required." if action.required and action.option_strings else ""
    text = text + ("" if said else f" (default: {default})") + needed
    return re.sub(r"(?<![\w`-])--[\w-]+", r"`\g<0>`", text).replace("*", r"\*")


def markdown(name: str) -> list[str]:
    """Return the section of a command, as lines of MyST."""
    parser = parser_behind(name)
    lines = [f"## tve-hf {name}", "", parser.description or "", "", f"```{{program}} tve-hf {name}", "```", ""]
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        title = f"{_spelling(action)}{_value(action)}" if action.option_strings else str(action.metavar or action.dest)
        lines += [f"```{{option}} {title}", _meaning(parser, action), "```", ""]
    return lines


class Commands(SphinxDirective):
    """`{commands}`, without arguments."""

    def run(self) -> list[nodes.Node]:
        found = nodes.container()
        for name in COMMANDS:
            self.state.nested_parse(StringList(markdown(name), source=name), self.content_offset, found, True)
        return found.children


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
