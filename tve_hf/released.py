"""The index of released explainers, and the checkpoints that come with the package."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_EXPLAINER = CHECKPOINTS / "tve-mobilenet-v2-tiny-imagenet"
DEFAULT_CLASSIFIER = CHECKPOINTS / "mobilenet-v2-tiny-imagenet"

# Folders, or names of repositories on the Hub: where an explainer is looked for if none is named.
EXPLAINERS: tuple[str, ...] = (str(DEFAULT_EXPLAINER), str(CHECKPOINTS / "tve-vit-tiny-tiny-imagenet"))
# On the Hub, every card says so.
TAG = "tve_hf"
