"""The rooms: imports point downwards and never in a circle, and importing the package loads nothing heavy."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tve_hf"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

# The folders, lowest first: files of one import from those before it, from their own, and from the top level.
FOLDERS = [
    "visualization",
    "classifiers",
    "vit_shapley",
    "methods",
    "evaluation",
    "metrics",
    "benchmark",
    "hub",
    "export",
    "pretrain",
    "bulk",
    "cli",
]
MAX_LINES, MAX_TOP_LEVEL = 300, 30
# Extras, and what they bring along: never needed to explain an image.
HEAVY = ["accelerate", "captum", "datasets", "evaluate", "gradio", "matplotlib", "onnx", "onnxruntime", "onnxscript"]
HEAVY += ["peft", "skimage", "sklearn", "timm"]
# What is all about an extra; `evaluate` loads those of `metrics` from their folders, each by itself.
TRAINING = {"benchmark", "bulk", "metrics", "pretrain", "sources.py"}


def imported_names(path: Path) -> list[str]:
    """All imports of a file, also those inside functions, as absolute dotted names."""
    package = ["tve_hf", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from . import x` may name a module or something in __init__.py
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def own_module(name: str) -> str | None:
    """The module of the package behind an absolute name; None if it is another package's."""
    first, *parts = name.split(".")
    if first != "tve_hf":
        return None
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


def graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    return {
        module: {own for name in imported_names(path) if (own := own_module(name)) is not None}
        for module, path in MODULES.items()
    }


def folder_of(module: str) -> str | None:
    first = module.partition(".")[0]
    return first if first in FOLDERS else None


def test_every_folder_is_named():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FOLDERS)


def test_no_module_imports_itself_in_a_circle():
    TopologicalSorter(graph()).prepare()  # raises CycleError


def test_no_folder_and_no_file_of_the_top_level_imports_upwards():
    """Each folder is one thing: seen so, there is no circle, and folders stand in the order above."""
    rooms: dict[str, set[str]] = {}
    for module, imports in graph().items():
        own = folder_of(module) or module
        rooms.setdefault(own, set()).update({folder_of(name) or name for name in imports} - {own})
    for lower, upper in zip(FOLDERS, FOLDERS[1:], strict=False):
        rooms[upper].add(lower)
    TopologicalSorter(rooms).prepare()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_fit_in_a_head(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_the_top_level_is_short():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_LEVEL


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_extras_are_imported_by_training_alone_or_inside_functions(path):
    top = {
        name.partition(".")[0]
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not top & set(HEAVY) or path.relative_to(PACKAGE).parts[0] in TRAINING


def test_importing_the_package_in_a_fresh_process_loads_nothing_heavy_and_registers_everything() -> None:
    code = """
import json, sys
from transformers import AutoModel, PreTrainedModel, Pipeline
before = {name.partition(".")[0] for name in sys.modules}
import tve_hf
loaded = sorted({name.partition(".")[0] for name in sys.modules} - before)
own = sorted(name for name in sys.modules if name.startswith("tve_hf"))
from transformers import AutoConfig
from transformers.pipelines import PIPELINE_REGISTRY
public = [name for name in tve_hf.__all__ if getattr(tve_hf, name, None) is None]
tasks = "transferable-attribution" in PIPELINE_REGISTRY.get_supported_tasks()
config = type(AutoConfig.for_model("tve")).__name__
print(json.dumps({"loaded": loaded, "own": own, "missing": public, "task": tasks, "config": config}))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert not set(found["loaded"]) & set(HEAVY)  # but what transformers itself imports
    assert "tve_hf" in found["loaded"]
    own = {name.removeprefix("tve_hf.") for name in found["own"]}
    assert not {name.partition(".")[0] for name in own} & {"pretrain", "benchmark", "hub", "export", "cli"}
    assert not any(name.startswith("methods.") for name in own)  # each is imported when it is asked for
    assert found["missing"] == []
    assert found["task"]
    assert found["config"] == "TVEConfig"
