"""The code of an explainer as it goes with its weights, for those who have transformers but not this package."""

import ast
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
TASK = "transferable-attribution"
# Files of the package, and what transformers' Auto classes and `pipeline` look for in them.
AUTO_MAP = {"AutoConfig": "configuration_tve.TVEConfig", "AutoModel": "modeling_tve.TVEExplainer"}
PIPELINE = "pipeline_tve.TransferableAttributionPipeline"


def code_files() -> dict[str, str]:
    """The modules that config, model and pipeline are made of, as file name -> text.

    transformers loads code from one folder, by imports of one dot. So `classifiers/tracing.py` becomes
    `classifiers_tracing.py`, a folder's `__init__.py` becomes `classifiers.py`, and imports name them so.
    """
    files: dict[str, str] = {}
    waiting = [name.partition(".")[0] for name in (*AUTO_MAP.values(), PIPELINE)]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name not in files:
            files[name], needed = _flatten(module)
            waiting += needed
    return dict(sorted(files.items()))


def flat_name(module: str) -> str:
    """The name of a module of the package where there are no folders: "classifiers.tracing" as one word."""
    return module.replace(".", "_")


def _flatten(module: str) -> tuple[str, list[str]]:
    """Read a module, its relative imports as of flat names; and name the modules that it imports.

    Raises:
        ValueError: If it imports modules themselves (`from . import x`), which transformers does not follow.
    """
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    folder = module.split(".")[:-1]
    if not path.is_file():
        path, folder = path.with_suffix("") / "__init__.py", module.split(".")
    text = path.read_text()
    lines, needed = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.module is None:
                raise ValueError(f"{path}:{node.lineno} imports a module itself; import what is needed from it.")
            above = folder[: len(folder) + 1 - node.level]
            needed.append(".".join([*above, node.module]))
            written = "." * node.level + node.module
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {written} import", f"from .{flat_name(needed[-1])} import", 1)
    return "\n".join(lines) + "\n", needed


def config_with_code(folder: Path) -> str:
    """Return the text of a saved explainer's config.json with the code named in it.

    Raises:
        ValueError: If there is no explainer's config in the folder.
    """
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("model_type") != "tve":
        raise ValueError(f"{folder} holds no explainer, whose config.json has model_type 'tve'; pass one that does.")
    config["auto_map"] = AUTO_MAP
    config["custom_pipelines"] = {TASK: {"impl": PIPELINE, "pt": ["AutoModel"], "type": "image"}}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
