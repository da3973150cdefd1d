"""What a first call compiles, and when: lowers for CUDA on a host without a GPU, as ``test_lowering.py`` does."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from flashlla_jax.kernels import ahead
from tests.cases import Shape
from tests.kernels.test_lowering import _hopper, arguments, gradients

SHAPE = Shape(dim=16, value_dim=24)  # of no other test: jax-triton keeps what it has compiled
hopper = _hopper

# A process that has no Triton prints how many kernels are in the program that it would compile for a GPU.
LOAD = """
import sys
sys.modules["triton"] = sys.modules["jax_triton"] = None  # an import of these fails
import jax
exported = jax.export.deserialize(open(sys.argv[1], "rb").read())
run = jax.jit(exported.call)
print(run.trace(*exported.in_avals).lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not ahead._PARSES_IN_THREADS, reason="this Python cannot parse in two threads")
def test_the_three_kernels_are_compiled_side_by_side_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia.compiler import CUDABackend

    compile_further = CUDABackend.make_ttir
    together = threading.Barrier(3, timeout=120)  # broken unless three compilations are under way at one time
    compiled: list[object] = []

    def make_ttir(module: object, *rest: object) -> object:
        together.wait()
        compiled.append(module)
        return compile_further(module, *rest)

    monkeypatch.setattr(CUDABackend, "make_ttir", staticmethod(make_ttir))
    lowered = jax.jit(gradients(SHAPE)).trace(*arguments(SHAPE, "bfloat16")).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@triton_kernel_call") == 3
    assert len(compiled) == 3  # the program itself found them compiled


@pytest.mark.slow
def test_an_exported_program_needs_no_triton(tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export writes files with it")
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"triton_kernel_call{end}") for end in ("", "_ffi")]
    run = jax.jit(gradients(SHAPE))
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(*arguments(SHAPE, "bfloat16"))
    file = tmp_path / "program"
    file.write_bytes(exported.serialize())
    done = subprocess.run([sys.executable, "-c", LOAD, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "3"
