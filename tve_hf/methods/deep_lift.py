"""DeepLIFT, rescale rule (Shrikumar, Greenside & Kundaje, arXiv 1704.02685), by captum, from the zero image.

captum hooks ReLU, sigmoid, tanh and a few modules more. Where a model has other nonlinearities, as every transformer
has, what it returns is the gradient under another name; completeness tells, and such a model is refused.
"""

import warnings

import torch
from torch import Tensor, nn

from ..classifiers import SplitClassifier
from ..classifiers.parts import Head
from ._captum import captum_attr, patch_sums
from ._gradients import differentiable

# Largest difference between the scores' sum and that of the logits, as a share of the latter, and of all that is added
# up: rounding alone gives 1e-6 of that.
TOLERANCE, ROUNDING = 0.01, 1e-4


class _Logits(nn.Module):
    """A classifier whose modules each run once a pass, as captum's hooks need."""

    def __init__(self, classifier: SplitClassifier):
        super().__init__()
        self.backbone = classifier.backbone
        self.head = None if isinstance(classifier.head, Head) else classifier.head  # its own runs inside

    def forward(self, pixel_values: Tensor) -> Tensor:
        output = self.backbone(pixel_values)
        return output.logits if self.head is None else self.head(output.embeddings)


def explain(
    classifier: SplitClassifier,
    pixel_values: Tensor,
    class_idx: Tensor,
    grid_size: tuple[int, int],
    multiply_by_inputs: bool = False,
) -> Tensor:
    """Multipliers of the class logit, summed over each patch.

    Args:
        multiply_by_inputs: multiply by the pixels first, as in the paper: the scores then sum to the logit of the
            image less that of the zero image. Off, as in the TVE paper's comparison.

    Returns:
        Signed scores (B, rows, cols).

    Raises:
        ImportError: Without captum.
        ValueError: If multipliers times pixels do not add up to that difference, a module runs twice, the grid does
            not divide the image, or under inference mode.
    """
    model = _Logits(classifier)
    known = {module: set(vars(module)) for module in model.modules()}
    try:
        with differentiable(pixel_values) as x, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum announces its hooks
            method = captum_attr().DeepLift(model, multiply_by_inputs=False)
            multipliers = method.attribute(x, baselines=0, target=class_idx).detach()
    except RuntimeError as error:
        if "more than once" not in str(error):
            raise
        raise ValueError(f"{classifier.name} runs a module twice in a pass, which DeepLIFT cannot serve.") from error
    finally:
        for module, names in known.items():  # captum leaves what it noted on modules, after an error
            for name in set(vars(module)) - names:
                delattr(module, name)
    parts = (multipliers * pixel_values).flatten(1).float()
    with torch.no_grad():
        logits, empty = (model(x).gather(1, class_idx.unsqueeze(1)) for x in (pixel_values, 0 * pixel_values))
    change = (logits - empty).squeeze(1).float()
    residual = (parts.sum(1) - change).abs()
    if (residual > TOLERANCE * change.abs() + ROUNDING * parts.abs().sum(1)).any():
        worst = (residual / change.abs()).max().item()
        raise ValueError(
            f"DeepLIFT's scores of {classifier.name} miss the change of the logit by {worst:.0%}: captum has no rule "
            "for some of its nonlinearities, such as ReLU6, GELU or LayerNorm; use another method, such as ig."
        )
    return patch_sums(multipliers * pixel_values if multiply_by_inputs else multipliers, grid_size)
