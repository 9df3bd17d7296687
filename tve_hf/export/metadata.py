"""What is needed to use an exported graph where neither torch nor transformers is: `config.json` within the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..attribution import unit_of
from ..geometry import Region, normalization, seen_region
from ..pipeline_tve import TransferableAttributionPipeline
from .graph import OUTPUTS, ExplanationGraph

logger = logging.get_logger(__name__)

# Under which name it lies in the file: of ONNX's metadata, and of the extra files of a program.
CONFIG = "config.json"
_PHOTOGRAPHS = ((640, 480), (480, 640))  # pixels, (width, height)


def describe(explain: TransferableAttributionPipeline, graph: ExplanationGraph) -> dict[str, Any]:
    """Say what goes into a graph and what comes out, as plain values for JSON.

    Returns:
        - **classifier**, **explainer**, **quality**: their names, and what the explainer was measured to be worth;
        - **outputs**: the names of what the graph gives;
        - **image_size**: (height, width) of `pixel_values`;
        - **image_mean**, **image_std**: of each channel, RGB values being in [0, 1];
        - **crop**: the share of the largest centred box of that shape which is shown; None if the whole image is
          squashed to it, "other" if the processor does something else;
        - **image_processor**: all settings of the processor;
        - **labels**: the classes' names, in order;
        - **grid_size**: (rows, cols) of the maps;
        - **rule**, **unit**: how scores were made, and their unit.
    """
    config, classifier = graph.explainer.config, graph.classifier
    processor = explain.image_processor
    mean, std = normalization(processor)
    return {
        "classifier": _published(classifier.name),
        "explainer": _published(config.name_or_path),
        "quality": explain.quality,
        "outputs": list(OUTPUTS),
        "image_size": list(config.image_shape),
        "image_mean": mean,
        "image_std": std,
        "crop": _crop_of(processor, *config.image_shape),
        "image_processor": json.loads(processor.to_json_string()),
        "labels": [classifier.id2label[index] for index in range(len(classifier.id2label))],
        "grid_size": list(graph.explainer.grid_shape),
        "rule": graph.rule,
        "unit": unit_of(graph.rule),
    }


def _published(name: str) -> str:
    """A name of the Hub, or that of a folder without where it lies: the file may go to others."""
    return Path(name).name if Path(name).exists() else name


def _crop_of(processor: Any, height: int, width: int) -> float | str | None:
    """The `crop` of `describe`, from what the processor shows of two photographs, one wide and one high."""
    seen = {size: seen_region(processor, size) for size in _PHOTOGRAPHS}
    if all(_same(region, (0, 0, *size)) for size, region in seen.items()):
        return None
    size = _PHOTOGRAPHS[0]
    axis = 0 if size[0] * height < size[1] * width else 1  # along which the largest box ends where the image does
    share = round((seen[size][axis + 2] - seen[size][axis]) / size[axis], 3)
    if all(_same(region, centred_box(size, (height, width), share)) for size, region in seen.items()):
        return share
    logger.warning(
        f"{type(processor).__name__} shows neither the whole image nor its middle: give the exported graph what this "
        "processor makes."
    )
    return "other"


def centred_box(size: tuple[int, int], shape: tuple[int, int], share: float) -> Region:
    """A share of the largest centred box of a shape (height, width) in an image of a size (width, height)."""
    scale = share * min(size[0] / shape[1], size[1] / shape[0]) / 2
    x, y = size[0] / 2, size[1] / 2
    return x - scale * shape[1], y - scale * shape[0], x + scale * shape[1], y + scale * shape[0]


def _same(region: Region, other: tuple[float, ...]) -> bool:
    """Whether two boxes are equal but for a pixel of the image or two, to which processors round."""
    return bool(np.abs(np.subtract(region, other)).max() < 4)
