"""Compiles the kernels of a program side by side.

Triton compiles a kernel when its call is lowered, one call after the other. jax-triton keeps the kernels that the
process has compiled, and Triton lets go of Python's lock while it compiles. So each call is first lowered by itself,
in a thread of its own. When its turn in the program comes, its kernel is there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

_CALL = "triton_kernel_call"  # how jax-triton names its primitive
# before these, CPython miscounts its depth if two threads parse at a time (gh-106905), and Triton parses its kernels
_PARSES_IN_THREADS = sys.version_info >= ((3, 12, 2) if sys.version_info >= (3, 12) else (3, 11, 8))


def compile_side_by_side(*jaxprs: Any) -> None:
    """Compiles the kernels that these jaxprs launch on CUDA."""
    calls = [call for jaxpr in jaxprs for call in _calls(jaxpr)]
    if len(calls) < 2 or not _PARSES_IN_THREADS:
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(_lower, calls))  # raises what a thread raised


def _lower(call: Any) -> None:
    """Lowers one call; the program that comes of it is not kept."""
    types = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in call.invars]
    # JAX 0.12 would look for unused ones by a rule of jax-triton 0.4.1, whose signature has changed since
    run = jax.jit(lambda *arrays: call.primitive.bind(*arrays, **call.params), keep_unused=True)
    run.trace(*types).lower(lowering_platforms=("cuda",))


def _calls(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, and of those inside it, that launch a kernel."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == _CALL:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from _calls(inner)
