"""The tests that every implementation of ``lla_decode`` passes: subclass ``DecodeTests`` and name it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import lla_decode
from tests.cases import KINDS, Shape, draw

SHAPE = Shape(2, 2, 70, 4, 2, 8, 12)


@dataclass(frozen=True)
class Case:
    """A call: its shape, the lengths, and what else hides keys."""

    shape: Shape
    lengths: Any
    arrays: tuple[tuple[str, Any], ...] = ()
    window: Any = None

    def hidden(self) -> dict[str, Any]:
        return {name: jnp.asarray(x) for name, x in self.arrays} | {"lengths": jnp.asarray(self.lengths)}

    def visible(self) -> np.ndarray:
        """(B, N, T, S), written down a second time."""
        b, t, s, n = self.shape.batch, self.shape.queries, self.shape.keys, self.shape.heads
        own = np.broadcast_to(np.asarray(self.lengths), (b,))[:, None] - t + np.arange(t)
        own, keys, given = own[:, None, :, None], np.arange(s), dict(self.arrays)
        seen = keys <= own
        if "starts" in given:
            seen = seen & (keys >= np.asarray(given["starts"])[:, None, None, None])
        if self.window is not None:
            left = self.window if isinstance(self.window, int) else self.window[0]
            seen = seen & (keys >= own - left)
        if "mask" in given:
            mask = given["mask"]
            seen = seen & (mask if mask.ndim == 4 else mask[:, None])
        return np.broadcast_to(seen, (b, n, t, s))


def _mask(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.4


CASES = {
    "all of the cache": Case(SHAPE, 70),
    "lengths": Case(SHAPE, [60, 33]),
    "lengths below T": Case(SHAPE, [1, 0]),
    "starts": Case(SHAPE, [60, 33], (("starts", np.array([-5, 20])),)),
    "starts beyond": Case(SHAPE, [60, 33], (("starts", np.array([59, 40])),)),
    "window": Case(SHAPE, [60, 33], (("starts", np.array([0, 25])),), window=(17, 0)),
    "window of itself": Case(SHAPE, [60, 2], window=0),
    "mask": Case(SHAPE, [60, 33], (("mask", _mask(2, 4, 2, 70)),), window=40),
    "mask of three axes": Case(SHAPE, [60, 70], (("mask", _mask(1, 2, 70)), ("starts", np.array([3, 4])))),
    "mask of the keys": Case(SHAPE, [60, 33], (("mask", _mask(2, 1, 1, 70)),)),
    "mask of the heads": Case(SHAPE, [60, 33], (("mask", np.array([True, False, True, True]).reshape(1, 4, 1, 1)),)),
    "one token, one head": Case(Shape(1, 1, 37, 1, 1, 16, 16), [37]),
    "eight tokens": Case(Shape(1, 8, 20, 2, 2, 5, 3), [13]),
    "one key": Case(Shape(1, 1, 1, 2, 1, 4, 4), [1]),
}


@cache
def decoder(implementation: str, window: Any) -> Any:
    """jit-ed ``(q, k, v, ridge, hidden) -> o``."""

    @jax.jit
    def run(q: Any, k: Any, v: Any, lam: Any, hidden: dict[str, Any]) -> Any:
        return lla_decode(q, k, v, ridge_lambda=lam, local_window_size=window, implementation=implementation, **hidden)

    return run


def truth(q: Any, k: Any, v: Any, ridge: float, visible: np.ndarray) -> np.ndarray:
    """The centred form, row by row, in NumPy's float64; the usual scale of the logits."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, n in np.ndindex(q.shape[:3]):
        seen, head = visible[b, n, t], n // (q.shape[2] // k.shape[2])
        if not seen.any():
            continue
        keys, values = k[b, seen, head], v[b, seen, head]
        s = keys @ q[b, t, n] / q.shape[3] ** 0.5
        p = np.exp(s - s.max())
        p /= p.sum()
        kc, vc = keys - p @ keys, values - p @ values
        A = (p[:, None] * kc).T @ kc + ridge * np.eye(q.shape[3])
        o[b, t, n] = p @ values + (p[:, None] * vc).T @ kc @ np.linalg.solve(A, q[b, t, n] - p @ keys)
    return o


def poisoned(case: Case, dtype: Any, kind: str = "iid", cache_dtype: Any = None) -> tuple[Any, ...]:
    """Query, caches and cotangent; what no query of a key head sees is NaN."""
    q, k, v, g = draw(case.shape, dtype, kind)
    unseen = ~seen_keys(case)
    k, v = (jnp.where(jnp.asarray(unseen)[..., None], jnp.nan, x).astype(cache_dtype or dtype) for x in (k, v))
    return q, k, v, g


def seen_keys(case: Case) -> np.ndarray:
    """(B, S, K): whether some query of the key head sees the key."""
    seen = case.visible().any(axis=2)
    groups = seen.reshape(seen.shape[0], case.shape.kv_heads, -1, seen.shape[-1])
    return np.moveaxis(groups.any(axis=2), 1, 2)


