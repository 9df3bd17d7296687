"""What a model itself says of its images, classes and name, as timm's models do in `pretrained_cfg`."""

from typing import Any

from torch import nn
from transformers.utils import is_timm_available, is_torchvision_available


def pretrained_cfg_of(model: nn.Module) -> dict[str, Any]:
    """The `pretrained_cfg` of a model's config, of the model, or of the one that it wraps; empty where none has one.

    The config comes first: it is what was saved with the weights.
    """
    owners = (getattr(model, "config", None), model, getattr(model, "base_model", None))
    found = [getattr(owner, "pretrained_cfg", None) for owner in owners]
    return next((cfg for cfg in found if isinstance(cfg, dict)), {})


def image_processor_from(pretrained_cfg: dict[str, Any]) -> Any:
    """timm's own evaluation transform (resize, `crop_pct`, normalisation) as an image processor, or None."""
    if "input_size" not in pretrained_cfg or not (is_timm_available() and is_torchvision_available()):
        return None
    from transformers import TimmWrapperImageProcessor

    return TimmWrapperImageProcessor(pretrained_cfg, architecture=pretrained_cfg.get("architecture"))


def id2label_from(pretrained_cfg: dict[str, Any], num_labels: int) -> dict[int, str] | None:
    """The names of the classes, as transformers gives them to a timm model of the Hub, or None.

    They are those of the configuration, or of the ImageNet of that many classes if the head is still the one that the
    configuration describes.
    """
    names = pretrained_cfg.get("label_names")
    if not is_timm_available() or (names is None and pretrained_cfg.get("num_classes") != num_labels):
        return None
    from transformers import TimmWrapperConfig

    return TimmWrapperConfig.from_dict({"num_classes": num_labels, "label_names": names}).id2label
