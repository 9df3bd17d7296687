"""What the command line says of an error: a sentence if the input is wrong, the traceback if the program is.

And of a verification.
"""

import traceback
from typing import Any

from huggingface_hub.errors import StrictDataclassError

# What `pip install tve_hf[train]` brings.
_TRAIN = ("accelerate", "datasets", "matplotlib")
# What follows the traceback of an error that no input should bring about.
REPORT = (
    "Unless the machine is short of something, this is a mistake of tve_hf: please report it, with the lines above, "
    "at https://github.com/tve-hf/tve_hf/issues"
)


def is_expected(error: Exception) -> bool:
    """Whether input can bring this error about, or a library that is missing; any other is the program's mistake."""
    if isinstance(error, ImportError):
        return _package(error) != "tve_hf"
    return isinstance(error, (ValueError, OSError, StrictDataclassError))


def _package(error: ImportError) -> str:
    """The package that could not be imported; empty where the error is raised on purpose, and says what to install."""
    return (error.name or "").partition(".")[0]


def sentence(error: Exception) -> str:
    """The message of an error on one line, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def message(error: Exception, image: str = "") -> str:
    """What to say of an error: one sentence if it is expected, else its traceback and how to report it.

    Args:
        image: the name of the image that it is about, if it is about one.
    """
    text = sentence(error)
    # The name may be a whole image in base64, which messages shorten.
    about = "" if image[:50] in text else f"{image[:200]!r}: "
    if not is_expected(error):
        return (
            f"{''.join(traceback.format_exception(error))}tve-hf: {about}unexpected {type(error).__name__}. {REPORT}"
        )
    missing = isinstance(error, ImportError) and _package(error) in _TRAIN
    return f"tve-hf: {about}{text}{'; run `pip install tve_hf[train]`.' if missing else ''}"


def verified(result: dict[str, Any]) -> str:
    """What the verification of an explanation says, for people."""
    checked = result["verification"]
    if "r2" in checked:
        low, high = checked["r2_interval"]
        return (
            f"  accounts for {checked['r2']:.0%} ({low:.0%} to {high:.0%}) of what masking does to {result['label']!r}"
        )
    return f"  against the exact scores of {checked['num_patches']} patches: Spearman {checked['spearman']:.2f}"
