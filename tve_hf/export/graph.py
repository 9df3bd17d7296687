"""What the pipeline computes for a batch as one module: tensors in, tensors out, and every choice made beforehand."""

import torch
from torch import Tensor, nn

from ..attribution import rule_of, transfer
from ..estimators import EstimatorHead
from ..inputs import call_options
from ..pipeline_tve import TransferableAttributionPipeline

# As the pipeline names them in its results.
OUTPUTS = ("logits", "class_idx", "score", "attribution")


class ExplanationGraph(nn.Module):
    """Classify images and explain the result, by one pass of the classifier and one of its explainer.

    Args:
        explain: whose classifier, explainer and settings for all calls these are: prompts, rule, and classes or top_k.
        top_k: explain the k most probable classes of each image; by default as the pipeline does.

    Raises:
        ValueError: If the pipeline has no explainer, or does more than these two passes.
    """

    classes: Tensor | None  # those of every image, (K,); None where each image has its own

    def __init__(self, explain: TransferableAttributionPipeline, top_k: int | None = None):
        super().__init__()
        settings = explain._forward_params | call_options({"top_k": top_k})[2]
        self.classifier = settings.get("classifier") or explain.classifier
        name = self.classifier.name
        if not explain.has_explainer or settings.get("method") not in (None, "tve"):
            raise ValueError(
                f"Only an explainer can be exported, and this pipeline explains {name} by another method; pass one as "
                "model=, or train one with `tve-hf pretrain`."
            )
        for option in ("verify", "refine"):
            if settings.get(option) is not None:
                raise ValueError(f"{option} runs masked passes, which are not exported; make a pipeline without it.")
        if self.classifier.backbone.other_inputs:
            inputs = ", ".join(self.classifier.backbone.other_inputs)
            raise ValueError(f"{name} also reads {inputs}, and an exported graph reads pixel_values alone.")
        estimators = [module.name for module in self.classifier.head.modules() if isinstance(module, EstimatorHead)]
        if estimators:
            raise ValueError(
                f"The head of {name} is a {estimators[0]} of scikit-learn, which computes outside torch; put a torch "
                "module on the backbone by classifier.with_head, such as a linear layer with its coef_ and intercept_."
            )
        self.explainer = explain.model
        self.rule = settings.get("rule") or rule_of(self.explainer.config)
        self.top_k = min(settings.get("top_k") or 1, len(self.classifier.id2label))
        fixed = None
        if settings.get("classes") is not None:
            indices = [self.classifier.class_index(asked) for asked in settings["classes"]]
            fixed = torch.tensor(indices, device=self.classifier.device)
        self.register_buffer("classes", fixed, persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `OUTPUTS` names, in float32 whatever the models compute in.

        Args:
            pixel_values: normalised images, (B, 3, H, W), float32.

        Returns:
            logits (B, C); class_idx (B, K), int64; their probabilities (B, K); maps (B, K, rows, cols), in the unit
            of the rule. Nothing is checked: NaN in gives NaN out.
        """
        classifier, config = self.classifier, self.explainer.config
        pixel_values = pixel_values.to(classifier.dtype)
        seen = classifier(pixel_values)
        log_prob = classifier.log_prob(seen.embeddings)
        if self.classes is None:
            class_idx = log_prob.topk(self.top_k).indices
        else:
            class_idx = self.classes.expand(log_prob.shape[0], -1)
        predicted = self.explainer(pixel_values=pixel_values, features=seen.features, embeddings=seen.embeddings)
        pair = predicted.kept, predicted.removed
        scores = transfer(*pair, classifier, class_idx, self.rule, config.grid_size, config.hops)
        score = log_prob.gather(-1, class_idx).exp()
        return seen.logits.float(), class_idx, score, scores.float().unflatten(-1, self.explainer.grid_shape)
