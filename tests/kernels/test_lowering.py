"""Lowers the kernels for CUDA on a host without a GPU: what jax-triton, JAX and Triton must agree on to launch them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flashlla_jax.kernels import plan as planning
from tests.cases import HIDDEN, Shape, draw, operate

_WITHOUT_PLUGIN = "jax-triton lowers with JAX's plugin only: pip install --no-deps jax-cuda13-plugin, JAX's version"
try:
    import jax_triton
    from jaxlib import gpu_triton
except ImportError:  # jax-triton 0.3
    pytest.skip(_WITHOUT_PLUGIN, allow_module_level=True)
if not hasattr(gpu_triton, "TritonKernel"):  # jax-triton 0.4 finds out when it lowers
    pytest.skip(_WITHOUT_PLUGIN, allow_module_level=True)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax-triton asks the GPU for its compute capability unless it is told one."""
    monkeypatch.setattr(jax_triton, "triton_call", partial(jax_triton.triton_call, compute_capability=90))


def arguments(shape: Shape, dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    lengths = ((shape.queries, shape.heads, shape.dim), (shape.keys, shape.kv_heads, shape.dim))
    lengths = (*lengths, (shape.keys, shape.kv_heads, shape.value_dim))
    ridge = jax.ShapeDtypeStruct(shape.ridge, jnp.float32)
    return (*(jax.ShapeDtypeStruct((shape.batch, *x), dtype) for x in lengths), ridge)


def attend(*args: jax.Array, only: Any = "triton", **hidden: Any) -> jax.Array:
    """On a Hopper GPU; by the kernels on any platform, or with ``only`` None by what fits the platform."""
    q, k, v, lam = args
    plan = planning.plan_for(q, v, jax.lax.Precision.DEFAULT, capability=90)
    return operate(q, k, v, ridge_lambda=lam, only=only, plan=plan, **hidden)


def forward(shape: Shape) -> Callable[..., Any]:
    return partial(attend, is_causal=shape.is_causal)


def with_gradients(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(*args: jax.Array) -> Any:
        o, vjp = jax.vjp(f, *args)
        return o, vjp(o)

    return run


def gradients(shape: Shape) -> Callable[..., Any]:
    return with_gradients(forward(shape))


def kernels(f: Callable[..., Any], *args: Any) -> int:
    """How many Triton kernels the program launches on CUDA."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@triton_kernel_call")


SMALL = Shape(queries=100, keys=130, heads=2, kv_heads=1, dim=24, value_dim=40)
# in float32 if nothing depends on the dtype: its kernels compile in half the time


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(batch=2, queries=256, keys=256, heads=4, kv_heads=2, dim=64, value_dim=64), "bfloat16"),
        (SMALL, "float32"),
        (Shape(queries=1, keys=1, is_causal=False), "float16"),
    ],
    ids=str,
)
def test_forward_and_backward(shape: Shape, dtype: str) -> None:
    args = arguments(shape, dtype)
    assert kernels(forward(shape), *args) == 1
    assert kernels(gradients(shape), *args) == 3


@pytest.mark.slow
def test_vmap_launches_no_more() -> None:
    args = [jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in arguments(SMALL, "float32")]
    assert kernels(jax.vmap(gradients(SMALL)), *args) == 3


@pytest.mark.slow
def test_checkpoint_repeats_the_forward_pass() -> None:
    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(forward(SMALL))(*args))

    assert kernels(jax.grad(loss, argnums=(0, 1, 2, 3)), *arguments(SMALL, "float32")) in (3, 4)


# Outputs and gradients of the implementation that is chosen when the program is lowered.
choice = with_gradients(partial(attend, only=None))


# What a launch depends on: whether there are starts, ids, a mask and of which axes, or arrays by batch entry.
WAYS = ("interleaved", "an offset for each", "all at once, scattered")


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_hiding_keys_launches_the_kernels(name: str) -> None:
    case = HIDDEN[name]
    hidden = case.given()
    types = (jax.typeof(jnp.asarray(x)) for x in jax.tree.leaves(hidden))
    types = jax.tree.unflatten(jax.tree.structure(hidden), (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types))

    def run(hidden: Any, *args: jax.Array) -> Any:
        attend_hidden = partial(attend, only=None, is_causal=case.shape.is_causal, **dict(case.static), **hidden)
        return with_gradients(attend_hidden)(*args)

    assert kernels(run, types, *arguments(case.shape, "float32")) == 3


@pytest.mark.slow
def test_one_program_lowers_to_the_kernels_on_cuda_and_to_none_elsewhere() -> None:
    traced = jax.jit(choice).trace(*arguments(SMALL, "float32"))
    cuda, cpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu"))
    assert cuda.count("@triton_kernel_call") == 3
    assert "while" not in cuda  # XLA's path loops; the kernels do so inside
    assert cpu.count("@triton_kernel_call") == 0
    both = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert both.count("@triton_kernel_call") == 3


@pytest.mark.slow
def test_the_choice_can_be_mapped() -> None:
    args = [jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in arguments(SMALL, "float32")]
    assert kernels(jax.vmap(choice), *args) == 3


def two_devices(kind: AxisType) -> Mesh:
    return jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices("cpu")[:2])


def batch_of_two(sharding: NamedSharding | None) -> list[jax.ShapeDtypeStruct]:
    given = arguments(SMALL, "float32")
    return [jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype, sharding=sharding) for x in given]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["triton", None])
@pytest.mark.parametrize("explicit", [True, False], ids=["explicit mesh", "shard_map"])
def test_every_device_launches_its_own(implementation: Any, explicit: bool) -> None:
    mesh = two_devices(AxisType.Explicit if explicit else AxisType.Auto)
    run = partial(attend, only=implementation)
    f = run if explicit else jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    args = batch_of_two(NamedSharding(mesh, P("x")) if explicit else None)
    text = jax.jit(with_gradients(f)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 3
    assert "all_gather" not in text


@pytest.mark.parametrize(
    ("length", "heads", "permutes"),
    [
        (100, (2, 1), 4),
        pytest.param(65536, (4, 2), 5, marks=pytest.mark.slow),
        pytest.param(131072, (4, 2), 6, marks=pytest.mark.slow),
    ],
    ids=["all heads at once", "backward in groups", "both in groups"],
)
def test_every_device_launches_its_own_for_all_keys(length: int, heads: tuple[int, int], permutes: int) -> None:
    """The length divided: keys and values are gathered for each pass, and their gradients scattered.

    In groups, all of it is in a loop except for the permutation of the intervals, once for each such pass.
    """
    mesh = two_devices(AxisType.Explicit)
    shape = dataclasses.replace(SMALL, queries=length, keys=length, heads=heads[0], kv_heads=heads[1])
    given = arguments(shape, "bfloat16")
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, "x"))) for x in given]
    text = jax.jit(with_gradients(attend)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 3
    sent = ("all_gather", "reduce_scatter", "collective_permute")
    assert [text.count(f'"stablehlo.{name}"') for name in sent] == [4, 2, permutes]


@pytest.mark.parametrize("implementation", ["triton", None])
def test_xla_is_told_how_to_divide_them(implementation: Any) -> None:
    """On a mesh with automatic axes; the launches appear when XLA has divided the program, which takes GPUs."""
    args = batch_of_two(NamedSharding(two_devices(AxisType.Auto), P("x")))
    traced = jax.jit(with_gradients(partial(attend, only=implementation))).trace(*args)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@CustomSPMDPartitioning") == 2
    if implementation is None:
        text = traced.lower(lowering_platforms=("cpu",)).as_text()
        assert text.count("@CustomSPMDPartitioning") == 2
        assert "triton" not in text


def test_second_derivatives_are_refused() -> None:
    def gradient(*args: jax.Array) -> Any:
        return choice(*args)[1]

    args = arguments(SMALL, "bfloat16")
    with pytest.raises(NotImplementedError, match=r"implementation='reference'"):
        jax.jit(lambda *x: jax.jvp(gradient, x, x)).trace(*args)


def test_an_empty_axis_can_be_mapped() -> None:
    args = [jax.ShapeDtypeStruct((0, *x.shape), x.dtype) for x in arguments(SMALL, "float32")]
    assert kernels(jax.vmap(gradients(SMALL)), *args) == 3


@pytest.mark.slow
def test_where_there_is_no_gpu_the_choice_is_the_xla_path() -> None:
    inputs = draw(SMALL, "float32")
    args = (*inputs[:3], jnp.full(SMALL.ridge, 0.5, jnp.float32))
    for got, expected in zip(
        jax.tree.leaves(jax.jit(choice)(*args)),
        jax.tree.leaves(jax.jit(with_gradients(partial(attend, only="xla")))(*args)),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-5, atol=1e-6)
