"""Parallax's kernels in Triton's interpreter, against the float64 reference; see test_kernels.py.

Started by tests/test_interpreted.py, in a process of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flashlla_jax import parallax_attention
from flashlla_jax.kernels.plan import Launch
from tests.cases import HIDDEN, KINDS, Hidden, Shape, draw, relative_error
from tests.interpreted.test_kernels import TILES, interpreting, narrow
from tests.parallax_tests import NAMES, ParallaxTests, draw_probe, evaluate, outputs_and_gradients, truth

SMALL = Shape(1, 70, 70, 2, 1, 16, 16)


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    outputs_and_gradients.cache_clear()
    yield
    outputs_and_gradients.cache_clear()


@pytest.fixture(autouse=True, scope="class")
def _interpreting(request: pytest.FixtureRequest) -> Iterator[None]:
    """For the class; a function says for itself."""
    if request.cls is None:
        yield
        return
    with interpreting(TILES):
        yield


class TestParallaxKernels(ParallaxTests):
    """Products of float32 are exact to float32 in the interpreter whatever the precision."""

    implementation = "triton"
    dtypes = ("float32",)
    shapes = (
        Shape(queries=1, keys=1),
        Shape(queries=37, keys=70, heads=2, kv_heads=1, dim=24, value_dim=12),
        Shape(batch=2, queries=33, keys=20, heads=2, kv_heads=2, dim=16, value_dim=40, is_causal=False),
    )
    kind_shapes = (SMALL,)
    # one of each code path: ids, edges on both sides by batch entry, a mask of every head
    hidden = ("interleaved", "an offset for each", "mask")
    length = 70

    def bound(self, dtype: str, name: str) -> float:
        return 2e-5  # the promise for float32

    def hidden_case(self, name: str) -> Hidden:
        case = HIDDEN[name]
        shape = dataclasses.replace(case.shape, queries=case.shape.queries // 2, keys=case.shape.keys // 2)
        return dataclasses.replace(case, shape=shape)


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_huge_logits(precision: str) -> None:
    """Logits of 100 and k.r of 10: in EXACT arithmetic the normaliser is two numbers; the other is off by 1e-5."""
    inputs = draw(SMALL, "float32")
    inputs = inputs._replace(q=20 * inputs.q, k=10 * inputs.k)
    probe = draw_probe(inputs)
    with interpreting(TILES) as launches:
        outputs_and_gradients.cache_clear()
        got = evaluate(inputs, probe, implementation="triton", precision=precision)
    assert {launch["EXACT"] for launch in launches} == {precision == "highest"}
    expected = truth(inputs, probe)
    assert max(relative_error(got[name], expected[name]) for name in NAMES) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [TILES, Launch(16, 32, 4, 1)], ids=str)
def test_16_bit_operands(kind: str, tiles: Launch) -> None:
    """bfloat16's path, in float16, whose roundings are an eighth.

    The promise for bfloat16 is 3e-3 of o and 4e-3 of gradients for 512 keys of 64 features. The sums of so few numbers
    as here average less of the rounding: half as much again.
    """
    inputs = draw(SMALL, "float16", kind)
    probe = draw_probe(inputs)
    with interpreting(tiles, narrow(hard_below=0.0, last_above=0.0, balanced_above=float("inf"))) as launches:
        outputs_and_gradients.cache_clear()
        got = evaluate(inputs, probe, implementation="triton")
    assert not any(launch["UPCAST"] for launch in launches)
    expected = truth(inputs, probe)
    errors = {name: 8 * relative_error(got[name], expected[name]) for name in NAMES}
    assert errors["o"] <= 3e-3, errors
    assert max(errors.values()) <= 6e-3, errors


def test_mapped() -> None:
    """vmap folds into the batch, with one set of keys for all."""
    inputs = draw(SMALL, "float32")
    probe = draw_probe(inputs)

    def attend(q: jax.Array, r: jax.Array) -> Any:
        return parallax_attention(q, r, *inputs[1:3], implementation="triton")

    with interpreting(TILES):
        outputs_and_gradients.cache_clear()
        mapped = jax.vmap(attend)(jnp.stack([inputs.q, 2 * inputs.q]), jnp.stack([probe, probe]))
        alone = attend(2 * inputs.q, probe)
    assert relative_error(mapped[1], alone) == 0
