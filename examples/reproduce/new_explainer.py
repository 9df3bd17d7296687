"""Save an explainer that has learnt nothing: what an ablation compares with, or starts from with another trunk.

python examples/reproduce/new_explainer.py --classifier vit-tiny --grid_size 8 --trunk vit_mae --output_dir new
"""

import argparse
from typing import Any

import torch

from tve_hf import TVEExplainer, split_classifier
from tve_hf.pretrain.model import config_for


def sizes_of(width: int, layers: int, pixels: int, grid_size: int) -> dict[str, dict[str, Any]]:
    """What a config says of each trunk's size; the Mask-AutoEncoder has half of the layers on either side."""
    transformer = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 4 * width}
    coder = transformer | {"num_hidden_layers": layers // 2}
    mae = coder | {f"decoder_{name}": value for name, value in coder.items()}
    mae |= {"image_size": pixels, "patch_size": pixels // grid_size}
    backbone = transformer | {"num_hidden_layers": layers}
    return {"backbone": backbone, "vit_mae": {"mae_config": mae, "num_head_layers": layers}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--grid_size", type=int, required=True)
    parser.add_argument("--trunk", default="backbone", choices=["backbone", "vit_mae"])
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    classifier = split_classifier(args.classifier)
    sizes = sizes_of(args.hidden_size, args.num_hidden_layers, classifier.probe().shape[-1], args.grid_size)
    config = config_for(
        classifier, args.grid_size, 1, backgrounds="random", rule="prob", trunk=args.trunk, **sizes[args.trunk]
    )
    TVEExplainer(config).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
