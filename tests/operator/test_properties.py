"""What holds for any input, on inputs that Hypothesis picks: scales over six decades, ridges over five."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlla_jax import lla_attention
from tests.cases import Inputs, Shape, draw, evaluate, relative_error

# Shapes are few, so that examples share compilations: the inputs are what varies.
SHAPES = (
    Shape(2, 9, 12, 4, 2, 5, 3),
    Shape(1, 8, 5, 1, 1, 3, 4, is_causal=False),
    Shape(1, 6, 6, 2, 2, 1, 1),
)
EPS = float(np.finfo(np.float64).eps)

properties = settings(max_examples=30, deadline=None, derandomize=True, database=None)
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**16)
exponents = st.floats(-3, 3)  # of ten: scales from 1e-3 to 1e3


@cache
def attend(shape: Shape, implementation: Any = "xla", qk_scale: float = 0.4) -> Callable[..., jax.Array]:
    options: dict[str, Any] = {"is_causal": shape.is_causal, "qk_scale": qk_scale, "cg_rtol": 1e-28, "delta_eps": 0.0}
    return jax.jit(
        lambda q, k, v, lam: lla_attention(q, k, v, ridge_lambda=lam, implementation=implementation, **options)
    )


def scaled(shape: Shape, seed: int, scales: tuple[float, float, float], dtype: str = "float64") -> Inputs:
    inputs = draw(shape, seed=seed)
    factors = (*(10.0**e for e in scales), 1.0)
    return Inputs(*((x * factor).astype(dtype) for x, factor in zip(inputs, factors, strict=True)))


def ridges(shape: Shape, exponent: float, dtype: str = "float64") -> jax.Array:
    return jnp.full(shape.ridge, 10.0**exponent, dtype)


def softmax_and_bound(inputs: Inputs, shape: Shape, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention, and how far the regression may be from it, query by query; qk_scale 0.4.

    o - vbar = -sum_j p_j (kc_j.x) v_j with |x| <= |m| / ridge, A's eigenvalues being at least the ridge; so
    |o - vbar| <= max|kc| |m| max|v| / ridge.
    """
    q, k, v = (np.moveaxis(np.asarray(x), 2, 1) for x in inputs[:3])
    k, v = (np.repeat(x, shape.heads // shape.kv_heads, axis=1) for x in (k, v))
    s = 0.4 * q @ np.swapaxes(k, -1, -2)
    if shape.is_causal:
        s = np.where(np.tril(np.ones(s.shape[-2:], bool), shape.keys - shape.queries), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    kbar = p @ k
    kc = np.linalg.norm(k[:, :, None] - kbar[:, :, :, None], axis=-1).max(-1)
    bound = kc * np.linalg.norm(kbar - q, axis=-1) * np.linalg.norm(v, axis=-1).max(-1)[..., None] / ridge
    return np.moveaxis(p @ v, 1, 2), np.moveaxis(bound, 1, 2)


@pytest.mark.slow
@properties
@given(shapes, seeds, st.tuples(exponents, exponents, exponents), st.floats(-2, 3))
def test_finite(shape: Shape, seed: int, scales: tuple[float, float, float], ridge: float) -> None:
    """float32: no overflow, no NaN in the output or in any gradient, however far the query lies from the keys."""
    inputs = scaled(shape, seed, scales, "float32")
    got = evaluate(inputs, ridges(shape, ridge, "float32"), implementation="xla", is_causal=shape.is_causal)
    for name, x in got.items():
        assert bool(jnp.isfinite(x).all()), name


@pytest.mark.slow
@properties
@given(shapes, seeds, st.tuples(exponents, exponents, exponents), st.floats(-2, 3))
def test_agrees_with_the_reference(shape: Shape, seed: int, scales: tuple[float, float, float], ridge: float) -> None:
    """float64, to what the conditioning of the example leaves."""
    inputs, lam = scaled(shape, seed, scales), ridges(shape, ridge)
    got, expected = (attend(shape, name)(*inputs[:3], lam) for name in ("xla", "reference"))
    assert bool(jnp.isfinite(got).all())
    # The paper's form solves with Sigma / omega, of condition number kappa = 1 + max |k - q|^2 / ridge at most, and
    # divides by a denominator that is 1 / kappa of its terms at least: kappa^2 eps. A logit s is rounded to |s| eps,
    # which moves its weight, and so the regression, by kappa |s| eps. 4 stands for the constants of both.
    q, k = (float(jnp.max(jnp.linalg.norm(x, axis=-1))) for x in inputs[:2])
    kappa = 1 + (q + k) ** 2 / 10.0**ridge
    tolerance = 4 * EPS * (kappa**2 + kappa * 0.4 * q * k)
    assert relative_error(got, expected, float(jnp.linalg.norm(inputs.v))) <= tolerance


@pytest.mark.slow
@properties
@given(shapes, seeds, st.tuples(st.floats(-1, 1), st.floats(-1, 1), exponents), st.floats(-1, 8))
def test_distance_from_softmax(shape: Shape, seed: int, scales: tuple[float, float, float], ridge: float) -> None:
    """No convex combination of the values; how far it may be from softmax attention falls with the ridge."""
    inputs = scaled(shape, seed, scales)
    o = np.asarray(attend(shape)(*inputs[:3], ridges(shape, ridge)))
    softmax, bound = softmax_and_bound(inputs, shape, 10.0**ridge)
    # the rounding of both sides, for logits of at most 0.4 * 100 * 3 * 3: 360 eps = 8e-14
    slack = 1e-11 * (bound + float(np.abs(inputs.v).max()))
    assert np.all(np.linalg.norm(o - softmax, axis=-1) <= bound + slack)


@pytest.mark.slow
@properties
@given(shapes, seeds, st.sampled_from([0.5, 3.0, 64.0]), st.floats(-2, 2))
def test_units_of_the_key(shape: Shape, seed: int, c: float, ridge: float) -> None:
    """Keys and queries in other units, the ridge in their square and the scale in its inverse: the same output."""
    q, k, v, _ = draw(shape, seed=seed)
    lam = ridges(shape, ridge)
    before = attend(shape)(q, k, v, lam)
    after = attend(shape, qk_scale=0.4 / c**2)(c * q, c * k, v, c**2 * lam)
    # eps times the condition number, 1 + |k|^2 / ridge, some 3e3 at a ridge of 0.01, times |m|, some 10
    assert relative_error(after, before, float(jnp.linalg.norm(v))) <= 1e-11


@pytest.mark.slow
@properties
@given(st.permutations(range(3)), st.permutations(range(2)), st.permutations(range(2)), seeds)
def test_batches_and_heads_are_alike(batch: list[int], groups: list[int], members: list[int], seed: int) -> None:
    """Permuted batches, key heads with their query heads, and query heads of one key head: permuted outputs."""
    shape = Shape(3, 7, 9, 4, 2, 4, 3)
    q, k, v, _ = draw(shape, seed=seed)
    lam = jnp.asarray(np.random.default_rng(seed).uniform(0.1, 2.0, shape.ridge))
    heads = np.array([2 * group + member for group in groups for member in members])
    rows, kv_heads = np.array(batch), np.array(groups)
    before = attend(shape)(q, k, v, lam)
    permuted = (x[rows][:, :, order] for x, order in ((q, heads), (k, kv_heads), (v, kv_heads), (lam, heads)))
    after = attend(shape)(*permuted)
    # the same sums in the same order, unless a batched product groups its rows otherwise: a few eps times 1e3
    assert relative_error(after, before[rows][:, :, heads]) <= 1e-12
