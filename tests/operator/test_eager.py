"""Calls without ``jax.jit``, as in the README's quickstart: compiled once, and nothing is kept of a call."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flashlla_jax import LLAttention, lla_attention
from tests.cases import Shape, draw

SHAPE = Shape(2, 12, 12, 4, 2, 8, 8)
Call = Callable[[], Any]


def attend(**kwargs: Any) -> Call:
    q, k, v, _ = draw(SHAPE, "float32")
    return lambda: lla_attention(q, k, v, **kwargs)


def gradient(**kwargs: Any) -> Call:
    q, k, v, _ = draw(SHAPE, "float32")
    return lambda: jax.grad(lambda *qkv: jnp.sum(lla_attention(*qkv, **kwargs)), argnums=(0, 1, 2))(q, k, v)


def mapped() -> Call:
    q, k, v, _ = draw(SHAPE, "float32")
    return lambda: jax.vmap(lla_attention)(*(x[:, None] for x in (q, k, v)))


def module() -> tuple[LLAttention, jax.Array]:
    layer = LLAttention(2, 8, learn_ridge=True, rope=100.0, decode=False, rngs=nnx.Rngs(0))
    return layer, jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 8)), jnp.float32)


def layer() -> Call:
    attention, x = module()
    return lambda: attention(x)


def gradient_of_a_layer() -> Call:
    attention, x = module()
    return lambda: nnx.grad(lambda attention: jnp.sum(attention(x)))(attention)


def hiding() -> dict[str, Any]:
    return {
        "local_window_size": 5,
        "segment_ids": jnp.asarray([[0] * 5 + [1] * 7] * 2),
        "key_value_seq_lengths": jnp.asarray([12, 4]),
        "query_offset": jnp.asarray(0),
        "mask": jnp.asarray(np.random.default_rng(0).random((1, 1, 12, 12)) < 0.7),
    }


CALLS: dict[str, Callable[[], Call]] = {
    "attention": attend,
    "reference": lambda: attend(implementation="reference"),
    "hidden keys": lambda: attend(**hiding()),
    "traced ridge": lambda: attend(ridge_lambda=jnp.ones(4, jnp.float32), return_residuals=True),
    "gradient": gradient,
    "gradient, hidden keys": lambda: gradient(**hiding()),
    "vmap": mapped,
    "LLAttention": layer,
    "gradient of LLAttention": gradient_of_a_layer,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_compiles_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    call = CALLS[name]()

    def compilations() -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
            jax.block_until_ready(call())
        return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)

    with jax.numpy_dtype_promotion("standard"):  # Flax promotes inside
        jax.clear_caches()
        assert compilations() > 0  # the count can tell
        assert compilations() == 0


@pytest.mark.parametrize(
    "name",
    ["attention", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gradient, hidden keys", "LLAttention"))],
)
def test_nothing_is_kept_of_a_call(name: str) -> None:
    call = CALLS[name]()

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            call()
        before = objects()
        for _ in range(20):
            call()
        assert objects() - before < 20, "a call leaves at least one object behind"
