"""float64 is on for every test (the reference is float64), and nothing is promoted or broadcast by accident."""

import os

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# run by test_interpreted.py, in a process where Triton interprets
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run when they are asked for by marker, and only then."""
    if "gpu" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="needs a GPU: run with -m gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
