"""Store classifiers of one backbone so that its weights are on disk once.

The first folder's weights become two shards, backbone.safetensors and head.safetensors; those of the others a
head.safetensors of their own and an index that names the first folder's backbone, `../FIRST/backbone.safetensors`.
`from_pretrained` reads them as before, as long as the folders stay side by side.

    python examples/share_backbone.py checkpoints/vit-tiny checkpoints/vit-tiny-cats-vs-dogs
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from tve_hf import split_classifier

BACKBONE, HEAD = "backbone.safetensors", "head.safetensors"


def parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the backbone and of the head, as they are on disk."""
    weights = load_file(folder / "model.safetensors")
    names = split_classifier(AutoModelForImageClassification.from_pretrained(folder).eval()).backbone.head_names
    head = {name: weight for name, weight in weights.items() if name.startswith(tuple(f"{n}." for n in names))}
    return {name: weight for name, weight in weights.items() if name not in head}, head


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    folders = [args.first, *args.others]
    both = [parts(folder) for folder in folders]
    shared = both[0][0]
    for folder, (backbone, _) in zip(folders, both, strict=True):
        if folder.resolve().parent != args.first.resolve().parent:
            raise ValueError(f"{folder} does not lie beside {args.first}; move it there.")
        if backbone.keys() != shared.keys() or not all(torch.equal(backbone[name], shared[name]) for name in shared):
            raise ValueError(f"{folder} has another backbone than {args.first}; its weights stay as they are.")
    for folder, (backbone, head) in zip(folders, both, strict=True):
        place = BACKBONE if folder == args.first else f"../{args.first.name}/{BACKBONE}"
        index = {
            "metadata": {"total_size": sum(weight.nbytes for weight in (backbone | head).values())},
            "weight_map": dict.fromkeys(backbone, place) | dict.fromkeys(head, HEAD),
        }
        save_file(head, folder / HEAD, metadata={"format": "pt"})
        if folder == args.first:
            save_file(backbone, folder / BACKBONE, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        (folder / "model.safetensors").unlink()
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors lets nobody else read what it writes


if __name__ == "__main__":
    main()
