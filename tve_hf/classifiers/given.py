"""What users pass in the place of a split classifier, its pixel_values and the classes of these."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoImageProcessor

from ..images import images_of, load_image
from ..inputs import refuse_unknown, shown
from .model import SplitClassifier
from .split import split_classifier

ClassifierInput = SplitClassifier | nn.Module | str | os.PathLike[str]
ClassInput = Tensor | int | Sequence[int]


def as_split(
    classifier: ClassifierInput,
    image_processor: Any = None,
    dtype: torch.dtype | str | None = None,
    prompts: dict[str, Any] | None = None,
) -> SplitClassifier:
    """Split what users pass as a classifier; an image processor, or its name, takes the place of its own.

    Raises:
        TypeError: If it is no model, name or folder.
        ValueError, OSError: As `split_classifier`.
    """
    if isinstance(image_processor, str | os.PathLike):
        image_processor = AutoImageProcessor.from_pretrained(image_processor)
    prompts = prompts or {}
    if isinstance(classifier, SplitClassifier):
        asked = any(value is not None for value in prompts.values())
        split = classifier.with_prompts(**prompts) if asked else copy.copy(classifier)  # the user's stays as it is
    elif isinstance(classifier, nn.Module):
        split = split_classifier(classifier, image_processor, **prompts)
    elif isinstance(classifier, (str, os.PathLike)):
        split = split_classifier(classifier, dtype=dtype, **prompts)
    else:
        raise TypeError(
            f"classifier is {shown(classifier)}; pass an image classifier, its name or folder, or a SplitClassifier."
        )
    if image_processor is not None:  # of a zero-shot model, maybe its processor of both images and text
        split.image_processor = getattr(image_processor, "image_processor", image_processor)
    return split


def check_eval_mode(classifier: SplitClassifier) -> None:
    """Raise ValueError for a classifier in train mode."""
    if classifier.training:
        raise ValueError(f"{classifier.name} is in train mode, where dropout is active; call classifier.eval() first.")


def split_and_pixels(
    function: Callable[..., Any], classifier: ClassifierInput, images: Any, inputs: dict[str, Tensor]
) -> tuple[SplitClassifier, Tensor, dict[str, Tensor]]:
    """What a function on tensors works with, from what users pass: (classifier, pixel_values, inputs).

    Args:
        function: which asks, for messages.
        classifier: split, or anything that `split_classifier` splits, which is then done in each call.
        images: pixel_values, (B, 3, H, W), as the image processor makes them; or images as they are, one or a list,
            that the classifier's own image processor prepares.
        inputs: what else the classifier reads.

    Raises:
        TypeError, ValueError: If there is no image, it is not what the classifier takes, or an input has the name of
            no argument.
    """
    split = classifier if isinstance(classifier, SplitClassifier) else as_split(classifier)
    check_eval_mode(split)
    known = [*signature(function).parameters, *split.backbone.other_inputs]
    refuse_unknown(function.__name__, (name for name, x in inputs.items() if not isinstance(x, Tensor)), known)
    if isinstance(images, Mapping) and "pixel_values" in images:  # all that an image processor returned
        inputs = {name: images[name] for name in split.backbone.other_inputs if name in images} | inputs
        images = images["pixel_values"]
    if not isinstance(images, Tensor):
        images, made = _processed(split, images)
        inputs = made | inputs
    if not images.ndim or not len(images):
        raise ValueError("pixel_values holds no image; pass a batch of at least one.")
    return split, _checked_pixels(images, split), inputs


def _checked_pixels(images: Tensor, classifier: SplitClassifier) -> Tensor:
    """Refuse tensors that are no batch of prepared images; put the others where the classifier is, in its dtype."""
    shape = tuple(images.shape)
    remedy = None
    if not images.is_floating_point():
        remedy = f"of {images.dtype}; pass what the image processor makes, or the images themselves in a list"
    elif images.ndim == 3 and not classifier.backbone.other_inputs:
        remedy = "of one image; pass a batch, pixel_values.unsqueeze(0)"
    elif images.ndim == 4 and shape[-1] in (1, 3, 4) and shape[1] not in (1, 3, 4):
        remedy = "with channels last; pass pixel_values.permute(0, 3, 1, 2)"
    elif images.ndim not in (3, 4):
        remedy = "which are no images; pass a batch, (B, 3, H, W)"
    if remedy is not None:
        raise ValueError(f"pixel_values have shape {shape}, {remedy}.")
    if not torch.isfinite(images).all():
        raise ValueError("pixel_values hold NaN or infinity, so there is nothing to explain.")
    return images.to(classifier.device, classifier.dtype)


def _processed(classifier: SplitClassifier, images: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Prepare images by the classifier's image processor: pixel_values and what else it reads."""
    if classifier.image_processor is None:
        raise ValueError(
            f"{classifier.name} came without an image processor, so images cannot be prepared for it; pass its "
            "pixel_values, (B, 3, H, W), or tve_hf.split_classifier(model, image_processor) in its place."
        )
    several: Any = images_of(images)
    if isinstance(several, Dataset):  # a column, which has a length
        column: Any = several
        several = [column[row] for row in range(len(column))]
    several = several if isinstance(several, (list, GeneratorType)) else [several]
    pictures = [load_image(image) for image in several]
    processed = classifier.image_processor(images=pictures, return_tensors="pt")
    others = {name: processed[name].to(classifier.device) for name in classifier.backbone.other_inputs}
    return processed["pixel_values"], others


def class_tensor(classifier: SplitClassifier, class_idx: Any, batch_size: int, several: bool = False) -> Tensor:
    """The class of each image, (B,); an int is that of all; and (B, K) for K classes of each, if `several`.

    Raises:
        ValueError: If it names no class for each image.
    """
    if isinstance(class_idx, int) and not isinstance(class_idx, bool):
        class_idx = [class_idx] * batch_size
    try:
        classes = torch.as_tensor(class_idx)
    except (TypeError, ValueError, RuntimeError):  # text, None, or lists of several lengths
        raise ValueError(
            f"class_idx {shown(class_idx)} must name, for each of {batch_size} images, a class, as a tensor of whole "
            "numbers."
        ) from None
    if classes.ndim == 0:
        classes = classes.expand(batch_size)
    classifier.check_classes(classes, batch_size, several)
    return classes.to(classifier.device, torch.int64)
