"""Does this explainer fit that classifier, which one does, and how far is it to be trusted?"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel
from transformers.utils import logging

from .classifiers import SplitClassifier
from .classifiers.given import check_eval_mode
from .classifiers.wrapped import named_weights
from .configuration_tve import TVEConfig
from .fingerprint import match
from .geometry import normalization
from .modeling_tve import TVEExplainer
from .released import DEFAULT_EXPLAINER
from .weights import open_source, read_config

logger = logging.get_logger(__name__)

# As two fingerprints compare; "unknown" if the explainer, otherwise fitting, holds none or cannot be read.
Fit = Literal["same weights", "same architecture, other weights", "no", "unknown"]
_PREFERRED: tuple[Fit, ...] = ("same weights", "same architecture, other weights")
# What a validation measures, and below what an explainer is poor. By the logs beside the shipped one and in
# docs/comparison, at the end of the training R2 is 0.46, Spearman 0.66 to 0.86, and the share 95 % or more; after a
# tenth of it R2 is 0.37, and the share 75 %. One that has learnt nothing has about 0 of each.
LEAST = {"logit_r2": 0.2, "spearman": 0.4, "share of fidelity": 0.5}
_REFERENCES = {"sampled_fidelity_gap": "sampled", "exact_fidelity_gap": "exact"}


class NoExplainerError(ValueError):
    """None of the explainers fits the classifier."""


@dataclass(frozen=True)
class Verdict:
    """Whether an explainer fits a classifier, the reason as a clause about the explainer, and what to do if not."""

    fit: Fit
    reason: str
    remedy: str = ""


def verdict(
    config: TVEConfig, classifier: SplitClassifier, image_processor: Any = None, pixel_values: Tensor | None = None
) -> Verdict:
    """Compare what an explainer was made for with a classifier; its weights are not needed.

    Args:
        config: of the explainer.
        classifier: whose backbone it should be.
        image_processor: what makes the classifier's images, by default its own.
        pixel_values: images that the classifier takes, (B, 3, H, W); of the size that it seems to want if None.
    """
    remedy = f"use an explainer pre-trained for {classifier.name}, or pre-train one with `tve-hf pretrain`"
    if config.embedding_dim != classifier.embedding_dim:
        reason = (
            f"predicts embeddings of {config.embedding_dim} dimensions, but the classifier's head reads "
            f"{classifier.embedding_dim}"
        )
        return Verdict("no", reason, remedy)
    probe = classifier.probe() if pixel_values is None else pixel_values
    if probe.ndim != 4:
        reason = (
            f"reads images of one grid, but {classifier.name} takes rows of patches, whose grid depends on the image"
        )
        return Verdict("no", reason, 'use `tve_hf.methods.explain("exact", ...)` for it')
    size = tuple(probe.shape[-2:])
    if size != config.image_shape:
        reason = f"was made for images of {config.image_shape} pixels, but {classifier.name} takes {size}"
        return Verdict("no", reason, remedy)
    processor = image_processor or classifier.image_processor
    named_values = () if processor is None else zip(("image_mean", "image_std"), normalization(processor), strict=True)
    for name, theirs in named_values:
        own = getattr(config, name)
        if own is not None and not torch.allclose(torch.tensor(own), torch.tensor(theirs), atol=1e-4):
            reason = f"expects {name}={list(own)}, but the image processor of {classifier.name} has {theirs}"
            return Verdict("no", reason, remedy)
    fit, reason = _verdict_on_weights(config, classifier)
    if fit != "no":
        try:
            classifier.reading(tuple(config.feature_names))
        except ValueError as error:
            fit, reason = "no", f"reads feature maps that are not there: {str(error).rstrip('.')}"
    return Verdict(fit, reason, remedy)


def _verdict_on_weights(config: TVEConfig, classifier: SplitClassifier) -> tuple[Fit, str]:
    """Compare the fingerprints alone."""
    if config.backbone_fingerprint is None:
        return "unknown", "fits by its shapes, and holds no fingerprint of the weights that it was pre-trained for"
    try:
        fit = match(config.backbone_fingerprint, classifier.fingerprint())
    except ValueError as error:
        return "unknown", f"fits by its shapes, but its fingerprint tells nothing: {str(error).rstrip('.')}"
    relation = {
        "same weights": f"has the weights of {classifier.name}",
        "same architecture, other weights": f"has other weights than {classifier.name}",
        "no": f"is not that of {classifier.name}",
    }
    return fit, f"was pre-trained for the backbone {config.backbone_name!r}, which {relation[fit]}"


def verdict_by_name(name: str, classifier: SplitClassifier, image_processor: Any = None) -> Verdict:
    """The verdict on an explainer of which only config.json is read; "unknown" if it cannot be."""
    try:
        stored = read_config(open_source(name))
        if stored.get("model_type") != TVEConfig.model_type:
            return Verdict("no", "is no explainer", "pass the name of one")
        config = TVEConfig.from_dict(stored)
    except (OSError, ValueError, StrictDataclassError) as error:
        return Verdict("unknown", f"cannot be read: {' '.join(str(error).split()).rstrip('.')}")
    return verdict(config, classifier, image_processor)


def check_explainer(model: Any, classifier: Any) -> None:
    """Refuse a model that is no explainer, and one other than the shipped one without a classifier to explain.

    Raises:
        ValueError: With what to pass.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != TVEConfig.model_type:
        name = getattr(model, "name_or_path", "") or type(model).__name__
        raise ValueError(
            f"model={name!r} is no explainer, but a {type(model).__name__}; pass a TVEExplainer as model=, or none, "
            "and what is to be explained as classifier=."
        )
    if classifier is None and Path(model.name_or_path) != DEFAULT_EXPLAINER:
        raise ValueError(
            "Which classifier is to be explained? Pass classifier=, a model or a name, on the backbone "
            f"{model.config.backbone_name!r} that this explainer was pre-trained for."
        )


