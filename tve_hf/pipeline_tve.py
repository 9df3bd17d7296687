"""The transformers pipeline "transferable-attribution": images in, signed maps and pictures out."""

import copy
import operator
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, BaseImageProcessor, Pipeline, PreTrainedModel
from transformers.utils import ModelOutput

from .attribution import rule_named, rule_of, transfer
from .classifiers import SplitClassifier, split_classifier
from .classifiers.wrapped import is_dispatched
from .compatibility import find, fit, quality_with
from .faithfulness import check_coalitions, faithfulness
from .geometry import seen_region
from .images import TIMEOUT, images_of, load_image
from .refinement import Refinement, check_refinement
from .released import DEFAULT_CLASSIFIER, DEFAULT_EXPLAINER, EXPLAINERS
from .verification import verify
from .visualization import Region, heatmap, overlay


def _split(
    classifier: SplitClassifier | nn.Module | str | os.PathLike,
    image_processor: Any,
    dtype: torch.dtype | str | None,
    prompts: dict[str, Any],
) -> SplitClassifier:
    """Split what users pass as a classifier; an image processor that they pass takes the place of its own."""
    if isinstance(classifier, SplitClassifier):
        asked = any(value is not None for value in prompts.values())
        split = classifier.with_prompts(**prompts) if asked else copy.copy(classifier)  # the user's stays as it is
    elif isinstance(classifier, nn.Module):
        split = split_classifier(classifier, image_processor, **prompts)
    else:
        split = split_classifier(classifier, dtype=dtype, **prompts)
    if image_processor is not None:  # of a zero-shot model, maybe its processor of both images and text
        split.image_processor = getattr(image_processor, "image_processor", image_processor)
    return split


def _saved_processor(explainer: PreTrainedModel) -> BaseImageProcessor | None:
    """The image processor beside an explainer's weights, as `save_pretrained` of the pipeline leaves one."""
    try:
        return AutoImageProcessor.from_pretrained(explainer.name_or_path)
    except (OSError, ValueError):  # no file of one, or the explainer has no name
        return None


