"""Transferable attribution for image classifiers: explain any head on a backbone with one pre-trained explainer.

Importing this package registers `TVEConfig` and `TVEExplainer`, and the rival `ShapleyConfig` and `ShapleyExplainer`,
with transformers' Auto classes, and the pipeline task "transferable-attribution".
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from . import methods, metrics
from .attribution import DEFAULT_RULE, RULES, exact_meta_attribution, transfer
from .classifiers import SplitClassifier, split_classifier
from .configuration_tve import TVEConfig
from .fidelity import Fidelity, fidelity
from .modeling_tve import TVEExplainer, TVEExplainerOutput
from .pipeline_tve import TransferableAttributionPipeline
from .released import DEFAULT_EXPLAINER
from .sampling import SampledMetaAttribution, sampled_meta_attribution
from .verification import verify
from .vit_shapley.configuration import ShapleyConfig
from .vit_shapley.modeling import ShapleyExplainer, ShapleyExplainerOutput

if TYPE_CHECKING:
    from .evaluation.callback import ExplanationCallback

__version__ = "0.1.0"

AutoConfig.register("tve", TVEConfig)
AutoModel.register(TVEConfig, TVEExplainer)
AutoConfig.register("vit_shapley", ShapleyConfig)
AutoModel.register(ShapleyConfig, ShapleyExplainer)
PIPELINE_REGISTRY.register_pipeline(
    "transferable-attribution",
    pipeline_class=TransferableAttributionPipeline,
    pt_model=AutoModel,
    default={"model": (str(DEFAULT_EXPLAINER), "main")},
    type="image",
)

__all__ = [
    "DEFAULT_RULE",
    "RULES",
    "ExplanationCallback",
    "Fidelity",
    "SampledMetaAttribution",
    "ShapleyConfig",
    "ShapleyExplainer",
    "ShapleyExplainerOutput",
    "SplitClassifier",
    "TVEConfig",
    "TVEExplainer",
    "TVEExplainerOutput",
    "TransferableAttributionPipeline",
    "exact_meta_attribution",
    "fidelity",
    "methods",
    "metrics",
    "sampled_meta_attribution",
    "split_classifier",
    "transfer",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "ExplanationCallback":  # for those who train: it loads the Trainer
        from .evaluation.callback import ExplanationCallback

        return ExplanationCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
