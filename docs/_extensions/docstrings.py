"""Docstrings are in Markdown, as transformers' are; rewrite what reStructuredText would read otherwise."""

import re
from typing import Any

from sphinx.application import Sphinx


def rewrite(lines: list[str]) -> list[str]:
    """Return the lines of a docstring with its code, references and equations in reStructuredText."""
    text = "\n".join(lines)
    # Fenced blocks lose their fences, and are set in as code.
    text = re.sub(
        r"^( *)```(\w+)\n(.*?)\n\1```$",
        lambda m: f"{m[1]}.. code-block:: {m[2]}\n\n" + re.sub(r"^(?=.)", "    ", m[3], flags=re.MULTILINE),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    # An equation stands alone, set in under a line of prose; what is set in under "Args:" follows it at once.
    text = re.sub(r"(?<=\n)(\S(?!\. )[^\n]*)\n\n(?=    \S)", r"\1\n\n::\n\n", "\n" + text)[1:]
    text = re.sub(r"\[`(\w+)`\]", r":py:obj:`\1 <tve_hf.\1>`", text)
    text = re.sub(r"(?<![:`>])`([^`<>\n]+)`(?!`)", r"``\1``", text)
    # |x| would be a substitution.
    return text.replace("|", r"\|").split("\n")


def _process(app: Sphinx, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # Constants have the docstring of their type.
    lines[:] = [] if kind == "data" else rewrite(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
