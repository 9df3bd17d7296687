"""The transformers pipeline "transferable-attribution": images in, signed maps and pictures out."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, Pipeline, PreTrainedModel
from transformers.utils import ModelOutput

from .attribution import rule_of, transfer, unit_of
from .classifiers import SplitClassifier
from .classifiers.given import as_split
from .classifiers.parts import SplitClassifierOutput
from .classifiers.wrapped import is_dispatched
from .compatibility import check_explainer, check_sound, fit, quality_with, released, saved_processor
from .faithfulness import faithfulness
from .folding import explain_pass
from .geometry import Region, seen_region
from .images import TIMEOUT, images_of, load_image
from .inputs import OF_METHOD, WithClasses, call_options, with_classes
from .refinement import Refinement, check_asked
from .released import DEFAULT_CLASSIFIER, DEFAULT_EXPLAINER, EXPLAINERS
from .verification import verify
from .visualization import MAX_SIZE, Explanation, Photograph


def _methods() -> ModuleType:
    """What the pipeline asks of the package's other methods, which do not go with the code of a pushed explainer."""
    try:
        if __package__ != "tve_hf":
            raise ImportError
        from tve_hf.methods import maps
    except ImportError:
        raise ImportError(
            "Methods other than 'tve' come with the package: `pip install tve_hf`, and `import tve_hf` first."
        ) from None
    return maps


