"""Explanations while a classifier is fine-tuned: a callback of transformers' Trainer."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .watching import WatchedImages

_NAME = "eval/explanations"


def _to_tensorboard(writer: Any, sheet: Image.Image, step: int) -> None:
    writer.add_image(_NAME, np.asarray(sheet), step, dataformats="HWC")


def _to_library(library: Any, sheet: Image.Image, step: int) -> None:
    library.log({_NAME: library.Image(sheet), "train/global_step": step})


# How a picture is logged, by where transformers' own callbacks keep their trackers.
_TRACKERS: dict[str, Callable[[Any, Image.Image, int], None]] = {
    "tb_writer": _to_tensorboard,
    "_wandb": _to_library,
    "_trackio": _to_library,
}


class ExplanationCallback(TrainerCallback):
    """Log maps of some images, and their fidelity, at each evaluation of an image classifier.

    ```python
    trainer.add_callback(tve_hf.ExplanationCallback(trainer, test_set["image"][:4]))
    ```

    The class that the classifier predicts is explained. `eval_fidelity_gap`, the mean over the images, is among the
    metrics, so `metric_for_best_model` may name it, and in all of the Trainer's logs. A sheet of photographs and maps
    goes to TensorBoard, Weights & Biases and Trackio, whichever the Trainer reports to. The training is the same as
    without it. Under data parallelism every process explains, so that all agree on the metrics, and one logs;
    classifiers whose weights are shared out over processes are not served.

    Args:
        trainer: whose model is explained, with its image processor as `processing_class`.
        images: what to explain, as for a call of the pipeline: a list, or a column of `datasets`.
        method: one of `tve_hf.methods.available()`. "sampled" serves every classifier.
        method_kwargs: its options, as for a call of the pipeline.

    Raises:
        ValueError: If there is no image, or the trainer has no image processor.
    """

    def __init__(
        self,
        trainer: Trainer,
        images: Any,
        method: str = "sampled",
        method_kwargs: dict[str, Any] | None = None,
    ):
        if trainer.processing_class is None:
            raise ValueError("The trainer has no image processor; pass it one as processing_class=.")
        self.trainer = trainer
        self.watched = WatchedImages(images, trainer.processing_class, method, method_kwargs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        gap, sheet = self.watched(self.trainer.model)
        found = {"eval_fidelity_gap": gap}
        if metrics is not None:
            metrics.update(found)
        self.trainer.log(found)
        if not state.is_world_process_zero:
            return
        for callback in self.trainer.callback_handler.callbacks:
            for attribute, log in _TRACKERS.items():
                if getattr(callback, attribute, None) is not None:
                    log(getattr(callback, attribute), sheet, state.global_step)
