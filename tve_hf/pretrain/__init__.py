"""Pre-train an explainer for one backbone on unlabelled images (Algorithm 1)."""

from .arguments import PretrainArguments
from .loop import pretrain
from .model import config_for

__all__ = ["PretrainArguments", "config_for", "pretrain"]
