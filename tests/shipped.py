"""The checkpoints of the package: the small ViT, its heads and its explainer, cheap enough for any test, and a CNN."""

from tve_hf.released import CHECKPOINTS

VIT = CHECKPOINTS / "vit-tiny-tiny-imagenet"
VIT_PETS = CHECKPOINTS / "vit-tiny-cats-vs-dogs"
VIT_EXPLAINER = CHECKPOINTS / "tve-vit-tiny-tiny-imagenet"
CNN = CHECKPOINTS / "mobilenet-v2-tiny-imagenet"
CNN_PETS = CHECKPOINTS / "mobilenet-v2-cats-vs-dogs"