def saved_processor(explainer: PreTrainedModel) -> BaseImageProcessor | None:
    """The image processor beside an explainer's weights, as `save_pretrained` of the pipeline leaves one."""
    try:
        return AutoImageProcessor.from_pretrained(explainer.name_or_path)
    except (OSError, ValueError):  # no file of one, or the explainer has no name
        return None


def find(names: Iterable[str], classifier: SplitClassifier) -> str:
    """Return the first of these explainers that was pre-trained for the classifier's weights, or else architecture.

    Raises:
        NoExplainerError: If none fits; the message says why, and how to train one.
    """
    verdicts = {name: verdict_by_name(name, classifier) for name in names}
    for wanted in _PREFERRED:
        for name, judged in verdicts.items():
            if judged.fit == wanted:
                return name
    reasons = "; ".join(f"{name} {judged.reason}" for name, judged in verdicts.items())
    raise NoExplainerError(f"No released explainer fits {classifier.name}: {reasons}; {how_to_train(classifier)}.")


def released(
    names: Iterable[str], default: TVEExplainer, classifier: SplitClassifier, method: str | None = None
) -> TVEExplainer | None:
    """Load the first of these explainers that fits, which may be the default; None where a method needs none.

    Args:
        method: that was asked for: if none was, an explainer need not fit; if it is "tve", one must.

    Raises:
        NoExplainerError: If the method is "tve", and none fits.
    """
    if method not in (None, "tve"):
        return None
    try:
        name = find(names, classifier)
    except NoExplainerError:
        if method is None:
            return None
        raise
    return default if name == default.name_or_path else type(default).from_pretrained(name, dtype=default.dtype)


def how_to_train(classifier: SplitClassifier) -> str:
    """What to do for an explainer of a classifier, as a clause."""
    return (
        f"pass one as model=, or train one: `tve-hf pretrain --classifier {classifier.name} --backgrounds random "
        "--train_files IMAGES --output_dir FOLDER`"
    )


def check_sound(classifier: SplitClassifier, explainer: nn.Module | None = None, named: str = "") -> None:
    """Refuse what gives no maps that mean anything.

    Raises:
        ValueError: If the classifier is in train mode, or the weights of either are not finite.
    """
    check_eval_mode(classifier)
    owners: dict[str, nn.Module] = {} if explainer is None else {named: explainer}
    for owner, module in (owners | {f"The classifier {classifier.name}": classifier}).items():
        bad = [name for name, weight in named_weights(module) if not torch.isfinite(weight).all()]
        if bad:
            raise ValueError(f"{owner} holds NaN or infinity in {bad[0]}; download or train it again.")


