"""Imports point downwards, and importing the package loads nothing heavy."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tve_hf"

# A module may import from a smaller number only; members of a sub-package share one, and may import each other.
LAYERS = {
    "removals": 0,
    "coalitions": 0,
    "additive": 0.1,
    "sampling": 1.6,
    "held_out_coalitions": 2.55,
    "patches": 0.2,
    "fingerprint": 0,
    "images": 0,
    "pretrained_cfg": 0,
    "inputs": 0,
    "configuration_tve": 0.05,
    "configuration_shapley": 0.1,
    "strict_json": 0,
    "comparison": 0,
    "remote_code": 0,
    "released": 0,
    "plots": 0,
    "heads": 0,
    "wrapped": 0,
    "weights": 0,
    "loading": 0.5,
    "files": 0,
    "tracing": 0.3,
    "splitting": 0.5,
    "parts": 0.7,
    "cells": 0.7,
    "report": 0.7,
    "prompts": 0.5,
    "split_model": 0.9,
    "zero_shot": 0.9,
    "token_drop": 0.8,
    "trunk_backbone": 0.9,
    "trunk_vit_mae": 0.9,
    "modeling_tve": 1,
    "modeling_shapley": 1.1,
    "classifiers": 1,
    "visualization": 1,
    "attribution": 1.5,
    "verification": 1.6,
    "compatibility": 1.5,
    "shapley": 1.6,
    "ranking": 1.6,
    "localization": 1.6,
    "sanity": 1.6,
    "fidelity": 1.7,
    "perturbation": 1.7,
    "methods": 2,
    "metrics": 2,
    "pipeline_tve": 2,
    "judge": 2.5,
    "pretraining_arguments": 2.3,
    "pretraining_images": 2.4,
    "pretraining_data": 2.5,
    "pretraining_model": 2.5,
    "pretraining_labels": 2.45,
    "processes": 2.4,
    "checkpointing": 2.5,
    "label_cache": 2.6,
    "held_out": 2.5,
    "pretrain": 3.7,
    "benchmark": 3,
    "model_card": 3,
    "info": 3,
    "hub": 3.5,
    "__init__": 4,
    "cli": 4.5,  # a user of the package's public names
}
# The explainers' own files, which go to the Hub with the weights.
COPIED = {
    "additive",
    "coalitions",
    "configuration_shapley",
    "configuration_tve",
    "modeling_shapley",
    "modeling_tve",
    "trunk_backbone",
    "trunk_vit_mae",
    "weights",
}
FILES = sorted(PACKAGE.rglob("*.py"))
# Extras, and what they bring along: never needed to explain an image.
HEAVY = ["accelerate", "captum", "datasets", "evaluate", "gradio", "matplotlib", "peft", "skimage", "sklearn", "timm"]
# Modules that are all about an extra; `evaluate` loads those of `metrics` from their folders, each by itself.
TRAINING = {
    "benchmark",
    "checkpointing",
    "judge",
    "metrics",
    "plots",
    "pretrain",
    "pretraining_arguments",
    "pretraining_data",
    "pretraining_images",
    "processes",
}


def _module(path: Path) -> str:
    """The entry of `LAYERS` that a file belongs to."""
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, int]]:
    """All imports of a file, also those inside functions, as absolute dotted names, and their lines."""
    package = ["tve_hf", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from . import x` may name a module or something in __init__.py
            found += [(".".join([*base, alias.name]), node.lineno) for alias in node.names]
    return found


def _layer_of_import(name: str) -> str:
    """The entry of `LAYERS` behind an absolute name inside the package."""
    parts = name.split(".")
    is_module = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file())
    return parts[1] if is_module else "__init__"


def test_every_file_has_a_layer() -> None:
    assert {_module(path) for path in FILES} <= LAYERS.keys()
    assert len(FILES) > 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_imports_upwards(path) -> None:
    own = _module(path)
    for name, line in _imports(path):
        if name.partition(".")[0] == "tve_hf":
            other = _layer_of_import(name)
            within = own == other and path.parent != PACKAGE
            assert within or LAYERS[other] < LAYERS[own], f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("name", sorted(COPIED))
def test_the_model_can_be_copied_to_the_hub(name) -> None:
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    for imported, line in _imports(PACKAGE / f"{name}.py"):
        if imported.startswith("tve_hf."):
            assert _layer_of_import(imported) in COPIED, f"line {line}"
        else:
            assert imported.partition(".")[0] in allowed, f"line {line} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_extras_are_imported_by_training_alone_or_inside_functions(path) -> None:
    top = {
        name.partition(".")[0]
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not top & set(HEAVY) or _module(path) in TRAINING


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
    assert not own & {"pretrain", "benchmark", "model_card", "hub", "info", "remote_code", "cli"}
    assert not any(name.startswith("methods.") for name in own)  # each is imported when it is asked for
    assert found["missing"] == []
    assert found["task"]
    assert found["config"] == "TVEConfig"