class TransferableAttributionPipeline(Pipeline):
    """Explain why an image classifier decided as it did, by one pass of the classifier and one of an explainer.

    ```python
    explain = pipeline("transferable-attribution", model=explainer, classifier=classifier)
    explain("cat.jpg")                          # the predicted class
    explain(["a.jpg", "b.jpg"], batch_size=2, top_k=3)
    explain("cat.jpg", label="tabby", verify=16)
    explain("cat.jpg", method="sampled", method_kwargs={"n_samples": 400})      # needs no explainer

    explain = pipeline("transferable-attribution", model=explainer, classifier=clip, candidate_labels=["cat", "dog"])
    explain("cat.jpg", candidate_labels=["tabby", "sofa"])   # another head, made by the text tower alone
    ```

    Args:
        classifier: the classifier f = H_t o G to explain, on the backbone G that the explainer was pre-trained for: a
            `SplitClassifier`, a model, or a name for `split_classifier`. By default the one that is shipped with the
            default explainer. Without `model`, a released explainer that fits it is used, or the method "sampled".
        image_processor: what makes its images, or its name; by default its own, or else that saved with the explainer.
        candidate_labels, hypothesis_template: the classes of a zero-shot classifier and the sentence, or sentences to
            average over, that they are put in, as for `SplitClassifier.with_prompts`; for all calls that give none.
        kwargs: those of a call, for all calls that give none, and those of every pipeline.

    For each image and class, the pipeline gives a dict:

    - **label**, **class_idx**, **score**: the class and the probability that the classifier gives it;
    - **attribution**: the raw signed map, a float32 array (rows, cols); positive supports the class;
    - **method**, **rule**: what made it, of `tve_hf.methods.available()`, and its rule of `RULES`, or None;
    - **quality**: what pre-training measured of the explainer with these weights, `TVEConfig.quality`, or None;
    - **heatmap**, **overlay**, **figure**: drawn when first asked for, see `tve_hf.visualization.Explanation`;
    - **verification**: with `verify=n`, predicted against exact scores on n random patches; or, where scores add up,
      `r2` and `pearson` of predicted against true evidence in n random coalitions.
    """

    _load_processor = _load_feature_extractor = _load_tokenizer = False
    _load_image_processor = False  # so that one which arrives is the user's, not the explainer's

    def __init__(
        self,
        model: PreTrainedModel,
        classifier: SplitClassifier | nn.Module | str | os.PathLike | None = None,
        image_processor: BaseImageProcessor | str | os.PathLike | None = None,
        candidate_labels: Sequence[str] | None = None,
        hypothesis_template: str | Sequence[str] | None = None,
        **kwargs: Any,
    ):
        check_explainer(model, classifier)
        prompts = {"candidate_labels": candidate_labels, "hypothesis_template": hypothesis_template}
        named = DEFAULT_CLASSIFIER if classifier is None else classifier
        self.classifier = as_split(named, image_processor, kwargs.get("dtype"), prompts)
        explainer, image_processor = model, self.classifier.image_processor
        if classifier is not None and Path(model.name_or_path) == DEFAULT_EXPLAINER:  # loaded where none is named
            explainer = released(EXPLAINERS, model, self.classifier, kwargs.get("method"))
        if image_processor is None and explainer is not None:
            image_processor = saved_processor(explainer)
        if image_processor is None:
            raise ValueError(f"No image processor came with {self.classifier.name}; pass image_processor=.")
        if explainer is None and kwargs.get("method") is None:
            kwargs["method"] = _methods().without_explainer(self.classifier, kwargs.get("method_kwargs"))
        self.has_explainer = explainer is not None
        self._whole = self.classifier  # with all its feature maps, which methods may read
        if explainer is None and is_dispatched(self.classifier):
            kwargs.setdefault("device", self.classifier.device)
        super().__init__(explainer or self.classifier, image_processor=image_processor, **kwargs)
        if not is_dispatched(self.classifier):
            self.classifier.to(self.device)
        self.quality = None if explainer is None else quality_with(explainer.config, self.classifier)
        if explainer is None:
            check_sound(self.classifier)
        else:
            self.classifier = fit(explainer, self.classifier, image_processor)
        self._regions: dict[tuple[int, int], Region] = {}  # by size of image

    def _sanitize_parameters(self, **given: Any) -> tuple[dict, dict, dict]:
        if not given:
            return {}, {}, {}
        options, preprocess, forward, drawing = call_options(given)
        classifier = self.classifier
        if options.keys() & {"candidate_labels", "hypothesis_template"}:
            classifier = classifier.with_prompts(options.get("candidate_labels"), options.get("hypothesis_template"))
            forward["classifier"] = classifier
        merged = getattr(self, "_forward_params", {}) | forward
        for name in merged.get("classes") or ():  # other prompts may come in a later call than the classes
            classifier.class_index(name)
        method, asked = merged.get("method"), {name: merged.get(name) for name in OF_METHOD}
        if method not in (None, "tve"):
            _methods().check(method, **asked)
        elif not self.has_explainer:
            raise ValueError(f"This pipeline has no explainer of {self.classifier.name}; pass one as model=.")
        else:
            check_asked(self.model.config, **asked)
        return preprocess, forward, drawing

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Explain one image, or several.

        Args:
            inputs: a path, URL, base64 string, bytes, open file, PIL image, array or tensor; a list, tuple or iterator
                of those, or an array of four dimensions; or a `datasets` column or `KeyDataset`.
            top_k: explain the k most probable classes (1 by default).
            class_idx: explain this class or these in every image; or, as a list of lists or an array (B, K), those of
                row i in image i of a list.
            label: explain the class or classes of this name, likewise.
            method: one of `tve_hf.methods.available()`; "tve", the explainer, where the pipeline has one.
            method_kwargs: options of another method and `grid_size`, as for `tve_hf.methods.explain`.
            rule: how embeddings become scores, a key of `tve_hf.attribution.RULES`.
            verify: also compare with exact scores on this many random patches, two masked passes each; where scores
                add up, with what this many random coalitions do to the class, a masked pass each.
            refine: masked passes of the classifier that correct the map, for explainers of random backgrounds.
            timeout: seconds to wait for each step of a download; 10 by default.
            on_error: "skip" to give an image that cannot be read one dict, with its **error**; "raise" by default.
            candidate_labels, hypothesis_template: other prompts for a zero-shot classifier, in this call.
            max_size: pixels of the longer side of pictures, 1600 by default; None draws large images in full.
            smooth: False draws each patch as a block.
            batch_size, num_workers: as in every pipeline.

        Returns:
            A list of `Explanation`, dicts, one for each class; for several images a list of such lists, or an iterator
            over them where the images come one by one.

        Raises:
            ValueError, TypeError, OSError: If an image cannot be read, a class does not exist, or an option is wrong.
        """
        images = images_of(inputs)
        if kwargs:
            images, kwargs = with_classes(images, kwargs)
            sizes: dict[str, Any] = {n: kwargs.pop(n) for n in ("batch_size", "num_workers") if n in kwargs}
            kwargs |= call_options(sizes)[0]
        return super().__call__(images, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the explainer and the image processor; the classifier is not part of it.

        No code is copied, for that could only be loaded with `trust_remote_code`: to load it, import `tve_hf`.
        """
        if not self.has_explainer:
            raise ValueError(f"This pipeline has no explainer to save; save {self.classifier.name} by itself.")
        self.model.save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory, **kwargs)

    def preprocess(self, image: Any, timeout: float | None = TIMEOUT, on_error: str = "raise") -> dict[str, Any]:
        classes, error = None, None
        if isinstance(image, WithClasses):
            image, classes = image.image, image.classes
        try:
            picture = load_image(image, timeout)
        except (OSError, TypeError, ValueError) as caught:
            if on_error == "raise":
                raise
            picture, error = Image.new("RGB", (64, 64)), str(caught)  # keeps its place in a batch
        processed = self.image_processor(images=picture, return_tensors="pt")
        inputs = {name: processed[name] for name in ("pixel_values", *self.classifier.backbone.other_inputs)}
        floats = {name: x.to(self.classifier.dtype) for name, x in inputs.items() if x.is_floating_point()}
        return inputs | floats | {"image": (picture, error, classes)}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        top_k: int = 1,
        classes: list[int | str] | None = None,
        classifier: SplitClassifier | None = None,
        method: str | None = None,
        **asked: Any,
    ) -> ModelOutput:
        classifier = classifier or self.classifier
        pixel_values: Tensor = model_inputs["pixel_values"]
        # A lone image comes as it is, a batch of them as a list.
        pictures = model_inputs["image"] if isinstance(model_inputs["image"], list) else [model_inputs["image"]]
        inputs: dict[str, Any] = {name: model_inputs[name] for name in classifier.backbone.other_inputs}
        seen = classifier(pixel_values, **inputs)
        log_prob = classifier.log_prob(seen.embeddings)
        rows: list[Any] = [classes if own is None else own for _, _, own in pictures]
        if rows[0] is None:
            class_idx = log_prob.topk(min(top_k, log_prob.shape[-1])).indices
        else:
            indices = [[classifier.class_index(asked) for asked in row] for row in rows]
            class_idx = torch.tensor(indices, device=log_prob.device)
        if method in (None, "tve"):
            made = self._by_explainer(classifier, seen, pixel_values, class_idx, inputs, asked)
        else:
            own = classifier is self.classifier
            whole = self._whole if own else classifier.reading(self._whole.backbone.feature_names)
            made = _methods().maps(method, whole, pixel_values, class_idx, inputs, **asked)
        scores, rule, verifications = made  # scores (B, K, rows, cols)
        results = [
            {
                "image": picture,
                "error": error,
                "method": method or "tve",
                "rule": rule,
                "class_idx": class_idx[i].cpu(),
                "labels": [classifier.id2label[index] for index in class_idx[i].tolist()],
                "score": log_prob[i, class_idx[i]].exp().cpu(),
                "attribution": scores[i].float().cpu(),
                "verification": None if verifications is None else verifications[i],
            }
            for i, (picture, error, _) in enumerate(pictures)
        ]
        return ModelOutput(results=results)

    def _by_explainer(
        self,
        classifier: SplitClassifier,
        seen: SplitClassifierOutput,
        pixel_values: Tensor,
        class_idx: Tensor,
        inputs: dict[str, Any],
        asked: dict[str, Any],
    ) -> tuple[Tensor, str, Any]:
        """Maps (B, K, rows, cols) of the explainer, the rule that made them, and their verification."""
        config, number, refine = self.model.config, asked.get("verify"), asked.get("refine")
        rule = asked.get("rule") or rule_of(config)
        if number is None and refine is None:
            return explain_pass(self.model, classifier, pixel_values, seen, class_idx, rule), rule, None
        pair: tuple[Tensor, Tensor] = self.model(pixel_values, seen.features, seen.embeddings).to_tuple()
        refinement = Refinement(classifier, pixel_values, *pair, config, refine, **inputs) if refine else None

        def scores_of(name: str) -> Tensor:  # (B, K, N)
            scores = transfer(*pair, classifier, class_idx, name, config.grid_size, config.hops)
            return scores if refinement is None else scores + refinement.correction(classifier, class_idx, name)

        scores, verifications = scores_of(rule), None
        if number is not None and config.backgrounds == "random":
            drawn = number, config.distribution, config.grid_size
            verifications = faithfulness(classifier, pixel_values, scores_of("logit"), class_idx, *drawn, **inputs)
        elif number is not None:
            how: Any = {"rule": rule, "grid_size": config.grid_size, "hops": config.hops, **inputs}
            verifications = verify(classifier, pixel_values, *pair, class_idx, number, **how)
        return scores.unflatten(-1, self.model.grid_shape), rule, verifications

    def postprocess(
        self, model_outputs: ModelOutput, max_size: int | None = MAX_SIZE, smooth: bool = True
    ) -> list[Any]:
        result = model_outputs["results"]
        result = result[0] if isinstance(result, list) else result
        if result["error"] is not None:
            return [{"error": result["error"]}]
        size = result["image"].size
        self._regions[size] = region = self._regions.get(size) or seen_region(self.image_processor, size)
        photograph = Photograph(result["image"], region, max_size)
        explanations = []
        for k, index in enumerate(result["class_idx"].tolist()):
            values = {
                "label": result["labels"][k],
                "class_idx": index,
                "score": result["score"][k].item(),
                "attribution": result["attribution"][k].numpy(),
                "method": result["method"],
                "rule": result["rule"],
                "quality": self.quality if result["method"] == "tve" else None,
            }
            if result["verification"] is not None:
                values["verification"] = asdict(result["verification"][k])
            explanations.append(Explanation(values, photograph, unit_of(result["rule"]), smooth))
        return explanations
