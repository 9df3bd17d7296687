"""The checkpoints of the package: two classifiers, a second head on each, and their explainers."""

from tve_hf.released import CHECKPOINTS

VIT = CHECKPOINTS / "vit-tiny-tiny-imagenet"
VIT_PETS = CHECKPOINTS / "vit-tiny-cats-vs-dogs"
VIT_EXPLAINER = CHECKPOINTS / "tve-vit-tiny-tiny-imagenet"
CNN_EXPLAINER = CHECKPOINTS / "tve-mobilenet-v2-tiny-imagenet"
CNN = CHECKPOINTS / "mobilenet-v2-tiny-imagenet"
CNN_PETS = CHECKPOINTS / "mobilenet-v2-cats-vs-dogs"
