"""An explainer and the classifier that it is to explain, compared once: that takes longer than an explanation."""

from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor

from ..classifiers import SplitClassifier
from ..compatibility import fit
from ..modeling_tve import TVEPreTrainedModel

# Explainer -> classifiers that it was found to fit.
_FITTING: WeakKeyDictionary[TVEPreTrainedModel, WeakSet[SplitClassifier]] = WeakKeyDictionary()


def fitted(
    explainer: TVEPreTrainedModel, classifier: SplitClassifier, pixel_values: Tensor, grid_size: tuple[int, int]
) -> SplitClassifier:
    """Return the classifier, reading the feature maps that the explainer was trained on.

    Raises:
        ValueError: If the explainer has another grid, or was trained for another backbone, as `compatibility.fit`.
    """
    config = explainer.config
    if config.grid_shape != grid_size:
        raise ValueError(
            f"The explainer's grid is {config.grid_shape}, not {grid_size}; pass grid_size={config.grid_shape}."
        )
    fitting = _FITTING.setdefault(explainer, WeakSet())
    if classifier not in fitting:
        fit(explainer, classifier, pixel_values=pixel_values)
        fitting.add(classifier)
    return classifier.reading(tuple(config.feature_names))
