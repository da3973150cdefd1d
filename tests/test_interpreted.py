"""Runs tests/interpreted: Triton interprets from its import on, so those tests have a process of their own."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    if _version(importlib.metadata.version("triton")) < (3, 7) and _version(np.__version__) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 does not run on NumPy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", "tests/interpreted"]
    runs = [  # two halves at a time
        subprocess.Popen(
            [*command, "-k", tests],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tests in ("TestKernels", "not TestKernels")
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert not any(run.returncode for run in runs), "\n".join(outputs)
