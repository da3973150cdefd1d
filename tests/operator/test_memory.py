"""Linear memory, read off the compiled program: nothing is run."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from flashlla_jax import lla_attention

SHORT, LONG, DIM = 1024, 8192, 64


@cache
def temporaries(length: int, backward: bool) -> int:
    """Bytes of temporary memory of one causal call in float32, B = 1, D = 64, on the XLA path."""

    def total(q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array) -> jax.Array:
        return jnp.sum(lla_attention(q, k, v, ridge_lambda=ridge, implementation="xla"))

    x = jax.ShapeDtypeStruct((1, length, DIM), jnp.float32)
    ridge = jax.ShapeDtypeStruct((1, length), jnp.float32)
    function = jax.value_and_grad(total, argnums=(0, 1, 2, 3)) if backward else total
    analysis = jax.jit(function).lower(x, x, x, ridge).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
class TestLinearMemory:
    def test_grows_as_the_length(self, backward: bool) -> None:
        """Eight times the length, eight times the memory; nine allows for what XLA rounds up. Quadratic would be 64."""
        assert temporaries(LONG, backward) <= 9 * temporaries(SHORT, backward)

    def test_is_far_from_a_square(self, backward: bool) -> None:
        """Less than a quarter of one S x S array in float32: none is there, and no dense mask either (a byte each)."""
        assert temporaries(LONG, backward) < LONG * LONG * 4 / 4

    def test_the_measure_sees_memory(self, backward: bool) -> None:
        """The inputs alone, in blocks, take as much: a compiler that reported nothing would pass the other tests."""
        assert temporaries(SHORT, backward) >= SHORT * DIM * 4
