"""What the command line says of an error: a sentence if the input is wrong, the traceback if the program is.

And of a verification.
"""

import dis
import traceback
from collections.abc import Mapping
from typing import Any

import torch
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
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return not _is_failed_operation(error)
    return isinstance(error, (OSError, StrictDataclassError, MemoryError, torch.OutOfMemoryError))


def _is_failed_operation(error: ValueError) -> bool:
    """Whether it arose from what our own code does with values, such as arrays of two shapes; no statement raised it.

    Libraries that read what users pass say much by ValueErrors, numpy only how it was called.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    raised = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return package == "numpy" or (package == "tve_hf" and not raised)


def _package(error: ImportError) -> str:
    """The package that could not be imported; empty where the error is raised on purpose, and says what to install."""
    return (error.name or "").partition(".")[0]


def sentence(error: Exception) -> str:
    """The message of an error on one line, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def message(error: Exception, image: str = "", full: bool = False) -> str:
    """What to say of an error: one sentence if it is expected, else its traceback and how to report it.

    Args:
        image: the name of the image that it is about, if it is about one.
        full: with the traceback in any case.
    """
    text = sentence(error)
    # The name may be a whole image in base64, which messages shorten.
    about = "" if image[:50] in text else f"{image[:200]!r}: "
    where = "".join(traceback.format_exception(error))
    if not is_expected(error):
        return f"{where}tve-hf: {about}unexpected {type(error).__name__}. {REPORT}"
    return f"{where if full else ''}tve-hf: {about}{text}{_advice(error)}"


def _advice(error: Exception) -> str:
    """What to do about errors whose text does not say."""
    if isinstance(error, ImportError) and _package(error) in _TRAIN:
        return "; run `pip install tve_hf[train]`."
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "; the memory is not enough: lower the batch size, or shrink the images."
    return ""


def verified(result: Mapping[str, Any]) -> str:
    """What the verification of an explanation says, for people."""
    checked = result["verification"]
    if "r2" in checked:
        low, high = checked["r2_interval"]
        return (
            f"  accounts for {checked['r2']:.0%} ({low:.0%} to {high:.0%}) of what masking does to {result['label']!r}"
        )
    return f"  against the exact scores of {checked['num_patches']} patches: Spearman {checked['spearman']:.2f}"
