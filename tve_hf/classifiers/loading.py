"""Load a classifier and what prepares its images by name: a folder or a repository of the Hub, safetensors only."""

from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import is_timm_available, is_torchvision_available

from ..weights import find_weights, open_source


def load_classifier(
    name: str, processor: Any, dtype: Any, trust_remote_code: bool
) -> tuple[nn.Module, Any, list[str]]:
    """Load a model, as a zero-shot model if it was saved as one, and its processor.

    Args:
        name: folder or repository; of an adapter, the model that it adapts is loaded with it.
        processor: used in the place of the model's own, if not None.
        dtype: to load it in, a `torch.dtype` or its name; "auto" is the one that it was saved in.
        trust_remote_code: whether it may run code from its repository.

    Returns:
        The model, its processor, and the names of weights that its files lack.

    Raises:
        OSError: If there is no such model, or it is out of reach.
        ValueError: If a zero-shot model lacks weights.
    """
    source = open_source(name)
    if source.file("adapter_config.json") is None:
        find_weights(source)
    common = {"trust_remote_code": trust_remote_code, **source.pinned}
    config, _ = PreTrainedConfig.get_config_dict(name, **source.pinned)  # a folder of an adapter has no model_type
    zero_shot = set(MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.values())
    prompted = not zero_shot.isdisjoint(config.get("architectures") or ())
    model_class: Any = AutoModelForZeroShotImageClassification if prompted else AutoModelForImageClassification
    if processor is None:
        source.file("preprocessor_config.json")  # fetched and checked before transformers reads it
        processor = (AutoProcessor if prompted else AutoImageProcessor).from_pretrained(name, **common)
    if (config.get("model_args") or {}).get("num_classes"):  # which timm writes, and transformers passes itself
        common["config"] = AutoConfig.from_pretrained(name, **common)
        common["config"].model_args.pop("num_classes")
    model, report = model_class.from_pretrained(
        name, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
    )
    missing = sorted(report["missing_keys"])
    if prompted and missing:  # transformers has drawn them at random
        raise ValueError(f"{name} is no whole zero-shot model ({missing[0]} is missing): download or export it again.")
    return model, processor, missing


def pretrained_cfg_of(model: nn.Module) -> dict[str, Any]:
    """The `pretrained_cfg` of a model's config, of the model, or of the one that it wraps; empty where none has one.

    The config comes first: it is what was saved with the weights.
    """
    owners = (getattr(model, "config", None), model, getattr(model, "base_model", None))
    configurations = [getattr(owner, "pretrained_cfg", None) for owner in owners]
    return next((cfg for cfg in configurations if isinstance(cfg, dict)), {})


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