def worst_row(got: Any, expected: Any) -> float:
    """The largest relative error of a row, of those that are not zero."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    assert got.shape == expected.shape
    norm = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(got - expected, axis=-1)
    return float(np.max(error / np.where(norm > 0, norm, 1)))


class DecodeTests:
    """Accuracy against the dense reference in float64, ways of hiding keys, repeatability."""

    implementation: str
    dtype: str = "float32"
    names: tuple[str, ...] = tuple(CASES)
    accuracy_shape = SHAPE

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.names)

    def compare(self, case: Case, ridge: float = 1.0, kind: str = "iid", **kwargs: Any) -> tuple[Any, Any]:
        """The output of this implementation, and the truth for the same rounded inputs."""
        q, k, v, _ = poisoned(case, self.dtype, kind, **kwargs)
        lam = jnp.full(case.shape.ridge, ridge, "float64" if self.dtype == "float64" else "float32")
        got = decoder(self.implementation, case.window)(q, k, v, lam, case.hidden())
        assert got.dtype == self.dtype
        return got.astype("float64"), truth(q, k, v, float(lam[0, 0, 0]), case.visible())

    def test_what_is_seen(self, name: str) -> None:
        got, expected = self.compare(CASES[name])
        # float32's rounding times A's condition, which is 1 + |k|^2 at most, and a few sums
        assert worst_row(got, expected) <= (1e-11 if self.dtype == "float64" else 2e-5)
        blind = ~CASES[name].visible().any(axis=3)
        np.testing.assert_array_equal(np.asarray(got)[np.moveaxis(blind, 1, 2)], 0)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("ridge", [10.0, 0.1])
    def test_accuracy(self, kind: str, ridge: float) -> None:
        shape = self.accuracy_shape
        got, expected = self.compare(Case(shape, [60, 33][: shape.batch]), ridge, kind)
        assert worst_row(got, expected) <= self.bound(kind, ridge)

    def bound(self, kind: str, ridge: float) -> float:
        if self.dtype == "float64":
            return 1e-11
        # float32's rounding times the condition: a peaky key's square is about 4 D = 32
        return 1e-5 if ridge >= 1 else 1e-4

    def test_a_bad_traced_ridge_is_nan(self) -> None:
        case = Case(Shape(1, 1, 20, 4, 2, 8, 8), [13])
        q, k, v, _ = poisoned(case, self.dtype)
        lam = jnp.asarray([0.0, -1.0, jnp.nan, 1.0], jnp.float32)[None, None]
        o = decoder(self.implementation, None)(q, k, v, lam, case.hidden())
        assert bool(jnp.isnan(o[:, :, :3]).all())
        assert bool(jnp.isfinite(o[:, :, 3]).all())

    def test_bad_traced_lengths_are_nan_rows(self) -> None:
        case = Case(Shape(3, 1, 20, 2, 1, 8, 8), [21, -1, 20])
        q, k, v, _ = draw(case.shape, self.dtype)
        lam = jnp.ones(case.shape.ridge, jnp.float32)
        o = decoder(self.implementation, None)(q, k, v, lam, case.hidden())
        assert bool(jnp.isnan(o[:2]).all())
        assert bool(jnp.isfinite(o[2]).all())

    def test_huge_keys(self) -> None:
        """Keys whose rounding swallows the ridge: a plausible number, where a plain Cholesky factor is NaN.

        A's condition is 4e7 and float32's rounding 6e-8: there is hardly a digit to be had. Measured 3e-3 to 4e-2, as
        the compiler orders the sums.
        """
        k = jnp.asarray([[-6500, -1700], [16600, 6600]], self.dtype)[None, :, None]
        v = jnp.asarray([[1], [2]], self.dtype)[None, :, None]
        q = jnp.zeros((1, 1, 1, 2), self.dtype)
        run = partial(lla_decode, lengths=2, ridge_lambda=1.0)
        got = run(q, k, v, implementation=self.implementation)
        expected = run(*(x.astype(jnp.float64) for x in (q, k, v)), implementation="xla")
        assert abs(float(expected[0, 0, 0, 0]) - 1.2726) < 1e-4
        assert abs(float(got[0, 0, 0, 0]) - float(expected[0, 0, 0, 0])) < 6e-2

    def test_a_large_common_offset_costs_nothing(self) -> None:
        """In a feature that keys and queries lack otherwise: the same regression."""
        q, k, v, _ = draw(Shape(1, 2, 60, 2, 1, 8, 8), self.dtype)
        q, k = (x.at[..., 0].set(0) for x in (q, k))
        moved = (x.at[..., 0].set(1024) for x in (q, k))  # every logit gains 1024^2 / sqrt(8), q - kbar nothing
        run = jax.jit(partial(lla_decode, lengths=jnp.int32(60), implementation=self.implementation))
        expected, got = run(q, k, v), run(*moved, v)
        # the reference has no origin: logits of 4e5 are good to 1e-10
        exact = 1e-8 if self.implementation == "reference" else 1e-12
        assert worst_row(got, expected) <= (exact if self.dtype == "float64" else 1e-5)

    def test_repeatable(self) -> None:
        case = Case(self.accuracy_shape, [60, 33][: self.accuracy_shape.batch])
        q, k, v, _ = poisoned(case, self.dtype)
        lam = jnp.ones(case.shape.ridge, jnp.float32)
        run = decoder(self.implementation, None)
        first, second = (run(q, k, v, lam, case.hidden()) for _ in range(2))
        np.testing.assert_array_equal(first, second)

    def test_mapped(self) -> None:
        """Over lengths and queries, the cache shared; the same as one by one."""
        q, k, v, _ = draw(Shape(2, 1, 70, 2, 1, 8, 4), self.dtype)
        queries, lengths = jnp.stack([q, 2 * q]), jnp.asarray([[60, 33], [10, 70]])
        run = partial(lla_decode, implementation=self.implementation)
        mapped = jax.jit(jax.vmap(run, in_axes=(0, None, None, 0)))(queries, k, v, lengths)
        for i in range(2):
            assert worst_row(mapped[i], jax.jit(run)(queries[i], k, v, lengths[i])) <= 1e-5
