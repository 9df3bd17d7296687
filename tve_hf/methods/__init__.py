"""Explanation methods behind one function: `explain(name, classifier, pixel_values, class_idx, grid_size)`.

Each method is a function `explain` in a file of its own, imported when it is first asked for.
"""

from collections.abc import Callable, Collection
from importlib import import_module
from inspect import Parameter, signature
from math import prod
from typing import Any, get_args

import torch
from torch import Tensor

from ..attribution import rule_named
from ..classifiers import SplitClassifier
from ..classifiers.given import ClassifierInput, ClassInput, class_tensor, split_and_pixels
from ..inputs import refuse_unknown, whole_number
from ..patches import GridSize, as_pair, dividing_grid

_METHODS = {
    "tve": ".tve",
    "vit_shapley": ".vit_shapley",
    "exact": ".exact",
    "exact_sampled": ".exact_sampled",
    "sampled": ".sampled",
    "random": ".random",
    "centre": ".centre",
    "raw_attention": ".raw_attention",
    "rollout": ".rollout",
    "attention_cam": ".attention_cam",
    "chefer_cam": ".chefer_cam",
    "partial_lrp": ".partial_lrp",
    "transformer_attribution": ".transformer_attribution",
    "legrad": ".legrad",
    "libragrad": ".libragrad",
    "text_span": ".text_span",
    "grad_cam": ".grad_cam",
    "rise": ".rise",
    "occlusion": ".occlusion",
    "lime": ".lime",
    "kernel_shap": ".kernel_shap",
    "saliency": ".saliency",
    "ig": ".ig",
    "grad_shap": ".grad_shap",
    "deep_lift": ".deep_lift",
}


# Those whose passes serve all classes of an image at once.
_FOR_ALL_CLASSES = {"tve", "exact", "sampled"}
# The least of an option that is a whole number; others may be negative.
_LEAST = {"n_samples": 1, "n_steps": 1, "chunk_size": 1, "cells": 1, "hops": 0, "refine": 0}


def available() -> set[str]:
    """Return the names of all methods."""
    return set(_METHODS)


def load(name: str) -> Callable[..., Tensor]:
    """Return a method's own function; raises ValueError for an unknown name."""
    path = _METHODS.get(name.replace("-", "_")) if isinstance(name, str) else None
    if path is None:
        raise ValueError(f"Unknown method {name!r}; choose one of {', '.join(sorted(_METHODS))}.")
    return import_module(path, __name__).explain


def options_of(name: str) -> dict[str, Any]:
    """The options that a method takes besides what all take, each with its default.

    Raises:
        ValueError: If no method has this name.
    """
    parameters = list(signature(load(name)).parameters.values())[4:]
    return {p.name: p.default for p in parameters if p.kind is not Parameter.VAR_KEYWORD}


def check_options(name: str, options: dict[str, Any], inputs: Collection[str] = ()) -> None:
    """Check what a method is given besides what all take.

    Args:
        name: of the method.
        options: by their names.
        inputs: names of what else the classifier reads, which a method may take too.

    Raises:
        TypeError, ValueError: If it has no such option, or one has a wrong type or is out of range.
    """
    parameters = signature(load(name)).parameters
    takes_inputs = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    known = options_of(name)
    unread = [] if takes_inputs else [option for option in options if option in inputs]
    if unread:
        raise ValueError(
            f"{name} takes no {unread[0]}, which the classifier reads besides pixels; 'exact' serves any classifier."
        )
    refuse_unknown(name, options, [*known, *inputs])
    for option, value in options.items():
        kind = parameters[option].annotation if option in known else None
        if int in (kind, *get_args(kind)) and not (value is None and known[option] is None):
            whole_number(option, value, _LEAST.get(option))
    if isinstance(rule := options.get("rule"), str):
        rule_named(rule)


def explain(
    name: str,
    classifier: ClassifierInput,
    pixel_values: Any,
    class_idx: ClassInput,
    grid_size: GridSize | None = None,
    **options: Any,
) -> Tensor:
    """Explain a batch with one method.

    Args:
        name: one of `available()`; "-" may stand for "_".
        classifier: the classifier to explain, in eval mode: a `SplitClassifier`; or a model or name, which is split
            in each call.
        pixel_values: (B, 3, H, W), as the image processor makes them; or images, one or a list, which the
            classifier's image processor prepares.
        class_idx: the class to explain in each image, (B,); K classes of each, (B, K); or a number, of all images.
        grid_size: P, or (rows, cols), of the map; by default the explainer's, where one is among the options, or
            `classifier.default_grid`, but about 10 a side for "sampled" with fewer than two samples a patch.
        options: what the method's own `explain` takes besides. "exact" and "sampled" also take what the classifier
            reads besides pixels, such as the spatial_shapes of images that come as rows of patches.

    Returns:
        scores (B, rows, cols), or (B, K, rows, cols), float32, higher for patches that support the class more; units
        are the method's.

    Raises:
        ValueError, TypeError: If no method has this name, it has no such option, it needs an explainer, or it cannot
            serve this classifier; if there is no image, `class_idx` does not name a class for each, or pixels or
            scores are not finite.
    """
    method = load(name)
    name = name.replace("-", "_")
    split, pixel_values, made = split_and_pixels(explain, classifier, pixel_values, {})
    options = made | options
    for option, default in options_of(name).items():
        if default is Parameter.empty and options.get(option) is None:
            annotation = signature(method).parameters[option].annotation
            raise ValueError(
                f"{name} needs {option}, a {annotation.__name__} trained for {split.name}; pass {option}=, or use "
                "'exact', which needs none."
            )
    check_options(name, options, split.backbone.other_inputs)
    known = options_of(name)
    class_idx = class_tensor(split, class_idx, len(pixel_values), several=True)
    explainer = options.get("explainer", options.get("shapley_explainer"))
    if grid_size is None and explainer is not None:
        grid_size = explainer.config.grid_shape
    elif grid_size is None:
        inputs = {key: options[key] for key in split.backbone.other_inputs if key in options}
        grid_size = split.default_grid(pixel_values, **inputs)
        number = options.get("n_samples", known["n_samples"]) if name == "sampled" else None
        if number is not None and number < 2 * prod(as_pair(grid_size)) and pixel_values.ndim == 4:
            height, width = pixel_values.shape[-2:]
            grid_size = dividing_grid(height, width, longest=10)  # else the map is mostly noise
    grid = as_pair(grid_size)
    if class_idx.ndim == 1 or name in _FOR_ALL_CLASSES:
        scores = method(split, pixel_values, class_idx, grid, **options)
    else:
        each = [method(split, pixel_values, classes, grid, **options) for classes in class_idx.unbind(1)]
        scores = torch.stack(each, 1)
    if not torch.isfinite(scores).all():
        raise not_finite(name, split)
    return scores


def not_finite(name: str, classifier: SplitClassifier) -> ValueError:
    """The error for scores, or what they are made of, that are NaN or infinite."""
    return ValueError(
        f"The scores of {name} are not finite: the classifier's weights hold NaN or infinity, or its head gives them; "
        f"load {classifier.name} again or in float32, or put another head on it."
    )
