"""Explanation methods behind one function: `explain(name, classifier, pixel_values, class_idx, grid_size)`.

Each method is a function `explain` in a file of its own, imported when it is first asked for.
"""

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from ..classifiers import SplitClassifier
from ..patches import GridSize, as_pair

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


def available() -> set[str]:
    """Return the names of all methods."""
    return set(_METHODS)


def load(name: str) -> Callable[..., Tensor]:
    """Return a method's own function; raises ValueError for an unknown name."""
    path = _METHODS.get(name.replace("-", "_"))
    if path is None:
        raise ValueError(f"Unknown method {name!r}; choose one of {', '.join(sorted(_METHODS))}.")
    return import_module(path, __name__).explain


def explain(
    name: str,
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: GridSize | None = None,
    **options: Any,
) -> Tensor:
    """Explain a batch with one method.

    Args:
        name: one of `available()`; "-" may stand for "_".
        classifier: the classifier to explain, in eval mode.
        pixel_values: (B, 3, H, W).
        class_idx: the class to explain in each image, (B,).
        grid_size: P, or (rows, cols), of the map; by default the explainer's, where one is among the options, or
            `classifier.default_grid`.
        options: what the method's own `explain` takes besides. "exact" also takes what the classifier reads besides
            pixels, such as the spatial_shapes of images that come as rows of patches.

    Returns:
        scores (B, rows, cols), float32, higher for patches that support the class more; units are the method's.

    Raises:
        ValueError: If no method has this name, it has no such option, it needs an explainer, or it cannot serve this
            classifier; if there is no image, `class_idx` does not name a class for each, or pixels or scores are not
            finite.
    """
    method = load(name)
    parameters = signature(method).parameters
    unknown = [option for option in options if option not in parameters]
    if unknown and not any(map(_takes_any, parameters.values())):
        known = ", ".join(list(parameters)[4:]) or "none"
        raise ValueError(f"{name} takes no {unknown[0]}, its options are: {known}; 'exact' serves any classifier.")
    for option, parameter in list(parameters.items())[4:]:
        if parameter.default is Parameter.empty and options.get(option) is None and not _takes_any(parameter):
            raise ValueError(
                f"{name} needs {option}, a {parameter.annotation.__name__} trained for {classifier.name}; pass "
                f"{option}=, or use 'exact', which needs none."
            )
    if len(pixel_values) == 0:
        raise ValueError("pixel_values holds no image; pass a batch of at least one.")
    if not torch.isfinite(pixel_values).all():
        raise ValueError("pixel_values hold NaN or infinity, so there is nothing to explain.")
    classifier.check_classes(class_idx, len(pixel_values))
    explainer = options.get("explainer", options.get("shapley_explainer"))
    if grid_size is None and explainer is not None:
        grid_size = explainer.config.grid_shape
    elif grid_size is None:
        inputs = {key: options[key] for key in classifier.backbone.other_inputs if key in options}
        grid_size = classifier.default_grid(pixel_values, **inputs)
    scores = method(classifier, pixel_values, class_idx, as_pair(grid_size), **options)
    if not torch.isfinite(scores).all():
        raise ValueError(f"The scores of {name} are not finite: the classifier's weights hold NaN or infinity.")
    return scores


def _takes_any(parameter: Parameter) -> bool:
    """Whether a parameter is `**options`."""
    return parameter.kind is Parameter.VAR_KEYWORD
