"""``parallax_decode``: every way of hiding parts of a cache, against the reference and against the whole sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import parallax_attention, parallax_decode
from tests.cases import KINDS, Shape, draw, relative_error
from tests.decode.decode_tests import CASES, poisoned, worst_row
from tests.decode.parallax_decode_tests import ParallaxDecodeTests, decoder, truth
from tests.parallax_tests import draw_probe


class TestParallaxDecode(ParallaxDecodeTests):
    implementation = "xla"


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_sequence(kind: str) -> None:
    """Token by token and three at a time, what the causal call gives at their positions."""
    inputs = draw(Shape(2, 20, 20, 4, 2, 8, 12), "float64", kind)
    probe = draw_probe(inputs)
    whole = parallax_attention(inputs.q, probe, *inputs[1:3], implementation="xla")
    step = jax.jit(partial(parallax_decode, implementation="xla"))
    for tokens in (1, 3):
        for end in range(tokens, 21, tokens):
            at = slice(end - tokens, end)
            got = step(inputs.q[:, at], probe[:, at], *inputs[1:3], jnp.int32(end))
            assert relative_error(got, whole[:, at]) <= 1e-12


def test_gradients() -> None:
    """Through the cache that holds NaN where nothing is seen, as those of the reference."""
    case = CASES["window"]
    q, k, v, g = poisoned(case, "float64")
    r = draw_probe(draw(case.shape, "float64"))

    def gradients(implementation: Any) -> Any:
        run = partial(parallax_decode, local_window_size=case.window, implementation=implementation)
        return jax.vjp(lambda *x: run(*x, **case.hidden()), q, r, k, v)[1](g)

    for got, expected in zip(gradients("xla"), gradients("reference"), strict=True):
        assert bool(jnp.isfinite(got).all())
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_mapped() -> None:
    """Over lengths and queries, the cache shared; the same as one by one."""
    q, k, v, _ = draw(Shape(2, 1, 70, 2, 1, 8, 4), "float64")
    queries, lengths = jnp.stack([q, 2 * q]), jnp.asarray([[60, 33], [10, 70]])
    run = partial(parallax_decode, implementation="xla")
    mapped = jax.vmap(run, in_axes=(0, 0, None, None, 0))(queries, queries, k, v, lengths)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], run(queries[i], queries[i], k, v, lengths[i]), atol=1e-13)


def test_refusals() -> None:
    q, cache = jnp.ones((1, 1, 2, 8), "float32"), jnp.ones((1, 9, 2, 8), "float32")
    with pytest.raises(ValueError, match=r"probe must have the query's shape, \(1, 1, 2, 8\), got \(1, 1, 2, 4\)"):
        parallax_decode(q, q[..., :4], cache, cache, 3)
    with pytest.raises(ValueError, match="lengths must lie between 0 and the cache's 9 positions, got 10 to 10"):
        parallax_decode(q, q, cache, cache, 10)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_cache_may_have_another_dtype(cache_dtype: str, implementation: Any) -> None:
    case = CASES["window"]
    q, k, v, _ = poisoned(case, "float32", cache_dtype=cache_dtype)
    r = draw_probe(draw(case.shape, "float32"))
    got = decoder(implementation, case.window)(q, r, k, v, case.hidden())
    assert got.dtype == jnp.float32
    assert worst_row(got, truth(q, r, k, v, case.visible())) <= 2e-5
