"""Split an image classifier f = H_t o G into backbone G and head H_t by looking at one forward pass, not by name."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .loading import id2label_from, image_processor_from, load_classifier, pretrained_cfg_of
from .model import SplitClassifier
from .parts import Backbone, Head
from .prompts import check_prompts, no_text_tower
from .search import MAX_HEADS, check_inputs, differ, find_features, find_head
from .tracing import probe_like, trace
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

    The head is the innermost module with weights whose output is the logits; the embedding is what it is given.
    Where the logits are a fixed sum or mean of several modules' outputs, the embedding is all that they are given.
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
        loaded, processor, missing = load_classifier(name, image_processor, dtype or "auto", trust_remote_code)
        classifier = split_classifier(
            loaded, processor, candidate_labels=candidate_labels, hypothesis_template=hypothesis_template
        )
        prefixes = tuple(f"{part}." for part in classifier.backbone.head_names)
        untrained = [key for key in missing if key.startswith(prefixes)]
        if untrained:  # transformers has drawn them at random
            raise ValueError(
                f"{name} has no trained head ({untrained[0]} is missing): pass a model trained to classify."
            )
        return classifier
    if is_compiled(model):
        logger.warning(
            f"{type(unwrapped(model)).__name__} is compiled: its embeddings are read by hooks, which compiled code "
            "skips, so it runs uncompiled here."
        )
        model = unwrapped(model)
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0]} is in train mode, where dropout is active; call model.eval() first.")
    config = getattr(model, "config", None)
    pretrained_cfg = pretrained_cfg_of(model)
    name = getattr(config, "_name_or_path", None) or pretrained_cfg.get("architecture") or type(model).__name__
    if takes_prompts(model):
        labels, templates = check_prompts(candidate_labels, hypothesis_template)
        backbone, text = split_towers(model, image_processor, name, labels, templates)
        return SplitClassifier(
            backbone,
            text.head(labels, templates),
            backbone.embedding_dim,
            id2label=dict(enumerate(labels)),
            multi_label=text.sigmoid,
            image_processor=image_processor.image_processor,
            name=name,
            text=text,
        )
    if not (candidate_labels is None and hypothesis_template is None):
        raise no_text_tower(name)
    check_inputs(model)

    if image_processor is None:
        image_processor = image_processor_from(pretrained_cfg)
    probe = probe_like(model, image_processor)
    logits, calls = trace(model, **probe)
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{name} gives NaN or infinite logits for plain noise: download or train it again, or load it in float32."
        )
    try:
        parts = find_head(model, logits, calls)
    except ValueError:
        if logits.numel() > MAX_HEADS:
            raise
        # Two images give fewer logits than there may be heads: look at more, to tell what each contributes.
        probe = probe_like(model, image_processor, MAX_HEADS + 1)
        logits, calls = trace(model, **probe)
        parts = find_head(model, logits, calls)
    pixel_values = probe["pixel_values"]
    feature_names = find_features(calls, parts[0].name, pixel_values)
    del calls
    num_labels = logits.shape[-1]
    names = getattr(config, "id2label", None) or id2label_from(pretrained_cfg, num_labels) or {}
    id2label = names if len(names) == num_labels else {i: f"LABEL_{i}" for i in range(num_labels)}
    backbone = Backbone(model, parts, feature_names, tuple(probe)[1:])
    classifier = SplitClassifier(
        backbone,
        Head(model, parts),
        backbone.embedding_dim,
        id2label=id2label,
        multi_label=num_labels == 1 or getattr(config, "problem_type", None) == "multi_label_classification",
        image_processor=image_processor,
        name=name,
    )
    with torch.no_grad():
        output = classifier.backbone(**(probe | {"pixel_values": pixel_values.flip(-1).roll(1, 0)}))
        again = classifier.head(output.embeddings)
    if differ(again, output.logits):
        names = ", ".join(
            f"{part.name!r}{', averaged over positions' if part.pooled and not part.by_max else ''}" for part in parts
        )
        raise ValueError(
            f"Cannot split {type(model).__name__}: its logits depend on more than the input of {names}; "
            "wrap it so that one module gives the logits from one embedding."
        )
    if num_labels == 1 and len(names) == 2:  # one logit for two classes
        return classifier.with_head(classifier.head, names)
    return classifier
