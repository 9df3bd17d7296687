"""Tiny models with random weights that leave no architecture insensitive to its pixels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

NUM_LABELS = 5
_VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2], "window_size": 2}


@dataclass(frozen=True)
class Spec:
    """How to build a tiny classifier, and what splitting it must find."""

    model_class: type[nn.Module]
    config: Any
    side: int  # pixels
    embedding_dim: int
    feature_shapes: list[tuple[int, int, int]]  # (C, h, w) of each map, at that side


def _spec(
    model_class: type[nn.Module], config_class: type, side: int, dim: int, shapes: list[tuple], **values: Any
) -> Spec:
    return Spec(model_class, config_class(num_labels=NUM_LABELS, **values), side, dim, shapes)


def _specs() -> dict[str, Spec]:
    tokens = [(32, 4, 4)] * 3
    mlp = {"intermediate_size": 64}
    dino = _VIT | {"mlp_ratio": 2}
    stages = [(16, 8, 8), (24, 4, 4), (32, 2, 2)]
    return {
        "vit": _spec(ViTForImageClassification, ViTConfig, 32, 32, tokens, **_VIT, **mlp),
        "deit": _spec(DeiTForImageClassification, DeiTConfig, 32, 32, tokens, **_VIT, **mlp),
        "beit": _spec(BeitForImageClassification, BeitConfig, 32, 32, tokens, **_VIT, **mlp),
        "dinov2": _spec(Dinov2ForImageClassification, Dinov2Config, 32, 64, tokens, **dino),
        "dinov2_with_registers": _spec(
            Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig, 32, 64, tokens, **dino
        ),
        "swin": _spec(
            SwinForImageClassification,
            SwinConfig,
            64,
            128,
            [(64, 4, 4), (128, 2, 2), (128, 2, 2), (128, 2, 2)],
            image_size=64,
            **_SWIN,
        ),
        "convnext": _spec(ConvNextForImageClassification, ConvNextConfig, 64, 32, stages, image_size=64, **_STAGES),
        "resnet": _spec(ResNetForImageClassification, ResNetConfig, 64, 32, stages, embedding_size=8, **_STAGES),
        "mobilenet_v1": _spec(
            MobileNetV1ForImageClassification,
            MobileNetV1Config,
            64,
            128,
            [(32, 8, 8), (64, 4, 4), (128, 2, 2)],
            image_size=64,
            depth_multiplier=0.125,
        ),
        "mobilenet_v2": _spec(
            MobileNetV2ForImageClassification,
            MobileNetV2Config,
            64,
            1280,
            [(8, 4, 4), (16, 4, 4), (40, 2, 2), (1280, 2, 2)],
            image_size=64,
            depth_multiplier=0.125,
        ),
    }


SPECS = _specs()


class TinyCNN(nn.Module):
    """A plain module that returns a tensor: three stages of convolution and ReLU, mean over the map, linear."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        sides = [channels, 4, 6, 8]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(sides[i], sides[i + 1], 3, stride=2, padding=1), nn.ReLU()) for i in range(3)
        )
        self.fc = nn.Linear(8, NUM_LABELS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        for stage in self.stages:
            pixel_values = stage(pixel_values)
        return self.fc(pixel_values.mean((2, 3)))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights that carry the signal through, unlike the tiny initial ones, and batch statistics that fit them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator)

    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            is_table = "token" in name or "position" in name
            weight.copy_(normal(weight, 0.5 if is_table else 1.3 / weight[0].numel() ** 0.5))
        elif "bias" in name:
            weight.copy_(normal(weight, 0.1))
        else:
            weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    return model


@torch.no_grad()
def fit_batch_statistics(model: nn.Module, side: int) -> nn.Module:
    """Give batch normalisation the statistics of noise images, without which it lets tiny signals fade."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.random.fork_rng():
            torch.manual_seed(0)  # for dropout
            model.train()(torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()
