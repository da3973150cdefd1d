"""Lowers Parallax for CUDA on a host without a GPU, as test_kernels_lowering.py does LLA."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flashlla_jax.attention
from flashlla_jax import parallax_attention, parallax_decode
from tests.kernels.test_lowering import SMALL, _hopper, arguments, kernels, with_gradients

pytestmark = pytest.mark.slow

assert _hopper  # the fixture


@pytest.fixture(autouse=True)
def _beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashlla_jax.attention, "_no_triton", lambda: None)


def given(dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    q, k, v, _ = arguments(SMALL, dtype)
    return q, q, k, v


@pytest.mark.parametrize("implementation", ["triton", None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_and_backward(dtype: str, implementation: Any) -> None:
    attend = partial(parallax_attention, implementation=implementation)
    assert kernels(attend, *given(dtype)) == 1
    assert kernels(with_gradients(attend), *given(dtype)) == 3


def test_vmap_launches_no_more() -> None:
    args = [jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in given("bfloat16")]
    assert kernels(jax.vmap(with_gradients(parallax_attention)), *args) == 3


def test_one_program_lowers_to_none_elsewhere() -> None:
    traced = jax.jit(with_gradients(parallax_attention)).trace(*given("bfloat16"))
    cuda, cpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu"))
    assert cuda.count("@triton_kernel_call") == 3
    assert cpu.count("@triton_kernel_call") == 0


@pytest.mark.parametrize("implementation", ["triton", None])
def test_a_step_is_two_launches(implementation: Any) -> None:
    q, r, k, v = (jax.ShapeDtypeStruct((2, n, h, 32), "bfloat16") for n, h in ((1, 4), (1, 4), (2048, 2), (2048, 2)))
    step = partial(parallax_decode, implementation=implementation)
    assert kernels(step, q, r, k, v, jax.ShapeDtypeStruct((2,), jnp.int32)) == 2
