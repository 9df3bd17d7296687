"""The names of a classifier's classes: which of them is asked for, and whether they fit its head."""

import difflib
from collections.abc import Sequence


def find_class(asked: int | str, id2label: dict[int, str], classifier_name: str) -> int:
    """Find a class by number, or in any case by its name or else by a comma-separated synonym in a name.

    Args:
        asked: the number, or the name.
        id2label: names of all classes.
        classifier_name: for messages.

    Raises:
        ValueError: If it is no class, or the name of several.
    """
    if isinstance(asked, int):
        if asked not in id2label:
            raise ValueError(
                f"class_idx {asked} is not a class of {classifier_name}, which has {len(id2label)}, counted from 0."
            )
        return asked
    wanted = asked.strip().lower()
    names: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for index, name in id2label.items():
        names.setdefault(name.strip().lower(), []).append(index)
        for synonym in name.split(","):
            synonyms.setdefault(synonym.strip().lower(), []).append(index)
    classes = names.get(wanted) or synonyms.get(wanted)
    if not classes:
        known = names | synonyms
        holding = [name for name in known if f" {wanted} " in f" {name} "]
        near = list(dict.fromkeys(holding + difflib.get_close_matches(wanted, known, cutoff=0.5)))[:3]
        hint = (
            f"; did you mean {', '.join(repr(name) for name in near)}?"
            if near
            else f"; see classifier.id2label, or `tve-hf info {classifier_name} --search WORD`."
        )
        raise ValueError(f"{asked!r} is not a class of {classifier_name}{hint}")
    if len(classes) > 1:
        raise ValueError(
            f"{asked!r} names the classes {', '.join(f'{i} ({id2label[i]})' for i in classes)} of {classifier_name}; "
            "pass one of them as class_idx."
        )
    return classes[0]


def names_by_class(id2label: dict[int, str] | Sequence[str]) -> dict[int, str]:
    """Names of classes as a dict of their own: class -> name."""
    return dict(id2label) if isinstance(id2label, dict) else dict(enumerate(id2label))


def check_names(names: dict[int, str], num_labels: int) -> None:
    """Check that names are those of the classes 0 ... num_labels - 1.

    Raises:
        ValueError: If they are more or fewer, or numbered otherwise.
    """
    if len(names) != num_labels:
        raise ValueError(f"id2label names {len(names)} classes, but the head gives {num_labels} logits.")
    if set(names) != set(range(num_labels)):
        raise ValueError(f"id2label has the keys {list(names)}; number the classes from 0 to {num_labels - 1}.")
