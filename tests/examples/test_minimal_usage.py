"""``examples/minimal_usage.py`` runs as a user runs it and prints what it says it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its standard output, from an empty directory, on the CPU."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "minimal_usage.py")],
        cwd=tmp_path_factory.mktemp("cwd"),
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_setup(output: str) -> None:
    assert re.search(r"^\[setup\] device: .*\(cpu\), implementation: xla$", output, re.MULTILINE)


def test_shapes(output: str) -> None:
    assert "[functional] output: shape=(2, 256, 64) dtype=bfloat16" in output
    assert "[explicit] output: shape=(2, 256, 64), omega: shape=(2, 256)" in output


def test_gradient_norms(output: str) -> None:
    """One for each input and the ridge: positive, finite numbers."""
    norms = dict(re.findall(r"\|(d\w+)\|=(\d\.\d+e[+-]\d+)", output))
    assert list(norms) == ["dq", "dk", "dv", "dlambda"]
    assert all(float(norm) > 0 for norm in norms.values())


def test_the_loss_falls(output: str) -> None:
    """To half within the steps: more than the noise of a step, less than what it was seen to do."""
    match = re.search(r"^\[training\] loss: ([\d.]+) -> ([\d.]+) in \d+ jit-ed steps$", output, re.MULTILINE)
    assert match
    first, last = map(float, match.groups())
    assert last < 0.5 * first
