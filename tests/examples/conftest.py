"""Fixtures of the examples' tests."""

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def example(request: pytest.FixtureRequest, import_example: Callable[[str], ModuleType]) -> ModuleType:
    """The example that a file tests: its ``EXAMPLE``."""
    return import_example(request.module.EXAMPLE)


@pytest.fixture(scope="module")
def model(import_example: Callable[[str], ModuleType]) -> ModuleType:
    """The character language model that the training example trains."""
    return import_example("common.char_lm")
