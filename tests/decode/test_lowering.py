"""Lowers a decode step for CUDA on a host without a GPU: two kernels, and the XLA path for every other platform."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashlla_jax.attention
from flashlla_jax import lla_decode
from tests.cases import Shape
from tests.kernels.test_lowering import (
    _hopper,  # noqa: F401 (a fixture)
    kernels,
    two_devices,
)

SMALL = Shape(batch=2, queries=2, keys=300, heads=4, kv_heads=2, dim=24, value_dim=40)


@pytest.fixture(autouse=True)
def _beside_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashlla_jax.attention, "_no_triton", lambda: None)
        jax.clear_caches()
        yield
        jax.clear_caches()


def arguments(dtype: str = "bfloat16", cache_dtype: str | None = None, **sharding: Any) -> list[jax.ShapeDtypeStruct]:
    s = SMALL
    cache = cache_dtype or dtype
    return [
        jax.ShapeDtypeStruct((s.batch, s.queries, s.heads, s.dim), dtype, **sharding),
        jax.ShapeDtypeStruct((s.batch, s.keys, s.kv_heads, s.dim), cache, **sharding),
        jax.ShapeDtypeStruct((s.batch, s.keys, s.kv_heads, s.value_dim), cache, **sharding),
        jax.ShapeDtypeStruct((s.batch,), jnp.int32),
    ]


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("bfloat16", None), ("float32", None), ("float32", "float8_e4m3fn"), ("bfloat16", "float8_e5m2")],
)
@pytest.mark.parametrize("implementation", ["triton", None])
def test_two_kernels(dtype: str, cache_dtype: str | None, implementation: Any) -> None:
    run = partial(lla_decode, implementation=implementation)
    assert kernels(run, *arguments(dtype, cache_dtype)) == 2


@pytest.mark.slow
def test_of_every_way_of_hiding_keys() -> None:
    def run(q: Any, k: Any, v: Any, lengths: Any, mask: Any) -> Any:
        return lla_decode(q, k, v, lengths, starts=lengths - 9, mask=mask, local_window_size=100)

    for shape in ((2, 4, 2, 300), (1, 1, 1, 300), (2, 2, 300)):
        assert kernels(run, *arguments(), jax.ShapeDtypeStruct(shape, jnp.bool_)) == 2


def test_one_program_for_every_platform() -> None:
    traced = jax.jit(lla_decode).trace(*arguments())
    cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert cpu.count("@triton_kernel_call") == 0
    cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert cuda.count("@triton_kernel_call") == 2
    assert "while" not in cuda  # XLA's path loops


def test_the_gradient_is_xla_s() -> None:
    def loss(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return jnp.sum(lla_decode(q, k, v, lengths).astype(jnp.float32))

    assert kernels(jax.value_and_grad(loss, argnums=(0, 1, 2)), *arguments()) == 2


def test_mapped() -> None:
    args = [jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in arguments()]
    assert kernels(jax.vmap(lla_decode), *args) == 2


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit mesh", "shard_map"])
def test_every_device_launches_its_own(explicit: bool) -> None:
    mesh = two_devices(AxisType.Explicit if explicit else AxisType.Auto)
    args = arguments(sharding=NamedSharding(mesh, P("x"))) if explicit else arguments()
    f = lla_decode if explicit else jax.shard_map(lla_decode, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 2
    assert "all_gather" not in text


def test_xla_is_told_how_to_divide_them() -> None:
    mesh = two_devices(AxisType.Auto)
    traced = jax.jit(lla_decode).trace(*arguments(sharding=NamedSharding(mesh, P("x"))))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@CustomSPMDPartitioning") == 1
