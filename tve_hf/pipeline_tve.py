"""The transformers pipeline "transferable-attribution": images in, signed maps and pictures out."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, Pipeline, PreTrainedModel
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import ModelOutput, logging

from .attribution import DEFAULT_RULE, rule_named, transfer, verify
from .classifiers import SplitClassifier, split_classifier
from .fingerprint import match
from .images import load_image, seen_region
from .visualization import heatmap, overlay

logger = logging.get_logger(__name__)

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_EXPLAINER = CHECKPOINTS / "tve-vit-tiny-tiny-imagenet"
DEFAULT_CLASSIFIER = CHECKPOINTS / "vit-tiny-tiny-imagenet"


class TransferableAttributionPipeline(Pipeline):
    """Explain why an image classifier decided as it did, by one pass of the classifier and one of an explainer.

    ```python
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier)
    explain("cat.jpg")                          # the predicted class
    explain(["a.jpg", "b.jpg"], batch_size=2, top_k=3)
    explain("cat.jpg", label="tabby", verify=16)
    ```

    Args:
        classifier: the classifier f = H_t o G to explain, on the backbone G that the explainer was pre-trained for: a
            `SplitClassifier`, a model, or a name for `AutoModelForImageClassification.from_pretrained`. By default
            the one that is shipped with the default explainer.

    For each image and class, the pipeline gives a dict:

    - **label**, **class_idx**, **score**: the class and the probability that the classifier gives it;
    - **attribution**: the raw signed map, a float32 array (rows, cols); positive supports the class;
    - **rule**: the rule of `tve_hf.attribution.RULES` that made it;
    - **heatmap**: the map drawn on the image's geometry, a float32 array (H, W) in [0, 1];
    - **overlay**: a PIL picture of the image's size;
    - **verification**: with `verify=n`, predicted against exact scores on n random patches.
    """

    _load_processor = False
    _load_image_processor = None
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self,
        model: PreTrainedModel,
        classifier: SplitClassifier | nn.Module | str | os.PathLike | None = None,
        image_processor: BaseImageProcessor | None = None,
        **kwargs: Any,
    ):
        if classifier is None:
            if Path(model.name_or_path) != DEFAULT_EXPLAINER:
                raise ValueError(
                    "Which classifier is to be explained? Pass classifier=, a model or a name, on the backbone "
                    f"{model.config.backbone_name!r} that this explainer was pre-trained for."
                )
            classifier = DEFAULT_CLASSIFIER
        if isinstance(classifier, nn.Module) and not isinstance(classifier, SplitClassifier):
            classifier = split_classifier(classifier, image_processor)
        elif not isinstance(classifier, SplitClassifier):
            classifier = split_classifier(classifier, dtype=kwargs.get("dtype"))
        self.classifier = classifier
        # The classifier's own processor is right for its predictions; the explainer's is the same or does not fit.
        image_processor = classifier.image_processor or image_processor
        if image_processor is None:
            raise ValueError(f"No image processor came with {classifier.name}; pass image_processor=.")
        super().__init__(model, image_processor=image_processor, **kwargs)
        self.classifier.to(self.device)
        self._check_fit()
        self._region = lru_cache(maxsize=256)(partial(seen_region, image_processor))

    def _check_fit(self) -> None:
        """Refuse an explainer of another backbone; warn of one whose weights have changed since."""
        config, classifier = self.model.config, self.classifier
        explainer = f"The explainer {self.model.name_or_path or type(self.model).__name__}"
        remedy = f"use an explainer pre-trained for {classifier.name}, or pre-train one with `tve-hf pretrain`"
        if config.embedding_dim != classifier.embedding_dim:
            raise ValueError(
                f"{explainer} predicts embeddings of {config.embedding_dim} dimensions, but the head of "
                f"{classifier.name} reads {classifier.embedding_dim}; {remedy}."
            )
        size = tuple(classifier.probe().shape[-2:])
        if size != config.image_shape:
            raise ValueError(
                f"{explainer} was made for images of {config.image_shape} pixels, but {classifier.name} takes {size}; "
                f"{remedy}."
            )
        for name in ("image_mean", "image_std"):
            own, theirs = getattr(config, name), getattr(self.image_processor, name, None)
            if own is not None and theirs is not None and not torch.allclose(torch.tensor(own), torch.tensor(theirs)):
                raise ValueError(
                    f"{explainer} expects {name}={list(own)}, but the image processor of {classifier.name} has "
                    f"{list(theirs)}; {remedy}."
                )
        if config.backbone_fingerprint is not None:
            verdict = match(config.backbone_fingerprint, classifier.fingerprint())
            if verdict == "no":
                raise ValueError(
                    f"{explainer} was pre-trained for the backbone {config.backbone_name!r}, which is not that of "
                    f"{classifier.name}; {remedy}."
                )
            if verdict != "same weights":
                logger.warning(
                    f"{classifier.name} has other backbone weights than {config.backbone_name!r}, which the explainer "
                    "was pre-trained for, as after full fine-tuning: expect worse maps, and check them with verify=16."
                )
        bad = [name for name, weight in self.model.state_dict().items() if not torch.isfinite(weight).all()]
        if bad:
            raise ValueError(f"{explainer} holds NaN or infinity in {bad[0]}; download or train it again.")

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        class_idx: int | Sequence[int] | None = None,
        label: str | Sequence[str] | None = None,
        rule: str | None = None,
        verify: int | None = None,
        timeout: float | None = None,
    ) -> tuple[dict, dict, dict]:
        preprocess = {} if timeout is None else {"timeout": timeout}
        forward: dict[str, Any] = {}
        if sum(x is not None for x in (top_k, class_idx, label)) > 1:
            raise ValueError("top_k, class_idx and label exclude one another; pass one of them.")
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"top_k is {top_k}; ask for at least one class.")
            forward["top_k"] = top_k
        if label is not None:
            forward["classes"] = [self._index_of(name) for name in ([label] if isinstance(label, str) else label)]
        if class_idx is not None:
            forward["classes"] = [class_idx] if isinstance(class_idx, int) else [int(index) for index in class_idx]
            outside = [index for index in forward["classes"] if index not in self.classifier.id2label]
            if outside:
                raise ValueError(
                    f"class_idx {outside[0]} is not a class of {self.classifier.name}, which has "
                    f"{len(self.classifier.id2label)}, counted from 0."
                )
        if rule is not None:
            rule_named(rule)
            forward["rule"] = rule
        if verify is not None:
            if verify < 1:
                raise ValueError(f"verify is {verify}; give the number of patches to compare, for example 16.")
            forward["num_verified"] = verify
        return preprocess, forward, {}

    def _index_of(self, label: str) -> int:
        """Find a class by its name, or by one of the comma-separated synonyms in it, whatever the case."""
        wanted = label.strip().lower()
        names: dict[str, int] = {}
        for index, name in self.classifier.id2label.items():
            for part in (name, *name.split(",")):
                names.setdefault(part.strip().lower(), index)
        if wanted not in names:
            near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5) or [n for n in names if wanted in n][:3]
            hint = f"; did you mean {', '.join(repr(n) for n in near)}?" if near else "; see classifier.id2label."
            raise ValueError(f"{label!r} is not a class of {self.classifier.name}{hint}")
        return names[wanted]

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Explain one image, or several.

        Args:
            inputs: a path, URL, base64 string, PIL image, array or tensor; a list or generator of those; or a
                `datasets` column or `KeyDataset`.
            top_k: explain the k most probable classes (1 by default).
            class_idx: explain this class or these classes instead.
            label: explain the class or classes of this name.
            rule: how embeddings become scores, a key of `tve_hf.attribution.RULES`.
            verify: also compare with exact scores on this many random patches: two masked passes each.
            timeout: seconds to wait for a download.
            batch_size, num_workers: as in every pipeline.

        Returns:
            A list of dicts, one for each class; for several images a list of such lists, or an iterator over them
            where the images come one by one.

        Raises:
            ValueError: If there is no image, an image cannot be read, or a class does not exist.
        """
        if inputs is None or (isinstance(inputs, (list, tuple)) and not inputs):
            raise ValueError("No image was given; pass a path, URL, PIL image or array, or a list of them.")
        if type(inputs).__module__.startswith("datasets."):  # a column, decoded row by row
            inputs = KeyDataset(inputs.source, inputs.column_name)
        elif isinstance(inputs, os.PathLike):
            inputs = os.fspath(inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(self, image: Any, timeout: float | None = None) -> dict[str, Any]:
        picture = load_image(image, timeout)
        inputs = self.image_processor(images=picture, return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"].to(self.classifier.dtype), "image": picture}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        top_k: int = 1,
        classes: list[int] | None = None,
        rule: str = DEFAULT_RULE,
        num_verified: int | None = None,
    ) -> ModelOutput:
        pixel_values: Tensor = model_inputs["pixel_values"]
        # A lone image comes as it is, a batch of them as a list.
        pictures = model_inputs["image"] if isinstance(model_inputs["image"], list) else [model_inputs["image"]]
        config = self.model.config
        seen = self.classifier(pixel_values)
        predicted = self.model(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
        log_prob = self.classifier.log_prob(seen.embeddings)
        if classes is None:
            class_idx = log_prob.topk(min(top_k, log_prob.shape[-1])).indices
        else:
            class_idx = torch.tensor(classes, device=log_prob.device).expand(len(log_prob), -1)
        scores = transfer(
            predicted.kept, predicted.removed, self.classifier, class_idx, rule, config.grid_size, config.hops
        )
        verifications = None
        if num_verified is not None:
            verifications = [
                verify(
                    self.classifier,
                    pixel_values,
                    predicted.kept,
                    predicted.removed,
                    column,
                    num_patches=num_verified,
                    rule=rule,
                    grid_size=config.grid_size,
                    hops=config.hops,
                )
                for column in class_idx.T
            ]
        results = [
            {
                "image": picture,
                "rule": rule,
                "class_idx": class_idx[i].cpu(),
                "score": log_prob[i, class_idx[i]].exp().cpu(),
                "attribution": scores[i].unflatten(-1, config.grid_shape).float().cpu(),
                "verification": None if verifications is None else [column[i] for column in verifications],
            }
            for i, picture in enumerate(pictures)
        ]
        return ModelOutput(results=results)

    def postprocess(self, model_outputs: ModelOutput) -> list[dict[str, Any]]:
        result = model_outputs["results"]
        result = result[0] if isinstance(result, list) else result
        picture = result["image"]
        region = self._region(picture.size)
        explanations = []
        for k, index in enumerate(result["class_idx"].tolist()):
            attribution = result["attribution"][k].numpy()
            drawn = heatmap(attribution, picture.size, region)
            explanation = {
                "label": self.classifier.id2label[index],
                "class_idx": index,
                "score": result["score"][k].item(),
                "attribution": attribution,
                "rule": result["rule"],
                "heatmap": drawn,
                "overlay": overlay(picture, drawn, region),
            }
            if result["verification"] is not None:
                explanation["verification"] = asdict(result["verification"][k])
            explanations.append(explanation)
        return explanations
