"""The scripts in `examples/` as modules, and their arguments."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def words(given: dict[str, object], *more: str) -> list[str]:
    """The words of a command line: options with a value each, then the rest."""
    return [*(str(word) for pair in given.items() for word in pair), *more]


def load_example(name: str) -> ModuleType:
    """Import a script by its name; it can be found as a module, for what it defines may be pickled."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
