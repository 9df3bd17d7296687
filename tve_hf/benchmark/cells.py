"""Results of a long evaluation, kept in small files as they are computed, so that nothing is computed twice."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def digest(*modules: nn.Module) -> str:
    """SHA-256 of all weights and buffers, to notice other ones under the same name."""
    total = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Cells:
    """A folder of computed tensors, each under a key, all made with the same settings.

    What only some of them depend on belongs into their keys.

    Raises:
        ValueError: If the folder holds results of other settings; the message names them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        path = folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        before = json.loads(path.read_text()) if path.is_file() else {}
        changed = [name for name in before if name in settings and settings[name] != before[name]]
        if changed:
            names = "; ".join(f"{n} was {before[n]!r}, now {settings[n]!r}" for n in sorted(changed))
            raise ValueError(
                f"{folder} holds results of other settings ({names}); choose another output_dir, or remove it."
            )
        settings = before | settings
        if settings != before:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(settings, indent=1) + "\n")
            os.replace(partial, path)

    def get(self, key: str, compute: Callable[[], dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """Read the tensors of a key, or compute and keep them; KeyError if it has none and nothing computes them."""
        path = self.folder / f"{key}.safetensors"
        if path.is_file():
            return load_file(path)
        if compute is None:
            raise KeyError(key)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial)
        os.replace(partial, path)
        return tensors
