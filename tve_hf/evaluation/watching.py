"""A few images, explained again and again while their classifier is trained."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import pipeline

from ..fidelity import fidelity
from ..visualization import gallery

_LEVELS = 14  # of the curves of fidelity, on grids with so many patches


class WatchedImages:
    """Explain some images by an image classifier as it is now; its training is the same as without.

    ```python
    watched = tve_hf.evaluation.WatchedImages(photographs)
    gap, sheet = watched(model)  # after each epoch
    ```

    Args:
        images: what to explain, as for a call of the pipeline: a list, or a column of `datasets`.
        image_processor: that of the classifier; timm's models bring their own.
        method: one of `tve_hf.methods.available()`. "sampled" serves every classifier.
        method_kwargs: its options, as for a call of the pipeline.

    Raises:
        ValueError: If there is no image.
    """

    def __init__(
        self,
        images: Any,
        image_processor: Any = None,
        method: str = "sampled",
        method_kwargs: dict[str, Any] | None = None,
    ):
        self.images = [*images]
        if not self.images:
            raise ValueError("There is no image to explain; pass at least one.")
        self.options = {"image_processor": image_processor, "method": method, "method_kwargs": method_kwargs}
        self._model: nn.Module | None = None
        self._pipeline: Any = None  # around the model itself, whose weights go on changing

    def __call__(self, model: nn.Module) -> tuple[float, Image.Image]:
        """Explain the class that the model, on its device and in eval mode for the time, predicts of each image.

        Returns:
            The fidelity gap of the maps, the mean over the images, and a sheet of photographs with their maps beside.
        """
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        try:
            # Loading models draws numbers, which the training would miss.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                return self._explained(model, device)
        finally:
            model.train(was_training)

    def _explained(self, model: nn.Module, device: torch.device) -> tuple[float, Image.Image]:
        if self._model is not model:
            self._pipeline = pipeline("transferable-attribution", classifier=model, device=device, **self.options)
            self._model = model
        found = [one for (one,) in self._pipeline(self.images)]
        scores = torch.from_numpy(np.stack([one["attribution"] for one in found]))
        classes = torch.tensor([one["class_idx"] for one in found])
        levels = min(_LEVELS, scores[0].numel() + 1)
        judged = fidelity(self._pipeline.classifier, self.images, scores, classes, num_levels=levels)
        rows = [[one.photograph.image(), one["overlay"]] for one in found]
        titles = [f"{one['label']} {one['score']:.0%}" for one in found]
        return judged.gap.mean().item(), gallery(rows, ["photograph", "map"], titles)
