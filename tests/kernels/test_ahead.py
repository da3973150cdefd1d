"""Lowering in threads, with a primitive that stands in for jax-triton's: neither Triton nor a GPU is needed."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir, partial_eval

from flashlla_jax.kernels import ahead


@pytest.fixture(autouse=True)
def _any_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PARSES_IN_THREADS", True)


def launches(lower: Any) -> Any:
    """The jaxpr of two calls side by side and one inside a function; ``lower`` is told of each that is lowered."""
    call = Primitive("triton_kernel_call")
    call.def_abstract_eval(lambda x, *, kernel: x)

    def rule(_: Any, x: Any, *, kernel: str) -> list[Any]:
        lower(kernel)
        return [x]

    def no_dead_code(*_: Any) -> Any:
        raise TypeError("JAX 0.12 calls jax-triton 0.4.1's rule with an argument too many")

    mlir.register_lowering(call, rule, platform="cuda")
    partial_eval.dce_rules[call] = no_dead_code

    def run(x: jax.Array) -> jax.Array:
        inner = jax.jit(lambda x: call.bind(x, kernel="key"))
        return call.bind(x, kernel="forward") + call.bind(x, kernel="query") + inner(x)

    return jax.make_jaxpr(run)(jnp.ones(3))


def test_all_at_one_time() -> None:
    together = threading.Barrier(3, timeout=60)  # broken unless three threads wait at it
    ahead.compile_side_by_side(launches(lambda _: together.wait()))


def test_each_once() -> None:
    lowered: list[str] = []
    jaxpr = launches(lowered.append)
    ahead.compile_side_by_side(jaxpr)
    assert sorted(lowered) == ["forward", "key", "query"]


def test_an_error_reaches_the_caller() -> None:
    def lower(kernel: str) -> None:
        raise ValueError(f"cannot compile {kernel}")

    with pytest.raises(ValueError, match="cannot compile"):
        ahead.compile_side_by_side(launches(lower))
