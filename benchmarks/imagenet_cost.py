"""What pre-training on ImageNet costs: hours, from measured passes of the backbone, and memory.

For every image a step runs the backbone once on the whole image and twice for each sampled neighbourhood, and the
explainer forwards and backwards (three times its forward pass). Floating-point operations are counted on meta tensors.
The explainer is taken to run at the rate, operations a second, of the backbone's passes, and eight GPUs to be eight
times as fast as one. Those passes were measured by the authors of timm in half precision, in their CSV files:

    timm=https://raw.githubusercontent.com/huggingface/pytorch-image-models
    results=$timm/aa4b5850c1543fa488abf260f18390eda46cf85d/results/benchmark-infer-amp-nchw
    python benchmarks/imagenet_cost.py --measured "RTX 3090=$results-pt240-cu124-rtx3090.csv" \\
        "RTX 4090=$results-pt291-cu128-4090.csv" "RTX 5090=$results-pt291-cu130-5090.csv"

Memory is the largest sum of all live tensors in a step, on meta tensors too: one chunk of masked images in the frozen
backbone, in half precision, or the batch in the explainer forwards and backwards, whichever is more, and all weights,
gradients and moments. Attention counts with its whole matrix, which fused kernels do not keep.
"""

import argparse
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, DeiTConfig, SwinConfig, ViTConfig

from tve_hf import TVEConfig, TVEExplainer
from tve_hf.benchmark.cost import LiveMemory

IMAGES = 1_281_167  # training images of ImageNet-1k
SIDE, GRID = 224, 14
BATCH, CHUNK = 64, 128  # images of a step; masked images in a pass on a GPU
# Configurations of the paper's backbones, D of each, the shape of the last feature map, and timm's name.
BACKBONES = {
    "ViT-B/16": (ViTConfig(), 768, (768, 14, 14), "vit_base_patch16_224"),
    "DeiT-B/16": (
        DeiTConfig(architectures=["DeiTForImageClassification"]),
        768,
        (768, 14, 14),
        "deit_base_patch16_224",
    ),
    "Swin-B": (
        SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
        1024,
        (1024, 7, 7),
        "swin_base_patch4_window7_224",
    ),
}


def cost(model: nn.Module, train: bool = False, **inputs: Any) -> tuple[float, int]:
    """Operations of a forward pass (a multiplication with its addition counts as two), and the most bytes it takes.

    With `train` the bytes include the backward pass.
    """
    with LiveMemory() as memory, torch.set_grad_enabled(train):
        output = model(**inputs)
        if train:
            output.loss.backward()
        del output
    for parameter in model.parameters():
        parameter.grad = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops(), memory.peak


def size(model: nn.Module, bytes_each: int) -> int:
    """Bytes of a model's parameters."""
    return bytes_each * sum(parameter.numel() for parameter in model.parameters())


def describe(config: Any, dim: int, shape: tuple[int, ...], k: int) -> tuple[float, float, float]:
    """Operations of a backbone's pass on one image and of all that a step does for one; peak memory in bytes."""
    half = {"dtype": torch.bfloat16}
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config).eval().to(**half)
        channels = {"feature_names": ["1", "2", "3"], "feature_dims": [shape[0]] * 3}
        # Under autocast the explainer's activations are in half precision; its weights are not, which `size` counts.
        explainer = TVEExplainer(TVEConfig(image_size=SIDE, grid_size=GRID, embedding_dim=dim, **channels)).to(**half)
        chunk = torch.empty(CHUNK, 3, SIDE, SIDE, **half)
        labels = torch.empty(BATCH, k, dim, **half)
        inputs = {
            "pixel_values": torch.empty(BATCH, 3, SIDE, SIDE, **half),
            "features": tuple(torch.empty(BATCH, *shape, **half) for _ in range(3)),
            "embeddings": torch.empty(BATCH, dim, **half),
            "patch_idx": torch.zeros(BATCH, k, dtype=torch.int64),
            "kept_labels": labels,
            "removed_labels": labels,
        }
    passes, of_passes = cost(model, pixel_values=chunk)
    forward, of_explainer = cost(explainer.train(), train=True, **inputs)
    each = passes / CHUNK
    images = sum(tensor.nbytes for tensor in (chunk, inputs["pixel_values"], *inputs["features"]))
    states = size(model, 2) + size(explainer, 16)  # float32: weights, gradients, two moments
    return each, (1 + 2 * k) * each + 3 * forward / BATCH, states + images + max(of_passes, of_explainer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", nargs="+", required=True, metavar="GPU=CSV", help="a file or address of timm's")
    parser.add_argument("--patches_per_image", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    gpus = dict(pair.split("=", 1) for pair in args.measured)
    rates = {name: pd.read_csv(source, index_col="model")["infer_samples_per_sec"] for name, source in gpus.items()}
    hours = " | ".join(f"{name}, hours an epoch | on 8" for name in gpus)
    print(f"| backbone | k | GFLOP a pass | a step, for each image | of it backbone | memory | {hours} |")
    print("| --- " * (6 + 2 * len(gpus)) + "|")
    for name, (config, dim, shape, model) in BACKBONES.items():
        for k in args.patches_per_image:
            each, step, memory = describe(config, dim, shape, k)
            one = [IMAGES * step / each / rate[model] / 3600 for rate in rates.values()]
            cells = " | ".join(f"{value / count:.2f}" for value in one for count in (1, 8))
            share = (1 + 2 * k) * each / step
            told = f"{each / 1e9:.1f} | {step / 1e9:.0f} GFLOP | {share:.0%} | {memory / 1e9:.1f} GB"
            print(f"| {name} | {k} | {told} | {cells} |")


if __name__ == "__main__":
    main()
