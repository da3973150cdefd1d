"""Limiting cases whose answer is known from elsewhere: softmax attention, ridge regression, invariances."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import lla_attention
from tests.cases import Shape, draw, relative_error

IMPLEMENTATIONS = ("xla", "reference")
CAUSAL = Shape(2, 9, 12, 4, 2, 5, 5)  # jax.nn.dot_product_attention wants equal key and value dimensions
FULL = Shape(1, 8, 11, 2, 1, 4, 4, is_causal=False)
SHAPES = (CAUSAL, FULL)

# What float64 leaves: unit roundoff 2.2e-16 times condition numbers of a few hundred and sums of a dozen terms; for
# conjugate gradients sqrt(cg_rtol) = 1e-14 of a solution, times the same.
EXACT = 1e-11

pytestmark = [
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS),
]


@cache
def compiled(**kwargs: Any) -> Callable[..., jax.Array]:
    """``lla_attention`` jit-ed with these options, the ridge traced: most tests share one compilation."""
    return jax.jit(lambda q, k, v, ridge: lla_attention(q, k, v, ridge_lambda=ridge, **kwargs))


def attend(
    q: Any, k: Any, v: Any, shape: Shape, implementation: str, ridge_lambda: Any = 0.5, qk_scale: float | None = None
) -> jax.Array:
    """Without the denominator's offset, and with a stop that float64 deserves."""
    options = {"is_causal": shape.is_causal, "delta_eps": 0.0, "cg_rtol": 1e-28, "implementation": implementation}
    ridge = jnp.broadcast_to(jnp.asarray(ridge_lambda, jnp.float64), shape.ridge)
    return compiled(qk_scale=qk_scale, **options)(q, k, v, ridge)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_ridge_is_softmax_attention(shape: Shape, implementation: str) -> None:
    """An infinite ridge is the blockwise path's alone; the dense form has inf - inf there."""
    q, k, v, _ = draw(shape, seed=1)
    # jax.nn's own is_causal aligns unequal lengths at the start
    visible = np.tril(np.ones((shape.queries, shape.keys), bool), shape.keys - shape.queries)
    mask = jnp.asarray(visible)[None, None] if shape.is_causal else None
    with jax.numpy_dtype_promotion("standard"):  # jax.nn promotes inside
        expected = jax.nn.dot_product_attention(q, k, v, mask=mask)
    for ridge in (1e12, math.inf) if implementation == "xla" else (1e12,):
        got = attend(q, k, v, shape, implementation, ridge_lambda=ridge)
        # jax.nn takes its softmax in float32, eps 1.2e-7; of the regression |m| |k| / ridge is left, 1e-11 at 1e12
        assert relative_error(got, expected) <= 2.4e-7, ridge


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qk_scale_zero_is_ridge_regression(shape: Shape, implementation: str) -> None:
    """With equal weights: minimise sum_j |v_j - b - W (k_j - q)|^2 + ridge n |W|^2; the prediction at q is b.

    n is the number of visible keys, since the ridge multiplies omega, which is n here. The intercept is not penalised.
    Solved by ``lstsq`` on the system augmented by the square root of the penalty.
    """
    q, k, v, _ = draw(shape, seed=2)
    ridge = np.random.default_rng(3).uniform(0.1, 2.0, shape.ridge)
    got = np.asarray(attend(q, k, v, shape, implementation, ridge_lambda=ridge, qk_scale=0.0))
    expected = np.zeros_like(got)
    for b, i, n in np.ndindex(*shape.ridge):
        head = n // (shape.heads // shape.kv_heads)
        visible = i + shape.keys - shape.queries + 1 if shape.is_causal else shape.keys
        z = np.asarray(k)[b, :visible, head] - np.asarray(q)[b, i, n]
        penalty = np.sqrt(ridge[b, i, n] * visible) * np.eye(shape.dim)
        system = np.block([[np.ones((visible, 1)), z], [np.zeros((shape.dim, 1)), penalty]])
        targets = np.concatenate([np.asarray(v)[b, :visible, head], np.zeros((shape.dim, shape.value_dim))])
        expected[b, i, n] = np.linalg.lstsq(system, targets)[0][0]
    assert relative_error(jnp.asarray(got), jnp.asarray(expected)) <= EXACT