class TransferableAttributionPipeline(Pipeline):
    """Explain why an image classifier decided as it did, by one pass of the classifier and one of an explainer.

    ```python
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier)
    explain("cat.jpg")                          # the predicted class
    explain(["a.jpg", "b.jpg"], batch_size=2, top_k=3)
    explain("cat.jpg", label="tabby", verify=16)

    explain = pipeline("transferable-attribution", model=explainer, classifier=clip, candidate_labels=["cat", "dog"])
    explain("cat.jpg", candidate_labels=["tabby", "sofa"])   # another head, made by the text tower alone
    ```

    Args:
        classifier: the classifier f = H_t o G to explain, on the backbone G that the explainer was pre-trained for: a
            `SplitClassifier`, a model, or a name for `split_classifier`. By default the one that is shipped with the
            default explainer. Without `model`, a released explainer that fits it is used.
        image_processor: what makes the classifier's images, or its name; by default the classifier's own, or else
            that saved with the explainer.
        candidate_labels, hypothesis_template: the classes of a zero-shot classifier and the sentence, or sentences to
            average over, that they are put in, as for `SplitClassifier.with_prompts`; for all calls that give none.

    For each image and class, the pipeline gives a dict:

    - **label**, **class_idx**, **score**: the class and the probability that the classifier gives it;
    - **attribution**: the raw signed map, a float32 array (rows, cols); positive supports the class;
    - **rule**: the rule of `tve_hf.attribution.RULES` that made it;
    - **quality**: what pre-training measured of the explainer on held-out images, `TVEConfig.quality`, in words by
      `tve_hf.compatibility.quality_in_words`; None if nothing, or if the backbone has other weights since;
    - **heatmap**: the map drawn on the image's geometry, a float32 array (H, W) in [0, 1];
    - **overlay**: a PIL picture of the image's size;
    - **verification**: with `verify=n`, predicted against exact scores on n random patches; or, for explainers of
      random backgrounds, `r2` and `pearson` of predicted against true logits of n random coalitions.
    """

    _load_processor = False
    _load_image_processor = False  # so that one which arrives is the user's, not the explainer's
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self,
        model: PreTrainedModel,
        classifier: SplitClassifier | nn.Module | str | os.PathLike | None = None,
        image_processor: BaseImageProcessor | str | os.PathLike | None = None,
        candidate_labels: Sequence[str] | None = None,
        hypothesis_template: str | Sequence[str] | None = None,
        **kwargs: Any,
    ):
        if model.config.model_type != "tve":
            raise ValueError(
                f"model={model.name_or_path or type(model).__name__!r} is no explainer, but a {type(model).__name__}; "
                "pass a TVEExplainer as model=, and what it is to explain as classifier=."
            )
        is_default = Path(model.name_or_path) == DEFAULT_EXPLAINER  # what `pipeline` loads where no model is named
        if classifier is None and not is_default:
            raise ValueError(
                "Which classifier is to be explained? Pass classifier=, a model or a name, on the backbone "
                f"{model.config.backbone_name!r} that this explainer was pre-trained for."
            )
        if isinstance(image_processor, str | os.PathLike):
            image_processor = AutoImageProcessor.from_pretrained(image_processor)
        prompts = {"candidate_labels": candidate_labels, "hypothesis_template": hypothesis_template}
        named = DEFAULT_CLASSIFIER if classifier is None else classifier
        self.classifier = _split(named, image_processor, kwargs.get("dtype"), prompts)
        image_processor = self.classifier.image_processor or _saved_processor(model)
        if image_processor is None:
            raise ValueError(f"No image processor came with {self.classifier.name}; pass image_processor=.")
        if is_default and classifier is not None:  # the default explainer may not be that of this classifier
            name = find(EXPLAINERS, self.classifier, image_processor)
            if name != model.name_or_path:
                model = type(model).from_pretrained(name, dtype=model.dtype)
        super().__init__(model, image_processor=image_processor, **kwargs)
        on_device = self.classifier if is_dispatched(self.classifier) else self.classifier.to(self.device)
        self.classifier = fit(model, on_device, image_processor)
        self.quality = quality_with(model.config, self.classifier)
        self._regions: dict[tuple[int, int], Region] = {}  # by size of image

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        class_idx: int | Sequence[int] | None = None,
        label: str | Sequence[str] | None = None,
        rule: str | None = None,
        verify: int | None = None,
        refine: int | None = None,
        timeout: float | None = None,
        candidate_labels: Sequence[str] | None = None,
        hypothesis_template: str | Sequence[str] | None = None,
    ) -> tuple[dict, dict, dict]:
        preprocess = {} if timeout is None else {"timeout": timeout}
        forward: dict[str, Any] = {}
        classifier = self.classifier
        if not (candidate_labels is None and hypothesis_template is None):
            classifier = classifier.with_prompts(candidate_labels, hypothesis_template)
            forward["classifier"] = classifier
        if sum(x is not None for x in (top_k, class_idx, label)) > 1:
            raise ValueError("top_k, class_idx and label exclude one another; pass one of them.")
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"top_k is {top_k}; ask for at least one class.")
            forward |= {"top_k": top_k, "classes": None}
        if label is not None:
            forward["classes"] = [label] if isinstance(label, str) else list(label)
        if class_idx is not None:
            forward["classes"] = [operator.index(index) for index in np.atleast_1d(class_idx).tolist()]
        # Other prompts may come in a later call than the classes.
        for asked in (getattr(self, "_forward_params", {}) | forward).get("classes") or ():
            classifier.class_index(asked)
        if forward.get("classes") == []:
            raise ValueError("No class was given; pass at least one as class_idx or label, or neither of them.")
        if rule is not None:
            rule_named(rule)
            forward["rule"] = rule
        if verify is not None:
            if verify < 1:
                raise ValueError(f"verify is {verify}; give the number of patches to compare, for example 16.")
            if self.model.config.backgrounds == "random":
                check_coalitions(verify)
            forward["num_verified"] = verify
        if refine is not None:
            check_refinement(self.model.config, refine)
            forward["refine"] = refine
        return preprocess, forward, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Explain one image, or several.

        Args:
            inputs: a path, URL, base64 string, PIL image, array or tensor; a list, tuple or iterator of those; or a
                `datasets` column or `KeyDataset`.
            top_k: explain the k most probable classes (1 by default).
            class_idx: explain this class or these classes instead.
            label: explain the class or classes of this name.
            rule: how embeddings become scores, a key of `tve_hf.attribution.RULES`.
            verify: also compare with exact scores on this many random patches, two masked passes each; for explainers
                of random backgrounds, with what this many random coalitions do to the logit, a masked pass each.
            refine: masked passes of the classifier that correct the map, for explainers of random backgrounds.
            timeout: seconds to wait for each step of a download; 10 by default.
            candidate_labels, hypothesis_template: other prompts for a zero-shot classifier, in this call.
            batch_size, num_workers: as in every pipeline.

        Returns:
            A list of dicts, one for each class; for several images a list of such lists, or an iterator over them
            where the images come one by one.

        Raises:
            ValueError, TypeError, OSError: If there is no image, an image cannot be read, or a class does not exist.
        """
        return super().__call__(images_of(inputs), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the explainer and the image processor; the classifier is not part of it.

        Unlike in other custom pipelines no code is copied, for that could only be loaded with `trust_remote_code`:
        to load it, import `tve_hf`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory, **kwargs)

    def preprocess(self, image: Any, timeout: float | None = TIMEOUT) -> dict[str, Any]:
        picture = load_image(image, timeout)
        processed = self.image_processor(images=picture, return_tensors="pt")
        inputs = {name: processed[name] for name in ("pixel_values", *self.classifier.backbone.other_inputs)}
        floats = {name: x.to(self.classifier.dtype) for name, x in inputs.items() if x.is_floating_point()}
        return inputs | floats | {"image": picture}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        top_k: int = 1,
        classes: list[int | str] | None = None,
        rule: str | None = None,
        num_verified: int | None = None,
        refine: int | None = None,
        classifier: SplitClassifier | None = None,
    ) -> ModelOutput:
        classifier = classifier or self.classifier
        pixel_values: Tensor = model_inputs["pixel_values"]
        # A lone image comes as it is, a batch of them as a list.
        pictures = model_inputs["image"] if isinstance(model_inputs["image"], list) else [model_inputs["image"]]
        config = self.model.config
        inputs = {name: model_inputs[name] for name in classifier.backbone.other_inputs}
        seen = classifier(pixel_values, **inputs)
        predicted = self.model(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
        log_prob = classifier.log_prob(seen.embeddings)
        if classes is None:
            class_idx = log_prob.topk(min(top_k, log_prob.shape[-1])).indices
        else:
            indices = [classifier.class_index(asked) for asked in classes]
            class_idx = torch.tensor(indices, device=log_prob.device).expand(len(log_prob), -1)
        pair, rule = (predicted.kept, predicted.removed), rule or rule_of(config)
        refinement = Refinement(classifier, pixel_values, *pair, config, refine, **inputs) if refine else None

        def scores_of(name: str) -> Tensor:  # (B, K, N)
            scores = transfer(*pair, classifier, class_idx, name, config.grid_size, config.hops)
            return scores if refinement is None else scores + refinement.correction(classifier, class_idx, name)

        scores, verifications = scores_of(rule), None
        if num_verified is not None and config.backgrounds == "random":
            asked = num_verified, config.distribution, config.grid_size
            verifications = faithfulness(classifier, pixel_values, scores_of("logit"), class_idx, *asked, **inputs)
        elif num_verified is not None:
            how: Any = {"rule": rule, "grid_size": config.grid_size, "hops": config.hops, **inputs}
            verifications = verify(classifier, pixel_values, *pair, class_idx, num_verified, **how)
        results = [
            {
                "image": picture,
                "rule": rule,
                "class_idx": class_idx[i].cpu(),
                "labels": [classifier.id2label[index] for index in class_idx[i].tolist()],
                "score": log_prob[i, class_idx[i]].exp().cpu(),
                "attribution": scores[i].unflatten(-1, self.model.grid_shape).float().cpu(),
                "verification": None if verifications is None else verifications[i],
            }
            for i, picture in enumerate(pictures)
        ]
        return ModelOutput(results=results)

    def postprocess(self, model_outputs: ModelOutput) -> list[dict[str, Any]]:
        result = model_outputs["results"]
        result = result[0] if isinstance(result, list) else result
        picture = result["image"]
        if picture.size not in self._regions:
            self._regions[picture.size] = seen_region(self.image_processor, picture.size)
        region = self._regions[picture.size]
        explanations = []
        for k, index in enumerate(result["class_idx"].tolist()):
            attribution = result["attribution"][k].numpy()
            drawn = heatmap(attribution, picture.size, region)
            explanation = {
                "label": result["labels"][k],
                "class_idx": index,
                "score": result["score"][k].item(),
                "attribution": attribution,
                "rule": result["rule"],
                "quality": self.quality,
                "heatmap": drawn,
                "overlay": overlay(picture, drawn, region),
            }
            if result["verification"] is not None:
                explanation["verification"] = asdict(result["verification"][k])
            explanations.append(explanation)
        return explanations
