"""What users pass by name, checked in one place: numbers, names, classes and options.

An error is one sentence that names the argument, what it was given and what to pass instead. Images are read by
`images`, and classifiers by `classifiers/given`.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


def whole_number(name: str, value: Any, least: int | None = 1, example: int | None = None) -> int:
    """Return an int, also of numpy or of a tensor without axes; no bool, no float, and no text is one.

    Raises:
        TypeError, ValueError: If it is none, or below `least`.
    """
    of_tensor = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0
    number = value.item() if of_tensor else value
    is_whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not is_whole or (least is not None and number < least):
        asked = "" if least is None else f" from {least} on"
        such = "" if example is None else f", for example {example}"
        kind = ValueError if is_whole else TypeError
        raise kind(f"{name} is {shown(value)}; pass a whole number{asked}{such}.")
    return int(number)


def shown(value: Any) -> str:
    """A value in a message: what the user typed, shortened."""
    text = repr(value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {shown(value)}; pass a number of seconds above 0, or leave it out.")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {shown(value)}; pass its name, a string.")
    return value


def _options(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} is {shown(value)}; pass a dict of the method's options, like {{'n_samples': 400}}.")
    return dict(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}; pass True or False.")
    return value


def _on_error(name: str, value: Any) -> str:
    if value not in ("raise", "skip"):
        raise ValueError(f"{name} is {shown(value)}; pass 'skip' to go on after a bad image, or 'raise'.")
    return value


def _classes(one: Callable[[Any], int | str], name: str, value: Any) -> list:
    """A class, several, or a list of several for each image, as a list or a list of lists."""
    given = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    if isinstance(given, str) or not isinstance(given, Iterable):
        return [one(given)]
    given = list(given)
    if not given:
        raise ValueError("No class was given; pass at least one as class_idx or label, or neither of them.")
    rows = [item for item in given if isinstance(item, (list, tuple, Tensor, np.ndarray)) and np.ndim(item)]
    if not rows:
        return [one(item) for item in given]
    classes = [[one(item) for item in row] for row in rows]
    if len(rows) < len(given) or len({len(row) for row in classes}) > 1 or not classes[0]:
        raise ValueError(
            f"{name} is {shown(value)}; pass classes for all images in one list, or a list of equally many for each."
        )
    return classes


def _class_idx(name: str, value: Any) -> list:
    def one(item: Any) -> int:
        if isinstance(item, str):
            raise TypeError(f"class_idx is {shown(value)}; pass names as label=, or whole numbers.")
        return whole_number(name, item, least=None)

    return _classes(one, name, value)


def _label(name: str, value: Any) -> list:
    def one(item: Any) -> str:
        if not isinstance(item, str):
            raise TypeError(f"label is {shown(value)}; pass a class's name, or its number as class_idx=.")
        return item

    return _classes(one, name, value)


# What a call of the pipeline takes besides images: how each is checked.
CALL_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "top_k": whole_number,
    "class_idx": _class_idx,
    "label": _label,
    "method": _text,
    "method_kwargs": _options,
    "rule": _text,
    "verify": lambda name, value: whole_number(name, value, example=64),
    "refine": lambda name, value: whole_number(name, value, example=25),
    "timeout": _seconds,
    "on_error": _on_error,
    "max_size": whole_number,
    "smooth": _flag,
    "candidate_labels": lambda name, value: value,  # `SplitClassifier.with_prompts` looks at prompts
    "hypothesis_template": lambda name, value: value,
    "batch_size": whole_number,
    "num_workers": lambda name, value: whole_number(name, value, least=0),
}


# Those that say how maps are made, once the method is chosen.
OF_METHOD = ("method_kwargs", "rule", "verify", "refine")


def call_options(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Check what a call of the pipeline was given by name, and leave out what is None, unless that means something.

    Returns:
        The options, and those among them of `preprocess`, of `_forward` and of `postprocess`.

    Raises:
        TypeError, ValueError: If one is unknown, of another type or out of range, or two exclude one another.
    """
    refuse_unknown("The pipeline", given, CALL_OPTIONS)
    options = {name: CALL_OPTIONS[name](name, value) for name, value in given.items() if value is not None}
    if len(options.keys() & {"top_k", "class_idx", "label"}) > 1:
        raise ValueError("top_k, class_idx and label exclude one another; pass one of them.")
    preprocess: dict[str, Any] = {name: options[name] for name in ("timeout", "on_error") if name in options}
    drawing: dict[str, Any] = {name: options[name] for name in ("max_size", "smooth") if name in options}
    if "max_size" in given:  # None is for pictures of any size
        drawing.setdefault("max_size", None)
    # Another method than before starts anew.
    forward: dict[str, Any] = dict.fromkeys(OF_METHOD) if "method" in options else {}
    forward |= {name: options[name] for name in ("method", *OF_METHOD, "top_k") if name in options}
    if options.keys() & {"top_k", "class_idx", "label"}:
        forward["classes"] = options.get("class_idx", options.get("label"))
        if isinstance((forward["classes"] or [None])[0], list):  # left as they are where there are no images
            raise ValueError("class_idx or label has a row of classes for each image; pass it with the images.")
    return options, preprocess, forward, drawing


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first name that is not among the known ones, with the nearest of them."""
    known = sorted(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            among = f"; it takes {', '.join(known)}." if known else ", nor any other option."
            raise TypeError(f"{owner} takes no {name!r}{f': did you mean {near[0]!r}?' if near else among}")


@dataclass
class WithClasses:
    """An image of a list, and the classes to explain in it."""

    image: Any
    classes: list


def with_classes(images: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give each image of a list its own classes, where class_idx or label has a row of them for each.

    A flat list of classes is for every image; a list of lists, or an array (B, K), has row i for image i.

    Raises:
        ValueError: If there are not as many rows as images, or the images do not come as a list.
    """
    for name in ("class_idx", "label"):
        rows = None if given.get(name) is None else CALL_OPTIONS[name](name, given[name])
        if rows and isinstance(rows[0], list):
            number = len(images) if isinstance(images, list) else None
            if number != len(rows):
                found = "images that are no list" if number is None else f"{number} images"
                raise ValueError(
                    f"{name} has {len(rows)} rows of classes for {found}; pass a list of as many images, or a flat "
                    f"list of classes for all."
                )
            pairs = [WithClasses(image, row) for image, row in zip(images, rows, strict=True)]
            # All of them, so that each is known to exist before the first image is explained.
            return pairs, given | {name: sorted({item for row in rows for item in row})}
    return images, given
