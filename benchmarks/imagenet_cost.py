"""What pre-training on ImageNet costs: floating-point operations counted on meta tensors, hours at a sustained rate.

For every image a step runs the backbone once on the whole image and twice for each sampled neighbourhood, and the
explainer forwards and backwards (three times its forward pass). Nothing is timed: pass the rate that your machine
sustains, for example what `benchmarks/pretrain_profile.py` finds.

    python benchmarks/imagenet_cost.py --tflops 300
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, DeiTConfig, SwinConfig, ViTConfig

from tve_hf import TVEConfig, TVEExplainer

IMAGES = 1_281_167  # training images of ImageNet-1k
SIDE, GRID = 224, 14
# Configurations of the paper's backbones, D of each, and the shape of the last feature map.
BACKBONES = {
    "ViT-B/16": (ViTConfig(), 768, (768, 14, 14)),
    "DeiT-B/16": (DeiTConfig(architectures=["DeiTForImageClassification"]), 768, (768, 14, 14)),
    "Swin-B": (SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]), 1024, (1024, 7, 7)),
}


def forward_gflop(model: torch.nn.Module, **inputs: object) -> float:
    """Floating-point operations of one forward pass, 10^9; a multiplication with its addition counts as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tflops", type=float, required=True, help="sustained rate of one GPU, 10^12 operations a second"
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--patches_per_image", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    hours = " | ".join(f"hours an epoch, {count} GPU{'s' if count > 1 else ''}" for count in args.gpus)
    print(f"| backbone | k | backbone, GFLOP a pass | explainer | a step, for each image | of it backbone | {hours} |")
    print("| --- " * (6 + len(args.gpus)) + "|")
    for name, (config, dim, shape) in BACKBONES.items():
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config).eval()
            explainer = TVEExplainer(
                TVEConfig(
                    image_size=SIDE,
                    grid_size=GRID,
                    embedding_dim=dim,
                    feature_names=["1", "2", "3"],
                    feature_dims=[shape[0]] * 3,
                )
            ).eval()
            pixel_values = torch.empty(1, 3, SIDE, SIDE)
            features = tuple(torch.empty(1, *shape) for _ in range(3))
            embeddings = torch.empty(1, dim)
        backbone = forward_gflop(model, pixel_values=pixel_values)
        own = forward_gflop(explainer, pixel_values=pixel_values, features=features, embeddings=embeddings)
        for k in args.patches_per_image:
            passes = (1 + 2 * k) * backbone
            step = passes + 3 * own
            seconds = IMAGES * step / (args.tflops * 1e3)
            cells = " | ".join(f"{seconds / count / 3600:.2f}" for count in args.gpus)
            print(f"| {name} | {k} | {backbone:.1f} | {own:.1f} | {step:.0f} GFLOP | {passes / step:.0%} | {cells} |")


if __name__ == "__main__":
    main()
