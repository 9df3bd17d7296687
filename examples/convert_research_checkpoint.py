"""Convert an explainer of the TVE authors' research code to a `TVEExplainer` that predicts the same tensors.

The research code keeps two ViT-MAE, one for kept and one for removed, each with its own head of mixer layers. Three
of its conventions are undone here: its patches are numbered column by column, it drops the last token instead of the
class token, and its first head layer has no activation.

    python examples/convert_research_checkpoint.py FOLDER OUTPUT_DIR --backbone_name google/vit-base-patch16-224

FOLDER holds the authors' config.json and model.safetensors. A pickle is refused: convert it to safetensors first,
where you trust it.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tve_hf import TVEConfig, TVEExplainer

BRANCHES = {"pos": "kept", "neg": "removed"}


def config_of(research: dict, backbone_name: str | None) -> TVEConfig:
    """The same explainer, described by a `TVEConfig`."""
    mae_config = ViTMAEConfig.from_dict(research["backbone_config"] | {"mask_ratio": 0.0})
    return TVEConfig(
        trunk="vit_mae",
        image_size=mae_config.image_size,
        grid_size=research["heatmap_size"],
        hops=research["perturb_radius"],
        embedding_dim=research["target_hidden_size"],
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
        mae_config=mae_config,
        num_head_layers=research["explainerhead_layernum"],
        activate_first_head_layer=False,
        shared_trunk=False,
        layer_norm_eps=1e-12,
        backbone_name=backbone_name,
    )


def mae_of(weights: dict[str, torch.Tensor], branch: str, config: TVEConfig) -> ViTMAEForPreTraining:
    """One of the two Mask-AutoEncoders. transformers renames the weights of older versions as it loads them."""
    prefix = f"backbone_{branch}."
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(own, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, report = ViTMAEForPreTraining.from_pretrained(
            folder, config=config.mae_config, output_loading_info=True, ignore_mismatched_sizes=False
        )
    if report["missing_keys"] or report["unexpected_keys"]:
        odd = sorted([*report["missing_keys"], *report["unexpected_keys"]])
        raise ValueError(f"The weights under {prefix!r} are not those of a ViT-MAE: {odd[0]} does not match.")
    return model


def head_of(weights: dict[str, torch.Tensor], branch: str, config: TVEConfig) -> dict[str, torch.Tensor]:
    """One of the two heads, its outputs in our order."""
    last = config.num_head_layers - 1
    found = {}
    for index in range(config.num_head_layers):
        title = "Input Layer" if index == 0 else "Output Layer" if index == last else f"Intermedia Layer {index}"
        names = {"layernorm": "norm", "dense1": "channels", "dense2": "tokens"}
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                name = f"explainer_head_{branch}.net.{title}.{theirs}.{kind}"
                if name not in weights:
                    raise ValueError(f"The checkpoint has no {name!r}; is it one of the TVE research code?")
                found[f"layers.{index}.{ours}.{kind}"] = weights[name]
    # Their output col * rows + row becomes our output 1 + row * cols + col; ours at the class token is not read.
    rows, cols = config.grid_shape
    order = torch.arange(rows * cols).view(cols, rows).T.flatten()
    order = torch.cat([torch.tensor([rows * cols]), order])
    for kind in ("weight", "bias"):
        found[f"layers.{last}.tokens.{kind}"] = found[f"layers.{last}.tokens.{kind}"][order]
    return found


def convert(folder: Path, output_dir: Path, backbone_name: str | None = None) -> TVEExplainer:
    """Convert, save and return the explainer.

    Raises:
        ValueError: If there are no safetensors, or weights are missing.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} has no model.safetensors; convert its weights to safetensors first.")
    weights = load_file(file)
    config = config_of(json.loads((folder / "config.json").read_text()), backbone_name)
    explainer = TVEExplainer(config).eval()
    for autoencoder, (branch, name) in zip(explainer.trunk.autoencoders, BRANCHES.items(), strict=True):
        autoencoder.load_vit_mae(mae_of(weights, branch, config), f"{folder}, {branch}")
        getattr(explainer.trunk, f"{name}_head").load_state_dict(head_of(weights, branch, config))
    explainer.save_pretrained(output_dir)
    size = {"height": config.image_shape[0], "width": config.image_shape[1]}
    ViTImageProcessor(size=size, image_mean=config.image_mean, image_std=config.image_std).save_pretrained(output_dir)
    return explainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="config.json and model.safetensors of the research code")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--backbone_name", help="the classifier whose backbone it was trained on")
    args = parser.parse_args()
    convert(args.folder, args.output_dir, args.backbone_name)


if __name__ == "__main__":
    main()