def fit(
    explainer: TVEExplainer,
    classifier: SplitClassifier,
    image_processor: Any = None,
    pixel_values: Tensor | None = None,
) -> SplitClassifier:
    """Refuse an explainer of another backbone; warn of one that is poor, or whose backbone's weights have changed.

    Args:
        explainer: pre-trained for some backbone, which its config describes.
        classifier: whose backbone it should be.
        image_processor: what makes the classifier's images, by default its own.
        pixel_values: images that the classifier takes, (B, 3, H, W); of the size that it seems to want if None.

    Returns:
        The classifier, reading the feature maps that the explainer was trained on.

    Raises:
        ValueError: If D, image size, normalisation, architecture or feature maps differ, the classifier is in train
            mode, or weights are not finite; the message names both and what to do.
    """
    named = f"The explainer {explainer.name_or_path or type(explainer).__name__}"
    check_sound(classifier, explainer, named)
    judged = verdict(explainer.config, classifier, image_processor, pixel_values)
    if judged.fit == "no":
        raise ValueError(f"{named} {judged.reason}; {judged.remedy}.")
    doubt = _doubt(explainer)
    if doubt:
        logger.warning(f"{named} {doubt}")
    if judged.fit == "same architecture, other weights":
        logger.warning(
            f"{classifier.name} has other backbone weights than {explainer.config.backbone_name!r}, which the "
            "explainer was pre-trained for, as after full fine-tuning: expect worse maps, and check them with "
            "verify=16."
        )
    return classifier.reading(tuple(explainer.config.feature_names))


def quality_with(config: TVEConfig, classifier: SplitClassifier) -> dict[str, float | int] | None:
    """Return what an explainer's pre-training measured; None if that is nothing, or of other weights than these."""
    if config.quality is None or _verdict_on_weights(config, classifier)[0] == "same architecture, other weights":
        return None
    return config.quality


def quality_in_words(quality: dict[str, float | int] | None) -> str:
    """Say in a sentence how far an explainer with this `TVEConfig.quality` is to be trusted."""
    if not quality:
        return "How good the explainer is for this backbone was not measured; verify says it of each map."
    poor = ", which is poor" if _is_poor(quality) else ""
    return f"On {quality['num_images']} held-out images the explainer {_told(quality)}{poor}."


def measures_of(quality: dict[str, float | int]) -> dict[str, float]:
    """The numbers that an explainer is judged by, named as in `LEAST`, as far as they were measured."""
    main = "logit_r2" if "embedding_r2" in quality else "spearman"  # of random backgrounds, of antithetical states
    found: dict[str, float] = {main: quality[main]} if main in quality else {}
    for name in _REFERENCES:
        if quality.get(name, 0) > 0 and "fidelity_gap" in quality:
            found["share of fidelity"] = quality["fidelity_gap"] / quality[name]
    return found


def _is_poor(quality: dict[str, float | int]) -> bool:
    found = measures_of(quality)
    return not found.keys() - {"share of fidelity"} or any(value < LEAST[name] for name, value in found.items())


def _told(quality: dict[str, float | int]) -> str:
    """The numbers that an explainer is judged by, as clauses about it."""
    judged, clauses = {name: max(0.0, value) for name, value in measures_of(quality).items()}, []
    if "logit_r2" in judged:
        clauses.append(f"accounts for {judged['logit_r2']:.0%} of what masking does to the class's logit (median)")
    elif "spearman" in judged:
        clauses.append(f"ranks the patches as the exact attribution does by a Spearman of {judged['spearman']:.2f}")
    else:
        clauses.append("gives constant maps")
    if "share of fidelity" in judged:
        whose = next(word for name, word in _REFERENCES.items() if quality.get(name, 0) > 0)
        clauses.append(f"its maps reach {judged['share of fidelity']:.0%} of the fidelity of {whose} ones")
    return ", and ".join(clauses)


def _doubt(explainer: TVEExplainer) -> str:
    """What is to be said against an explainer, as a clause about it with a remedy; empty if nothing is."""
    quality, trunk = getattr(explainer.config, "quality", None), explainer.trunk
    heads = [trunk.get_submodule(name) for name in getattr(trunk, "heads", ())]
    if heads and not any(weight.any() for head in heads for weight in head.parameters()):
        return "was never trained, so its maps say nothing; train it with `tve-hf pretrain`."
    if quality and _is_poor(quality):
        found = f"on {quality['num_images']} held-out images it {_told(quality)}"
        return f'is poor: {found}. Train it for more steps, or take the method "sampled".'
    return ""
