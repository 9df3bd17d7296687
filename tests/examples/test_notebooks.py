"""The notebooks run as they are, cell by cell, show what they end with, and hold no outputs."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.ipynb"))
pytest.importorskip("skimage", reason="the notebooks explain photographs of scikit-image")


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def run(source: str, namespace: dict[str, Any]) -> Any:
    """What a notebook would show of a cell: the value of its last line, if that is an expression."""
    body = ast.parse(source)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    exec(compile(body, "cell", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_pictures(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    shown = [run("".join(cell["source"]), namespace) for cell in cells(path) if cell["cell_type"] == "code"]
    as_html = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    as_png = [value._repr_png_() for value in shown if hasattr(value, "_repr_png_")]
    assert as_html or as_png
    assert all(html.startswith("<div><img ") for html in as_html) and all(as_png)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stripped_and_says_what_it_is(path):
    for cell in cells(path):
        assert not cell.get("outputs") and cell.get("execution_count") is None
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and re.match(r"# \w", first["source"][0])
    assert len({cell["id"] for cell in cells(path)}) == len(cells(path))
