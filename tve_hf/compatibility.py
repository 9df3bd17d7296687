"""Does this explainer fit that classifier?"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .classifiers import SplitClassifier
from .fingerprint import match
from .images import normalization
from .modeling_tve import TVEExplainer
from .wrapped import named_weights

logger = logging.get_logger(__name__)


def fit(explainer: TVEExplainer, classifier: SplitClassifier, image_processor: Any = None) -> SplitClassifier:
    """Refuse an explainer of another backbone; warn of one whose weights have changed since.

    Args:
        explainer: pre-trained for some backbone, which its config describes.
        classifier: whose backbone it should be.
        image_processor: what makes the classifier's images, by default its own.

    Returns:
        The classifier, reading the feature maps that the explainer was trained on.

    Raises:
        ValueError: If D, image size, normalisation, architecture or feature maps differ, the classifier is in train
            mode, or weights are not finite; the message names both and what to do.
    """
    config = explainer.config
    named = f"The explainer {explainer.name_or_path or type(explainer).__name__}"
    remedy = f"use an explainer pre-trained for {classifier.name}, or pre-train one with `tve-hf pretrain`"
    if classifier.training:
        raise ValueError(f"{classifier.name} is in train mode, where dropout is active; call classifier.eval() first.")
    if config.embedding_dim != classifier.embedding_dim:
        raise ValueError(
            f"{named} predicts embeddings of {config.embedding_dim} dimensions, but the head of "
            f"{classifier.name} reads {classifier.embedding_dim}; {remedy}."
        )
    probe = classifier.probe()
    if probe.ndim != 4:
        raise ValueError(
            f"{named} reads images of one grid, but {classifier.name} takes rows of patches, whose grid depends on "
            'the image; use `tve_hf.methods.explain("exact", ...)` for it.'
        )
    size = tuple(probe.shape[-2:])
    if size != config.image_shape:
        raise ValueError(
            f"{named} was made for images of {config.image_shape} pixels, but {classifier.name} takes {size}; "
            f"{remedy}."
        )
    processor = image_processor or classifier.image_processor
    named_values = () if processor is None else zip(("image_mean", "image_std"), normalization(processor), strict=True)
    for name, theirs in named_values:
        own = getattr(config, name)
        if own is not None and not torch.allclose(torch.tensor(own), torch.tensor(theirs), atol=1e-4):
            raise ValueError(
                f"{named} expects {name}={list(own)}, but the image processor of {classifier.name} has "
                f"{theirs}; {remedy}."
            )
    if config.backbone_fingerprint is not None:
        verdict = match(config.backbone_fingerprint, classifier.fingerprint())
        if verdict == "no":
            raise ValueError(
                f"{named} was pre-trained for the backbone {config.backbone_name!r}, which is not that of "
                f"{classifier.name}; {remedy}."
            )
        if verdict != "same weights":
            logger.warning(
                f"{classifier.name} has other backbone weights than {config.backbone_name!r}, which the explainer "
                "was pre-trained for, as after full fine-tuning: expect worse maps, and check them with verify=16."
            )
    owners: dict[str, nn.Module] = {named: explainer, f"The classifier {classifier.name}": classifier}
    for owner, module in owners.items():
        bad = [name for name, weight in named_weights(module) if not torch.isfinite(weight).all()]
        if bad:
            raise ValueError(f"{owner} holds NaN or infinity in {bad[0]}; download or train it again.")
    return classifier.reading(tuple(config.feature_names))
