"""float32 where products are huge or keys lie far off: tests for the implementations that are meant for it.

Subclass ``HardKeyTests`` and name the implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import lla_attention
from tests.cases import Inputs, Shape, draw, evaluate, relative_error, truth


def check_one_key(implementation: str) -> None:
    """The second row's key holds all its weight, beside an x.k of 1e8."""
    q, k, v = (
        jnp.asarray(x, jnp.float32)[None] for x in ([[0, 0], [3000, 1000]], [[0, 0], [1000, 700]], [[0, 0], [1, 1]])
    )
    attend = partial(lla_attention, ridge_lambda=0.1, implementation=implementation)
    # delta_eps moves the second row by delta_eps m.x = 4e-5
    np.testing.assert_allclose(attend(q, k, v)[0], [[0, 0], [1, 1]], atol=5e-5)
    np.testing.assert_allclose(attend(q, k, v, delta_eps=0.0)[0], [[0, 0], [1, 1]], atol=1e-6)


def moved(inputs: Inputs, seed: int) -> Inputs:
    """Queries and keys moved by a rounding of float32.

    That changes the truth by 1e-7, and the dense form's error by up to 1000 times. One row makes all of that error, in
    which two keys share the weight, so that one sample of it is luck.
    """
    rng = np.random.default_rng(seed)
    q, k = (x * jnp.asarray(1 + 2.0**-23 * rng.integers(-1, 2, x.shape), jnp.float32) for x in (inputs.q, inputs.k))
    return inputs._replace(q=q, k=k)


class HardKeyTests:
    implementation: str
    rows: int = 160  # of standard deviation 10 and more
    offset_rows: int = 300
    factor: float = 5  # of the dense form's error that is allowed

    @pytest.fixture(autouse=True)
    def exact_float32(self) -> Iterator[None]:
        with jax.default_matmul_precision("highest"):
            yield

    def test_one_key_holds_all_the_weight(self) -> None:
        check_one_key(self.implementation)

    @pytest.mark.parametrize("std", [10, 100, 1000])
    @pytest.mark.parametrize("lam", [10.0, 0.1])
    def test_huge_queries_and_keys(self, std: float, lam: float) -> None:
        """Nearly all the weight on one key, and x.k up to 1e9: as good as explicitly centred keys, which the dense form
        has, and no output far outside of the values."""
        shape = Shape(1, self.rows, self.rows, 1, 1, 64, 64)
        q, k, v, g = draw(shape, "float32")
        inputs, ridge = Inputs(std * q, std * k, v, g), jnp.full(shape.ridge, lam, jnp.float32)
        expected = truth(inputs, ridge)
        got = evaluate(inputs, ridge, implementation=self.implementation)
        dense = [
            evaluate(x, ridge, implementation="reference") for x in (inputs, *(moved(inputs, i) for i in range(4)))
        ]
        # On rows with one key there is no gradient but dv, so the others are measured on the scale of |g| |v|. Where
        # two keys share a row's weight, both forms show the rounding of that row's logits.
        scale = {"dq": 1 / std, "dk": 1 / std, "dlambda": 1 / lam}
        for name, x in expected.items():
            floor = scale.get(name, 0.0) * float(jnp.linalg.norm(v) * jnp.linalg.norm(g))
            error, *errors = (relative_error(y[name], x, floor) for y in (got, *dense))
            assert error <= max(2e-5, self.factor * max(errors)), (name, error, errors)
        assert float(jnp.abs(got["o"]).max()) <= 1.2 * float(jnp.abs(v).max())

    @pytest.mark.parametrize("qk_scale", [None, 2e-4])
    @pytest.mark.parametrize("name", ["causal", "window", "wide window", "packed", "scattered"])
    def test_an_offset_costs_no_more_than_in_a_causal_call(self, name: str, qk_scale: float | None) -> None:
        """Keys around 1000, also where a block of queries has none in common: the error is float32's.

        At the usual scale one key has all the weight of most rows, at the small one all share it.
        """
        shape = Shape(1, self.offset_rows, self.offset_rows, 1, 1, 16, 8)
        q, k, v, g = draw(shape, "float32")
        ids = np.random.default_rng(0).integers(0, 9, (1, self.offset_rows))
        ways = {
            "window": {"local_window_size": (20, 0)},
            "wide window": {"local_window_size": (2 * self.offset_rows // 3, 0)},
            "packed": {"segment_ids": np.sort(ids, axis=1)},
            "scattered": {"segment_ids": ids},
        }
        way = ways.get(name, {})
        inputs = Inputs(q + 1000, k + 1000, v, g)
        attend = partial(lla_attention, ridge_lambda=0.5, qk_scale=qk_scale, **way)
        got = attend(*inputs[:3], implementation=self.implementation)
        wide = (x.astype(jnp.float64) for x in inputs[:3])
        assert relative_error(got, attend(*wide, implementation="reference")) <= 3e-6

    @pytest.mark.parametrize("name", ["packed", "scattered", "window", "mask"])
    def test_documents_that_lie_far_apart(self, name: str) -> None:
        """Every document has an offset of its own, of some 1000 a feature, and a block of queries sees several."""
        rows = self.offset_rows
        shape = Shape(1, rows, rows, 1, 1, 16, 8)
        q, k, v, g = draw(shape, "float32")
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 9, (1, rows))
        ids = ids if name == "scattered" else np.sort(ids, axis=1)
        offset = rng.normal(0, 1000, (9, 16)).astype(np.float32)[ids][:, :, None]
        shown = {"mask": (ids[:, None, :, None] == ids[:, None, None])} if name == "mask" else {"segment_ids": ids}
        inputs = Inputs(q + offset, k + offset, v, g)
        ridge = jnp.full(shape.ridge, 0.5, jnp.float32)
        # as long as all of a document's keys share the weight: else a logit's rounding shows, in a document alone too
        kwargs = {"qk_scale": 2e-4, "hidden": shown} | ({"local_window_size": (12, 0)} if name == "window" else {})
        got = evaluate(inputs, ridge, implementation=self.implementation, **kwargs)
        for of, expected in truth(inputs, ridge, **kwargs).items():
            assert relative_error(got[of], expected) <= 3e-6, of

    def test_queries_that_share_no_key(self) -> None:
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(x + rng.normal(size=(1, 3, 4)), jnp.float32) for x in (1000, 1000, 0))
        mask = jnp.asarray([[[1, 0, 0], [1, 1, 0], [0, 1, 1]]], bool)
        attend = partial(lla_attention, mask=mask, ridge_lambda=0.1)
        wide = (x.astype(jnp.float64) for x in (q, k, v))
        expected = attend(*wide, implementation="reference")
        # one ulp of a logit of 2e6 would be 0.1: what is left is that of keys of 1000, 6e-5
        np.testing.assert_allclose(attend(q, k, v, implementation=self.implementation), expected, atol=1e-5)
