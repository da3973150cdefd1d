"""These tests run in a process of their own, with ``TRITON_INTERPRET=1`` set before Triton is imported."""

import importlib.metadata

import numpy as np
import pytest


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _version(importlib.metadata.version("triton")) < (3, 7) and _version(np.__version__) >= (2, 4):
        skip = pytest.mark.skip(reason="the interpreter of Triton 3.6 does not run on NumPy 2.4")
        for item in items:
            item.add_marker(skip)