def test_the_first_causal_row_returns_its_value(implementation: str) -> None:
    """One visible key, wherever the query is: a regression on one point is that point's value."""
    shape = Shape(2, 6, 6, 2, 1, 5, 7)
    q, k, v, _ = draw(shape, seed=4)
    got = attend(q, k, v, shape, implementation, ridge_lambda=0.01)[:, 0]
    assert relative_error(got, jnp.repeat(v[:, 0], 2, axis=1)) <= EXACT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_translation_under_equal_weights(shape: Shape, implementation: str) -> None:
    """With qk_scale = 0 the regression sees differences of keys and queries only: any common shift drops out."""
    q, k, v, _ = draw(shape, seed=5)
    c = jnp.asarray(np.random.default_rng(6).normal(scale=3.0, size=(1, 1, 1, shape.dim)))
    before = attend(q, k, v, shape, implementation, qk_scale=0.0)
    assert relative_error(attend(q + c, k + c, v, shape, implementation, qk_scale=0.0), before) <= EXACT
    # the case can tell: shifting the keys alone is another regression
    assert relative_error(attend(q, k + c, v, shape, implementation, qk_scale=0.0), before) > 0.1


@pytest.mark.parametrize("qk_scale", [0.3, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_translation_across_the_keys(shape: Shape, qk_scale: float, implementation: str) -> None:
    """A shift orthogonal to every key and query adds one constant to all logits of a row, so the weights stay too.

    At qk_scale = 2 that constant is 800, whose exponential is no float64.
    """
    q, k, v, _ = draw(shape, seed=7)
    q, k = q.at[..., -2:].set(0), k.at[..., -2:].set(0)
    c = jnp.zeros((1, 1, 1, shape.dim)).at[..., -2:].set(jnp.asarray([12.0, -16.0]))
    before = attend(q, k, v, shape, implementation, qk_scale=qk_scale)
    assert relative_error(attend(q + c, k + c, v, shape, implementation, qk_scale=qk_scale), before) <= EXACT


def test_the_order_of_keys_does_not_matter_in_full_attention(implementation: str) -> None:
    q, k, v, _ = draw(FULL, seed=8)
    order = np.random.default_rng(9).permutation(FULL.keys)
    before = attend(q, k, v, FULL, implementation)
    assert relative_error(attend(q, k[:, order], v[:, order], FULL, implementation), before) <= EXACT
    assert relative_error(attend(q, k[:, order], v, FULL, implementation), before) > 0.1  # the case can tell


def test_a_linear_value_function_is_reproduced(implementation: str) -> None:
    """v = W k + b at the keys is W q + b at the query as the ridge vanishes: what softmax attention cannot do."""
    shape = Shape(1, 8, 30, 2, 1, 4, 3, is_causal=False)
    q, k, _, _ = draw(shape, seed=10)
    rng = np.random.default_rng(11)
    w, b = rng.normal(size=(shape.dim, shape.value_dim)), rng.normal(size=(1, 1, 1, shape.value_dim))
    v = jnp.asarray(np.asarray(k) @ w + b)
    expected = jnp.asarray(np.asarray(q) @ w + b)
    errors = [
        relative_error(attend(q, k, v, shape, implementation, ridge_lambda=ridge), expected)
        for ridge in (1e-2, 1e-4, 1e-6)
    ]
    # the bias is linear in the ridge: ridge times |A^-1|, some tens for 30 keys in 4 dimensions
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]
    assert errors[2] <= 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_in_the_values(shape: Shape, implementation: str) -> None:
    """Scaled values scale the output, summed values sum it."""
    q, k, v, _ = draw(shape, seed=12)
    other = draw(shape, seed=13).v
    o, o_other = attend(q, k, v, shape, implementation), attend(q, k, other, shape, implementation)
    assert relative_error(attend(q, k, -1e3 * v, shape, implementation), -1e3 * o) <= EXACT
    assert relative_error(attend(q, k, v + 2 * other, shape, implementation), o + 2 * o_other) <= EXACT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_values_are_returned(shape: Shape, implementation: str) -> None:
    """The weights sum to one, whatever their signs."""
    q, k, _, _ = draw(shape, seed=14)
    value = jnp.asarray(np.random.default_rng(15).normal(size=(1, 1, 1, shape.value_dim)))
    v = jnp.broadcast_to(value, (shape.batch, shape.keys, shape.kv_heads, shape.value_dim))
    got = attend(q, k, v, shape, implementation, ridge_lambda=0.1)
    assert relative_error(got, jnp.broadcast_to(value, got.shape)) <= EXACT
