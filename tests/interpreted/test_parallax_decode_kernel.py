"""A decode step of Parallax in Triton's interpreter. Started by tests/test_interpreted.py."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

import flashlla_jax.attention
from flashlla_jax.kernels import launch as launching
from flashlla_jax.kernels import parallax_decode_call
from flashlla_jax.kernels.plan import Launch
from tests.cases import Shape
from tests.decode import parallax_decode_tests
from tests.decode.parallax_decode_tests import ParallaxDecodeTests
from tests.interpreted import harness


@pytest.fixture(autouse=True, scope="module")
def _interpreting() -> Iterator[None]:
    """Small tiles and parts, so that the cases have several of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "call", harness.call)
        patch.setattr(flashlla_jax.attention, "_no_triton", lambda: None)
        small = dict.fromkeys((64, 128, 256), Launch(16, 16, 4, 1))
        patch.setattr(parallax_decode_call, "_LAUNCHES", {2: small, 4: small})
        patch.setattr(parallax_decode_call, "_LEAST_KEYS", 30)
        jax.clear_caches()
        parallax_decode_tests.decoder.cache_clear()
        yield
        jax.clear_caches()
        parallax_decode_tests.decoder.cache_clear()


class TestParallaxDecodeKernel(ParallaxDecodeTests):
    implementation = "triton"
    names = ("lengths below T", "starts", "window", "mask", "mask of the heads", "one key")
    accuracy_shape = Shape(1, 1, 70, 2, 1, 8, 12)
