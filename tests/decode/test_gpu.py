"""A decode step by Triton kernels on an NVIDIA GPU: ``pytest -m gpu``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import lla_attention, lla_decode
from tests.cases import KINDS, Shape, draw, relative_error
from tests.decode.decode_tests import Case, DecodeTests, decoder, poisoned, truth, worst_row

pytestmark = pytest.mark.gpu


class TestTriton(DecodeTests):
    """float32 at HIGHEST."""

    implementation = "triton"

    @pytest.fixture(autouse=True)
    def exact_float32(self) -> Any:
        with jax.default_matmul_precision("highest"):
            yield


SHAPES = (
    Shape(2, 1, 1000, 4, 2, 64, 64),
    Shape(1, 3, 1500, 4, 4, 128, 128),
    Shape(1, 1, 300, 2, 1, 256, 200),
    Shape(1, 8, 500, 2, 2, 24, 80),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ridge", [10.0, 1.0, 0.1])
def test_bfloat16_accuracy(shape: Shape, kind: str, ridge: float) -> None:
    """The promise: 5e-3 for every kind of keys and lambda >= 0.1, norm-wise as softmax attention's error is."""
    case = Case(shape, [shape.keys - 7 * b for b in range(shape.batch)])
    q, k, v, _ = poisoned(case, "bfloat16", kind)
    lam = jnp.full(shape.ridge, ridge, jnp.float32)
    got = decoder("triton", None)(q, k, v, lam, case.hidden())
    expected = truth(q, k, v, float(lam[0, 0, 0]), case.visible())
    assert relative_error(got, jnp.asarray(expected)) <= 5e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["default", "highest"])
def test_float32_accuracy(kind: str, precision: str) -> None:
    shape = Shape(2, 1, 1000, 4, 2, 64, 64)
    case = Case(shape, [1000, 500])
    q, k, v, _ = poisoned(case, "float32", kind)
    lam = jnp.full(shape.ridge, 1.0, jnp.float32)
    with jax.default_matmul_precision(precision):
        got = lla_decode(q, k, v, jnp.asarray([1000, 500]), ridge_lambda=lam, implementation="triton")
    # the condition is some ten here, a hundred for peaky keys
    assert worst_row(got, truth(q, k, v, 1.0, case.visible())) <= 1e-4


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_the_cache_may_have_another_dtype(cache_dtype: str) -> None:
    shape = Shape(2, 1, 1000, 4, 2, 64, 64)
    case = Case(shape, [1000, 500])
    q, k, v, _ = poisoned(case, "float32", cache_dtype=cache_dtype)
    lam = jnp.full(shape.ridge, 1.0, jnp.float32)
    got = decoder("triton", None)(q, k, v, lam, case.hidden())
    # weighted keys are hi + lo halves of bfloat16, 2^-17
    assert worst_row(got, truth(q, k, v, 1.0, case.visible())) <= 5e-4


def test_it_is_causal_attention() -> None:
    q, k, v, _ = draw(Shape(1, 512, 512, 4, 2, 64, 64), "bfloat16")
    full = lla_attention(q, k, v, ridge_lambda=1.0, implementation="triton", precision="high")
    for length in (1, 2, 100, 512):
        step = lla_decode(q[:, length - 1 : length], k, v, length, ridge_lambda=1.0, implementation="triton")
        assert relative_error(step, full[:, length - 1 : length]) <= 1e-2  # the rounding of both


def test_none_is_triton_and_its_gradient_is_xla_s() -> None:
    q, k, v, g = draw(Shape(2, 2, 300, 4, 2, 32, 32), "float32")

    def run(implementation: Any) -> Any:
        def decode(q: Any, k: Any, v: Any) -> Any:
            return lla_decode(q, k, v, jnp.asarray([300, 40]), ridge_lambda=0.5, implementation=implementation)

        o, vjp = jax.vjp(decode, q, k, v)
        return o, *vjp(g)

    chosen, named, other = (jax.jit(run, static_argnums=0)(name) for name in (None, "triton", "xla"))
    for x, y, z in zip(chosen, named, other, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert relative_error(x, z) <= 1e-4


def test_repeatable_and_mapped() -> None:
    q, k, v, _ = draw(Shape(2, 1, 5000, 8, 2, 64, 64), "bfloat16")
    first, second = (lla_decode(q, k, v, 4999, implementation="triton") for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    mapped = jax.vmap(lambda q: lla_decode(q, k, v, 4999, implementation="triton"))(jnp.stack([2 * q, q]))
    assert relative_error(mapped[1], first) <= 5e-3  # other splits
