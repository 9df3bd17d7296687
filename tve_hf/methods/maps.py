"""What the pipeline asks of a method: whether it takes what was asked, and maps with their rule and verification."""

from typing import Any

from torch import Tensor
from transformers.utils import logging

from ..classifiers import SplitClassifier
from ..compatibility import how_to_train
from ..faithfulness import Faithfulness, check_coalitions, faithfulness
from ..sampling import NUM_SAMPLES
from . import check_options, explain, options_of

logger = logging.get_logger(__name__)

# Methods whose scores of some patches add up to what these do to a class together, and the rule that reads this.
ADDITIVE = {"sampled": "logit", "lime": "prob", "kernel_shap": "prob", "vit_shapley": "prob"}


def without_explainer(classifier: SplitClassifier, method_kwargs: Any) -> str:
    """The method where no explainer fits and none was asked for; says what it costs, and what an explainer saves."""
    asked = method_kwargs if isinstance(method_kwargs, dict) else {}  # looked at by `check`
    number = asked.get("n_samples", NUM_SAMPLES)
    logger.warning(
        f"No released explainer fits {classifier.name}, so each image takes {number} masked passes of it "
        f"(method='sampled'), where an explainer takes one: {how_to_train(classifier)}."
    )
    return "sampled"


def check(
    method: str, method_kwargs: dict[str, Any] | None, rule: str | None, verify: int | None, refine: int | None
) -> None:
    """Refuse what cannot be asked of a method; arguments as for a call of the pipeline.

    Raises:
        ValueError, TypeError: If there is no such method or option, or the method has no rule or no explainer, or its
            scores do not add up.
    """
    asked = {name: value for name, value in (method_kwargs or {}).items() if name != "grid_size"}
    check_options(method, asked | ({} if rule is None else {"rule": rule}))
    if refine is not None:
        raise ValueError(f"refine corrects the map of an explainer, which {method!r} has none of; leave it out.")
    if verify is not None:
        if method.replace("-", "_") not in ADDITIVE:
            raise ValueError(
                f"The scores of {method!r} do not add up, so verify has nothing to compare; leave it out, or use "
                f"{', '.join(map(repr, ADDITIVE))} or an explainer."
            )
        check_coalitions(verify)


def maps(
    method: str,
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    inputs: dict[str, Any],
    method_kwargs: dict[str, Any] | None = None,
    rule: str | None = None,
    verify: int | None = None,
    refine: None = None,
) -> tuple[Tensor, str | None, list[list[Faithfulness]] | None]:
    """Maps of K classes of each image, (B, K, rows, cols), the rule that made them, and their verification.

    Args:
        class_idx: (B, K).
        inputs: what else the classifier reads.
        method_kwargs, rule, verify, refine: as `check` lets them pass.
    """
    method = method.replace("-", "_")
    known, options = options_of(method), dict(method_kwargs or {})
    if "rule" in known:
        options["rule"] = rule = rule or options.get("rule") or known["rule"]
    if "progress" in known:
        options.setdefault("progress", True)
    scores = explain(method, classifier, pixel_values, class_idx, **options, **inputs)
    if verify is None:
        return scores, rule, None
    unit, sums = ADDITIVE[method], scores
    if rule not in (None, unit):  # what was asked for makes the map, this what adds up
        sums = explain(method, classifier, pixel_values, class_idx, **(options | {"rule": unit}), **inputs)
    how, grid = options.get("coalitions", "smooth"), tuple(sums.shape[-2:])
    verified = faithfulness(
        classifier, pixel_values, sums.flatten(2), class_idx, verify, how, grid, rule=unit, **inputs
    )
    return scores, rule, verified
