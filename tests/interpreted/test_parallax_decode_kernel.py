"""A decode step of Parallax in Triton's interpreter. Run as test_kernels.py is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest

import flashlla_jax.attention
from flashlla_jax.kernels import decode_call, parallax_decode_call
from flashlla_jax.kernels import launch as launching
from flashlla_jax.kernels.decode_call import DecodeLaunch, DecodePlan
from tests.cases import KINDS, Shape, draw
from tests.decode import parallax_decode_tests
from tests.decode.decode_tests import Case, poisoned, worst_row
from tests.decode.parallax_decode_tests import ParallaxDecodeTests
from tests.interpreted import harness
from tests.parallax_tests import draw_probe


@pytest.fixture(autouse=True, scope="module")
def _interpreting() -> Iterator[None]:
    """Small blocks, so that the cases have several splits of several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "call", harness.call)
        patch.setattr(flashlla_jax.attention, "_no_triton", lambda: None)
        small = {64: DecodeLaunch(16, 0, 4, 1)}
        patch.setattr(parallax_decode_call, "_GATHER", {2: small, 4: small})
        patch.setattr(decode_call, "_BLOCKS_PER_SPLIT", 2)
        jax.clear_caches()
        parallax_decode_tests.decoder.cache_clear()
        yield
        jax.clear_caches()
        parallax_decode_tests.decoder.cache_clear()


class TestParallaxDecodeKernel(ParallaxDecodeTests):
    implementation = "triton"
    names = ("lengths below T", "starts", "window", "mask", "mask of the heads", "one key")
    accuracy_shape = Shape(1, 1, 70, 2, 1, 8, 12)


def test_more_splits_than_are_merged_at_once() -> None:
    """18 of them, of which a row of three keys leaves most empty."""
    case = Case(Shape(2, 1, 570, 2, 1, 8, 12), [3, 560])
    test = TestParallaxDecodeKernel()
    got, expected = test.compare(case)
    assert worst_row(got, expected) <= test.bound("iid")


@pytest.mark.parametrize("kind", KINDS)
def test_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of 16-bit operands, in float16: the interpreter takes bfloat16's bits for integers.

    A float32 query shows what the parts of query, probe and weights leave out, which is less than a float16 rounds.
    """

    def narrow(*args: Any) -> DecodePlan:
        return plan_for(*args)._replace(upcast=False)

    plan_for = parallax_decode_call.plan_for
    monkeypatch.setattr(parallax_decode_call, "plan_for", narrow)
    jax.clear_caches()
    parallax_decode_tests.decoder.cache_clear()
    case = Case(TestParallaxDecodeKernel.accuracy_shape, [60])
    q, k, v, _ = poisoned(case, "float32", kind, cache_dtype="float16")
    r = draw_probe(draw(case.shape, "float32"))
    got = parallax_decode_tests.decoder("triton", None)(q, r, k, v, case.hidden())
    assert worst_row(got, parallax_decode_tests.truth(q, r, k, v, case.visible())) <= 2e-5
