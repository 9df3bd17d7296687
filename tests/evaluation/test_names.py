"""Every public function of the evaluation is reached in one way that does not depend on what was imported before."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from tve_hf import evaluation

ROOT = Path(__file__).resolve().parents[2]


def test_all_names_are_what_their_modules_define() -> None:
    for name in evaluation.__all__:
        value = getattr(evaluation, name)
        assert value.__name__ == name and not inspect.ismodule(value)
        assert value is getattr(sys.modules[value.__module__], name)


@pytest.mark.parametrize("name", ["perturbation", "localization"])
def test_a_function_with_the_name_of_its_module_is_reached_either_way(name) -> None:
    code = f"""
from tve_hf.evaluation.{name} import {name} as one
from tve_hf.evaluation import {name} as other
import tve_hf.evaluation.{name}
assert one is other is tve_hf.evaluation.{name} and callable(one)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
