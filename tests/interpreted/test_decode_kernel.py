"""The kernels of a decode step in Triton's interpreter. Run as test_kernels.py is."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

import flashlla_jax.attention
from flashlla_jax.kernels import decode_call
from flashlla_jax.kernels import launch as launching
from flashlla_jax.kernels.decode_call import DecodeLaunch
from tests.cases import KINDS, Shape
from tests.decode import decode_tests
from tests.decode.decode_tests import Case, DecodeTests, worst_row
from tests.interpreted import harness

SMALL = Shape(1, 1, 70, 2, 1, 8, 12)


@pytest.fixture(autouse=True, scope="module")
def _interpreting() -> Iterator[None]:
    """Small blocks, so that the cases have several splits of several blocks, and chunks of features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "call", harness.call)
        patch.setattr(flashlla_jax.attention, "_no_triton", lambda: None)
        small = {64: DecodeLaunch(16, 16, 4, 1)}
        patch.setattr(decode_call, "_MOMENTS", {80: {2: small, 4: small}})
        patch.setattr(decode_call, "_BLOCKS_PER_SPLIT", 2)
        jax.clear_caches()
        decode_tests.decoder.cache_clear()
        yield
        jax.clear_caches()
        decode_tests.decoder.cache_clear()


class TestDecodeKernel(DecodeTests):
    implementation = "triton"
    # the interpreter's time goes by programs
    names = ("lengths below T", "starts", "window", "mask", "mask of three axes", "mask of the heads", "one key")
    accuracy_shape = SMALL


def test_chunks_of_features_and_splits_without_keys() -> None:
    """D = 40 in four chunks of 16; a row of three keys leaves splits empty."""
    case = Case(Shape(2, 1, 100, 2, 1, 40, 24), [3, 90])
    test = TestDecodeKernel()
    got, expected = test.compare(case)
    assert worst_row(got, expected) <= 2e-5


def test_one_key_holds_nearly_all_the_weight() -> None:
    """Its square is a thousand times the ridge. Relative to the first key, a row was off by 2e-4."""
    test = TestDecodeKernel()
    got, expected = test.compare(Case(decode_tests.SHAPE, [60, 33]), 0.1, "heavy_tailed")
    assert worst_row(got, expected) <= test.bound("heavy_tailed", 0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [10.0, 0.1])
def test_halves(kind: str, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of 16-bit operands, in float16: the interpreter takes bfloat16's bits for integers."""

    def narrow(*args: object) -> decode_call.DecodePlan:
        return plan_for(*args)._replace(upcast=False)  # type: ignore[arg-type]

    plan_for = decode_call.plan_for
    monkeypatch.setattr(decode_call, "plan_for", narrow)
    jax.clear_caches()
    decode_tests.decoder.cache_clear()
    test = TestDecodeKernel()
    test.dtype = "float16"
    got, expected = test.compare(Case(SMALL, [60]), ridge, kind)
    # the output's own rounding to float16, 5e-4, and as much again
    assert worst_row(got, expected) <= 1e-3
