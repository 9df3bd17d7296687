"""Ship the code of an explainer with its weights, for those who have transformers but not this package."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

PACKAGE = Path(__file__).parent
TASK = "transferable-attribution"
# Files of the package, and what transformers' Auto classes and `pipeline` look for in them.
AUTO_MAP = {"AutoConfig": "configuration_tve.TVEConfig", "AutoModel": "modeling_tve.TVEExplainer"}
PIPELINE = "pipeline_tve.TransferableAttributionPipeline"


def code_files() -> list[Path]:
    """The modules of this package that config, model and pipeline are made of, each once."""
    roots = [PACKAGE / f"{name.partition('.')[0]}.py" for name in (*AUTO_MAP.values(), PIPELINE)]
    needed = {Path(file) for root in roots for file in get_relative_import_files(root)}
    return sorted({*roots, *needed})


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


def add_remote_code(folder: Path) -> list[Path]:
    """Copy the code into a saved explainer's folder, and name it in its config; `tve-hf push` sends the same.

    With `trust_remote_code=True`, `pipeline("transferable-attribution", model=...)` then works where this package is
    not installed. Where it is, its own classes are used, and nothing of the copy.

    Args:
        folder: with the explainer's config.json.

    Returns:
        The files copied.

    Raises:
        ValueError: If there is no explainer's config in the folder.
    """
    config = config_with_code(folder)
    copies = [Path(shutil.copyfile(file, folder / file.name)) for file in code_files()]
    path = folder / "config.json"
    partial = path.with_suffix(".partial")
    partial.write_text(config)
    os.replace(partial, path)
    return copies
