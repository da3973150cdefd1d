"""``LLAttention`` on the Triton kernels, against itself on the XLA path."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from flashlla_jax import LLAttention
from flashlla_jax.nn.linen import LLAttention as LinenLLAttention
from tests.cases import relative_error
from tests.nn.test_modules import inputs, linen_parameters

pytestmark = pytest.mark.gpu

FEATURES, LENGTH = 128, 200
# bfloat16: the rounding of projections and attention in either; float32 at "highest": no tf32.
BOUNDS = {"bfloat16": 2e-2, "float32": 1e-4}


def module(implementation: Any, dtype: str, **kwargs: Any) -> LLAttention:
    options: dict[str, Any] = {"num_kv_heads": 1, "rope": 10000.0, "learn_ridge": True, "ridge_lambda": 1.0} | kwargs
    return LLAttention(
        2,
        FEATURES,
        dtype=dtype,
        precision="highest" if dtype == "float32" else None,
        implementation=implementation,
        decode=False,
        rngs=nnx.Rngs(0),
        **options,
    )


@nnx.jit
def value_and_gradients(layer: LLAttention, x: jax.Array) -> Any:
    def loss(layer: LLAttention, x: jax.Array) -> Any:
        o = layer(x)
        return jnp.sum(jnp.sin(o.astype(jnp.float32))), o

    (_, o), gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return o, gradients


@pytest.mark.parametrize("dtype", BOUNDS)
def test_triton_is_xla(dtype: str) -> None:
    """Output, and gradients of every parameter and of the input."""
    x = inputs(2, LENGTH, FEATURES, dtype=dtype)
    got, expected = (value_and_gradients(module(name, dtype), x) for name in ("triton", "xla"))
    assert got[0].dtype == dtype
    errors = jax.tree.map(relative_error, got, expected)
    scale = jax.tree.map(lambda a: float(jnp.linalg.norm(a.astype(jnp.float32))), expected)
    largest = max(jax.tree.leaves(scale))
    # a key's bias moves all keys alike, which changes nothing but rope's share: judged on the others' scale
    bad = jax.tree.map(lambda e, s: e * s / max(s, 1e-2 * largest) > BOUNDS[dtype], errors, scale)
    assert not any(jax.tree.leaves(bad)), errors


@pytest.mark.parametrize("dtype", BOUNDS)
def test_decode_is_the_full_forward(dtype: str) -> None:
    """A prompt, which is Triton's, then a few tokens, then one at a time."""
    layer, x = module("triton", dtype), inputs(2, LENGTH, FEATURES, dtype=dtype)
    full = nnx.jit(lambda layer, x: layer(x))(layer, x)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    layer.init_cache(x.shape, dtype)
    cuts = [0, 150, 180, 184, *range(185, LENGTH + 1)]
    got = jnp.concatenate([step(layer, x[:, a:b]) for a, b in itertools.pairwise(cuts)], axis=1)
    assert relative_error(got, full) <= {"bfloat16": 1e-2, "float32": 1e-5}[dtype]


def test_linen_is_nnx() -> None:
    layer, x = module("triton", "bfloat16"), inputs(2, LENGTH, FEATURES, dtype="bfloat16")
    twin = LinenLLAttention(
        2, num_kv_heads=1, rope=10000.0, learn_ridge=True, ridge_lambda=1.0, dtype="bfloat16", implementation="triton"
    )
    got = jax.jit(twin.apply)({"params": linen_parameters(layer)}, x)
    assert relative_error(got, nnx.jit(lambda layer, x: layer(x))(layer, x)) <= BOUNDS["bfloat16"]


def test_training_reduces_the_loss() -> None:
    x = inputs(4, LENGTH, FEATURES, dtype="bfloat16")
    target = jnp.cumsum(x.astype(jnp.float32), axis=1) / jnp.arange(1, LENGTH + 1, dtype=jnp.float32)[None, :, None]
    graph, parameters = nnx.split(module("triton", "bfloat16"))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(parameters: Any, state: Any) -> Any:
        def loss(parameters: Any) -> jax.Array:
            return jnp.mean(jnp.square(nnx.merge(graph, parameters)(x).astype(jnp.float32) - target))

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        state, losses = optimizer.init(parameters), []
        for _ in range(11):
            parameters, state, value = step(parameters, state)
            losses.append(float(value))
    assert losses[10] < 0.8 * losses[0]
