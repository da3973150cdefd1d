"""The tests that every implementation of ``parallax_decode`` passes: subclass ``ParallaxDecodeTests`` and name it."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import parallax_decode
from tests.cases import KINDS, Shape, draw
from tests.decode.decode_tests import CASES, SHAPE, Case, poisoned, worst_row
from tests.parallax_tests import draw_probe


@cache
def decoder(implementation: Any, window: Any) -> Any:
    """jit-ed ``(q, r, k, v, hidden) -> o``."""

    @jax.jit
    def run(q: Any, r: Any, k: Any, v: Any, hidden: dict[str, Any]) -> Any:
        return parallax_decode(q, r, k, v, local_window_size=window, implementation=implementation, **hidden)

    return run


def truth(q: Any, r: Any, k: Any, v: Any, visible: np.ndarray) -> np.ndarray:
    """The formula, row by row, in NumPy's float64; the usual scale of the logits."""
    q, r, k, v = (np.asarray(x, np.float64) for x in (q, r, k, v))
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, n in np.ndindex(q.shape[:3]):
        seen, head = visible[b, n, t], n // (q.shape[2] // k.shape[2])
        if not seen.any():
            continue
        keys, values = k[b, seen, head], v[b, seen, head]
        s = keys @ q[b, t, n] / q.shape[3] ** 0.5
        p = np.exp(s - s.max())
        p /= p.sum()
        o[b, t, n] = (p * (1 - (keys - p @ keys) @ r[b, t, n])) @ values
    return o


class ParallaxDecodeTests:
    implementation: str
    dtype: str = "float32"
    names: tuple[str, ...] = tuple(CASES)
    accuracy_shape = SHAPE

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.names)

    def bound(self, kind: str) -> float:
        """Of a row's error: float32's rounding times what the terms of its sum are larger than the sum."""
        return 2e-5

    def compare(self, case: Case, kind: str = "iid") -> tuple[Any, Any]:
        """The output of this implementation, and the truth for the same rounded inputs."""
        q, k, v, _ = poisoned(case, self.dtype, kind)
        r = draw_probe(draw(case.shape, self.dtype))
        got = decoder(self.implementation, case.window)(q, r, k, v, case.hidden())
        assert got.dtype == self.dtype
        return got.astype("float64"), truth(q, r, k, v, case.visible())

    def test_what_is_seen(self, name: str) -> None:
        """What no query sees is NaN."""
        got, expected = self.compare(CASES[name])
        assert worst_row(got, expected) <= self.bound("iid")
        blind = ~CASES[name].visible().any(axis=3)
        np.testing.assert_array_equal(np.asarray(got)[np.moveaxis(blind, 1, 2)], 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_accuracy(self, kind: str) -> None:
        shape = self.accuracy_shape
        got, expected = self.compare(Case(shape, [60, 33][: shape.batch]), kind)
        assert worst_row(got, expected) <= self.bound(kind)

    def test_bad_traced_lengths_are_nan_rows(self) -> None:
        case = Case(Shape(3, 1, 20, 2, 1, 8, 8), [21, -1, 20])
        q, k, v, _ = draw(case.shape, self.dtype)
        o = decoder(self.implementation, None)(q, q, k, v, case.hidden())
        assert bool(jnp.isnan(o[:2]).all())
        assert bool(jnp.isfinite(o[2]).all())
