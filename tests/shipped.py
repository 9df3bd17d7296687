"""The small ViT of the package, its two heads and its explainer: cheap enough for tests that need trained weights."""

from tve_hf.released import CHECKPOINTS, VIT_EXPLAINER

VIT = CHECKPOINTS / "vit-tiny-tiny-imagenet"
VIT_PETS = CHECKPOINTS / "vit-tiny-cats-vs-dogs"

__all__ = ["VIT", "VIT_EXPLAINER", "VIT_PETS"]
