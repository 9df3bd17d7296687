"""Split an image classifier f = H_t o G into backbone G and head H_t by looking at one forward pass, not by name."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .loading import id2label_from, load_classifier, pretrained_cfg_of
from .model import SplitClassifier
from .parts import Backbone, Head, HeadPart
from .probing import Traced, trace_more_noise, trace_noise
from .prompts import check_prompts, no_text_tower
from .search import MAX_HEADS, check_inputs, differ, find_features, find_head, find_layouts
from .wrapped import is_compiled, unwrapped
from .zero_shot import split_towers, takes_prompts

logger = logging.get_logger(__name__)


def split_classifier(
    model: nn.Module | str | os.PathLike,
    image_processor: Any = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    candidate_labels: Sequence[str] | None = None,
    hypothesis_template: str | Sequence[str] | None = None,
) -> SplitClassifier:
    """Split an image classifier into backbone and head, f = H_t o G, by watching two passes over noise.

    The head is the innermost module with weights whose output is the logits; the embedding is what it reads.
    Where the logits are a fixed sum or mean of several modules' outputs, the embedding is all that they read.
    The split is accepted only if `head(embed(x))` gives the logits of another probe. One logit z of a model that names
    two classes becomes the logits (0, z).

    In a zero-shot model the backbone is the image tower, and the head compares its embedding with those of prompts:
    logits are its `logits_per_image`, probabilities a sigmoid of them where the model adds a bias, else a softmax.
    Without `candidate_labels` it has a backbone only, until `with_prompts`.

    Args:
        model: a classifier in eval mode, of transformers, timm or any `nn.Module` that maps pixel_values (B, 3, H, W)
            to logits (B, C), or a zero-shot model; or a name or folder for
            `AutoModelForImageClassification.from_pretrained`, or `AutoModelForZeroShotImageClassification` if it was
            saved as such.
        image_processor: its image processor, for the size of the probe and for what the model reads besides pixels;
            of a zero-shot model the processor, which holds the tokenizer too. By default loaded with the model if that
            is a name, and made from `pretrained_cfg` if it has one, as timm's models do.
        dtype: precision to load a named model in, by default the one that it was saved in.
        trust_remote_code: whether a named model may run code from its repository.
        candidate_labels, hypothesis_template: prompts for a zero-shot model, as for `with_prompts`.

    Raises:
        ValueError: If the model is in train mode, reads text, or gives its logits by other ways than these.
        OSError: If a named model is out of reach, damaged, or not in safetensors.
    """
    if not isinstance(model, nn.Module):
        name = os.fspath(model)
        return _split_named(name, image_processor, dtype, trust_remote_code, candidate_labels, hypothesis_template)
    model = _uncompiled(model)
    _check_eval_mode(model)
    name = _name_of(model)
    if takes_prompts(model):
        return _split_zero_shot(model, image_processor, name, candidate_labels, hypothesis_template)
    if not (candidate_labels is None and hypothesis_template is None):
        raise no_text_tower(name)
    check_inputs(model)

    traced = trace_noise(model, image_processor)
    _check_finite(traced, name)
    parts, traced = _find_head(model, traced)
    layouts = find_layouts(traced.calls, traced.pixel_values)
    feature_names = find_features(traced.calls, [part.name for part in parts], layouts, traced.pixel_values)
    backbone = Backbone(model, parts, feature_names, tuple(traced.probe)[1:], layouts, traced.image_size)
    traced.calls.clear()  # with all that the model has computed
    classifier = _assemble(backbone, traced, name)
    _check_split(classifier, traced)
    return _with_both_classes(classifier)


def _split_named(
    name: str,
    image_processor: Any,
    dtype: torch.dtype | str | None,
    trust_remote_code: bool,
    candidate_labels: Sequence[str] | None,
    hypothesis_template: str | Sequence[str] | None,
) -> SplitClassifier:
    """Load a model by name and split it; refuse one whose head was never trained."""
    model, processor, missing = load_classifier(name, image_processor, dtype or "auto", trust_remote_code)
    classifier = split_classifier(
        model, processor, candidate_labels=candidate_labels, hypothesis_template=hypothesis_template
    )
    prefixes = tuple(f"{part}." for part in classifier.backbone.head_names)
    untrained = [key for key in missing if key.startswith(prefixes)]
    if untrained:  # transformers has drawn them at random
        raise ValueError(f"{name} has no trained head ({untrained[0]} is missing): pass a model trained to classify.")
    return classifier


def _split_zero_shot(
    model: nn.Module,
    processor: Any,
    name: str,
    candidate_labels: Sequence[str] | None,
    hypothesis_template: str | Sequence[str] | None,
) -> SplitClassifier:
    """Split a zero-shot model: the image tower is the backbone, prompts are the head."""
    labels, templates = check_prompts(candidate_labels, hypothesis_template)
    backbone, text = split_towers(model, processor, name, labels, templates)
    return SplitClassifier(
        backbone,
        text.head(labels, templates),
        backbone.embedding_dim,
        id2label=dict(enumerate(labels)),
        multi_label=text.sigmoid,
        image_processor=processor.image_processor,
        name=name,
        text=text,
    )


def _uncompiled(model: nn.Module) -> nn.Module:
    if not is_compiled(model):
        return model
    logger.warning(
        f"{type(unwrapped(model)).__name__} is compiled: its embeddings are read by hooks, which compiled code "
        "skips, so it runs uncompiled here."
    )
    return unwrapped(model)


def _check_eval_mode(model: nn.Module) -> None:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0]} is in train mode, where dropout is active; call model.eval() first.")


def _name_of(model: nn.Module) -> str:
    saved_as = getattr(getattr(model, "config", None), "_name_or_path", None)
    return saved_as or pretrained_cfg_of(model).get("architecture") or type(model).__name__


def _check_finite(traced: Traced, name: str) -> None:
    if not torch.isfinite(traced.logits).all():
        raise ValueError(
            f"{name} gives NaN or infinite logits for plain noise: download or train it again, or load it in float32."
        )


def _find_head(model: nn.Module, traced: Traced) -> tuple[list[HeadPart], Traced]:
    """Find the modules that give the logits; return them and the pass in which they did.

    Two images may give fewer logits than there may be heads. Then more are looked at, to tell what each contributes.
    """
    try:
        return find_head(model, traced.logits, traced.calls), traced
    except ValueError:
        if traced.logits.numel() > MAX_HEADS:
            raise
    traced.calls.clear()
    traced = trace_more_noise(model, traced, MAX_HEADS + 1)
    return find_head(model, traced.logits, traced.calls), traced


def _assemble(backbone: Backbone, traced: Traced, name: str) -> SplitClassifier:
    """The classifier of this backbone and its own head, with the names of its classes."""
    config, num_labels = getattr(backbone.model, "config", None), traced.logits.shape[-1]
    names = _class_names(backbone.model, num_labels)
    return SplitClassifier(
        backbone,
        Head(backbone.model, backbone.parts),
        backbone.embedding_dim,
        id2label=names if len(names) == num_labels else {i: f"LABEL_{i}" for i in range(num_labels)},
        multi_label=num_labels == 1 or getattr(config, "problem_type", None) == "multi_label_classification",
        image_processor=traced.image_processor,
        name=name,
    )


def _class_names(model: nn.Module, num_labels: int) -> dict[int, str]:
    """The names of classes that come with a model, perhaps of more or fewer than it has logits."""
    own = getattr(getattr(model, "config", None), "id2label", None)
    return own or id2label_from(pretrained_cfg_of(model), num_labels) or {}


@torch.no_grad()
def _check_split(classifier: SplitClassifier, traced: Traced) -> None:
    """Check that head(embed(x)) gives the model's logits of other noise than that which was looked at."""
    backbone = classifier.backbone
    output = backbone(**(traced.probe | {"pixel_values": traced.pixel_values.flip(-1).roll(1, 0)}))
    if differ(classifier.head(output.embeddings), output.logits):
        heads = ", ".join(
            f"{part.name!r}{', averaged over positions' if part.pooled and not part.by_max else ''}"
            for part in backbone.parts
        )
        raise ValueError(
            f"Cannot split {type(backbone.model).__name__}: its logits depend on more than the input of {heads}; "
            "wrap it so that one module gives the logits from one embedding."
        )


def _with_both_classes(classifier: SplitClassifier) -> SplitClassifier:
    """Give one logit of a model that names two classes the logit 0 of the other beside it."""
    num_labels = len(classifier.id2label)
    names = _class_names(classifier.backbone.model, num_labels)
    return classifier.with_head(classifier.head, names) if num_labels == 1 and len(names) == 2 else classifier
