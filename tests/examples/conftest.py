"""What the tests of all studies share."""

from types import ModuleType

import pytest
from scripts import load_example


@pytest.fixture(scope="module")
def study(request: pytest.FixtureRequest) -> ModuleType:
    """The script that a module of tests is named after."""
    return load_example(request.path.stem.removeprefix("test_"))
