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
    found = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Cells:
    """A folder of computed tensors, each under a key, all made with the same settings.

    A setting of None says nothing of the results, and may be given later: an explainer that joins, for example.

    Raises:
        ValueError: If the folder holds results of other settings; the message names them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        path = folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        before = json.loads(path.read_text()) if path.is_file() else {}
        known = {name: value for name, value in before.items() if value is not None}
        changed = [name for name in known if settings.get(name) not in (known[name], None)]
        if changed:
            names = "; ".join(f"{n} was {known[n]!r}, now {settings[n]!r}" for n in sorted(changed))
            raise ValueError(
                f"{folder} holds results of other settings ({names}); choose another output_dir, or remove it."
            )
        settings |= known
        if settings != before:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(settings, indent=1) + "\n")
            os.replace(partial, path)

    def get(self, key: str, compute: Callable[[], dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """Read the tensors of a key, or compute and keep them; KeyError if there are none and nothing to compute."""
        path = self.folder / f"{key}.safetensors"
        if path.is_file():
            return load_file(path)
        if compute is None:
            raise KeyError(key)
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(found, partial)
        os.replace(partial, path)
        return found
