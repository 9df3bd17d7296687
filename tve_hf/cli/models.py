"""The pipeline that explains, from the options of the command line."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..messages import sentence
from ..released import DEFAULT_EXPLAINER


def load_pipeline(
    model: str | None, classifier: str | None, device: str | None, dtype: str | None, options: dict[str, Any]
) -> Any:
    """Load the pipeline.

    Args:
        model: name or folder of an explainer; without, the pipeline looks for one.
        classifier: name or folder; without, the one that the explainer's folder names.
        device: as torch has it, or a number of a GPU.
        dtype: of both models, a name such as float16; as they are saved if None.
        options: more arguments of the pipeline.

    Raises:
        ValueError, OSError: If one of them does not exist, cannot be read, or does not fit the others.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import pipeline

    from .. import TVEExplainer

    if device is not None:
        options = {"device": _checked_device(device)} | options
    if dtype is not None:
        options = {"dtype": dtype} | options
    try:
        if model is not None:
            # Loaded here, since `pipeline` puts a traceback into the message of what goes wrong.
            options = {"model": TVEExplainer.from_pretrained(model, dtype=dtype)} | options
            classifier = classifier or classifier_of(model)
        with without_warnings("transformers.pipelines"):  # says that no model was named, which is as it should be
            return pipeline("transferable-attribution", classifier=classifier, **options)
    except (RuntimeError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise  # of the device, say: transformers names that option where weights do not fit their config
        folders = " or ".join(filter(None, (model, classifier))) or str(DEFAULT_EXPLAINER)
        raise ValueError(
            f"{folders} cannot be loaded; check its files or fetch it again: {sentence(error)}"
        ) from error


def classifier_of(model: str) -> str | None:
    """The classifier that an explainer was pre-trained for, as training.json in its folder says: there, or beside it.

    Returns:
        Its name or folder; None for the default explainer, whose classifier the pipeline knows.

    Raises:
        ValueError: If it is not known, or not where it was.
    """
    if Path(model).resolve() == DEFAULT_EXPLAINER:
        return None
    try:
        named = json.loads((Path(model) / "training.json").read_bytes())["arguments"]["classifier"]
    except (OSError, ValueError, TypeError, KeyError):
        named = None
    if not isinstance(named, str):
        raise ValueError(f"{model} does not say which classifier it was pre-trained for; name it by --classifier.")
    beside = Path(model).resolve().parent / Path(named).name
    if not Path(named).exists() and beside.is_dir():  # both were moved, or came together
        return str(beside)
    if not Path(named).exists() and (named.count("/") != 1 or named.startswith((".", "/", "~"))):
        raise ValueError(
            f"{model} was pre-trained for the classifier {named}, which is not here; say by --classifier where it is."
        )
    return named


def _checked_device(name: str) -> int | str:
    """The device of this name, if torch can use it."""
    import torch

    device = int(name) if name.isdecimal() else name
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch explains at length, for developers; its first sentence is the reason.
        reason = sentence(error).split(". ")[0].split(": If")[0].rstrip(".")
        raise ValueError(f"--device {name}: torch cannot use it ({reason}); pass another, such as cpu.") from error
    return device


@contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """Silence the warnings of one logger and those below it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
