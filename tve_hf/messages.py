"""What the command line says of an error: a sentence if the input is wrong, the traceback if the program is."""

import traceback

from huggingface_hub.errors import StrictDataclassError

# What input can bring about. Other errors are mistakes of the program, or come of the machine.
_MISTAKES = (ValueError, OSError, StrictDataclassError)
# What `pip install tve_hf[train]` brings.
_TRAIN = ("accelerate", "datasets", "matplotlib")
_ISSUES = "https://github.com/tve-hf/tve_hf/issues"


def sentence(error: Exception) -> str:
    """The message of an error on one line, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def message(error: Exception, image: str = "") -> str:
    """What to say of an error: one sentence if the input is wrong or a library is missing, else how to report it.

    Args:
        image: the name of the image that it is about, if it is about one.
    """
    text = sentence(error)
    # The name may be a whole image in base64, which messages shorten.
    about = "" if image[:50] in text else f"{image[:200]!r}: "
    module = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and module != "tve_hf":
        # Where this package raises it, no module is named and the text says what to install.
        return f"tve-hf: {text}; run `pip install tve_hf[train]`." if module in _TRAIN else f"tve-hf: {text}"
    if isinstance(error, _MISTAKES):
        return f"tve-hf: {about}{text}"
    lines = "".join(traceback.format_exception(error))
    return (
        f"{lines}tve-hf: {about}unexpected {type(error).__name__}: {text}. Unless the machine is short of something, "
        f"this is a mistake of tve_hf: please report it, with the lines above, at {_ISSUES}"
    )
