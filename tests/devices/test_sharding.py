"""Calls on two devices: inside ``jax.shard_map``, on a mesh with explicit axes, and on one whose axes JAX places.

The length divided is ``test_context_parallel.py``'s.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashlla_jax import blockwise, lla_attention, lla_decode
from flashlla_jax.arguments import Implementation
from flashlla_jax.interface import Options
from flashlla_jax.kernels import passes
from tests.cases import Shape, draw, operate
from tests.devices.meshes import assert_alike, collectives, mesh

SHAPE = Shape(batch=2, queries=12, keys=20, heads=4, kv_heads=2, dim=8, value_dim=12)
BATCH, HEADS = P("x"), P(None, None, "x")
LENGTHS = jnp.array([20, 13])
PADDED = jnp.arange(20)[None, None, None] < LENGTHS[:, None, None, None]
SEGMENTS = jnp.sort(jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 20))), axis=1)
PER_HEAD = jnp.asarray(np.random.default_rng(1).random((2, 4, 1, 20)) < 0.7)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"is_causal": False, "ridge_lambda": jnp.array([0.5, 1.0, 2.0, 4.0])},
    "jacobi": {"cg_use_preconditioner": True},
    "window": {"local_window_size": 3, "is_causal": False},
    "mask": {"mask": PADDED},
    "lengths": {"key_value_seq_lengths": LENGTHS},
    "packed": {"segment_ids": (SEGMENTS[:, :12], SEGMENTS), "local_window_size": 15},
    "offsets": {"query_offset": jnp.array([3, 8]), "mask": PER_HEAD},
}


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    return draw(SHAPE, "float32")[:3]


def loss(o: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(o))


def value_and_gradients(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    o = attend(q, k, v)
    return o, jax.grad(lambda *qkv: loss(attend(*qkv)), argnums=(0, 1, 2))(q, k, v)


def on_one_device(attend: Any) -> Any:
    return jax.jit(partial(value_and_gradients, attend))(*arrays())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "implementation", "jit", "spec"),
    [
        *(("full", "xla", True, spec) for spec in (BATCH, HEADS)),
        *(("mask", "xla", True, spec) for spec in (BATCH, HEADS)),
        ("packed", "xla", True, BATCH),
        ("offsets", "xla", True, HEADS),
        ("mask", "reference", True, HEADS),
        ("full", "xla", False, BATCH),
    ],
)
def test_explicit_mesh(case: str, spec: P, implementation: Implementation, jit: bool) -> None:
    """The output lies as the query does, and no argument but the arrays has to be placed."""

    def attend(*qkv: jax.Array) -> jax.Array:
        return lla_attention(*qkv, implementation=implementation, **CASES[case])

    q, k, v = arrays()
    on = mesh(AxisType.Explicit)
    placed = [jax.device_put(x, NamedSharding(on, spec)) for x in (q, k, v)]
    run = partial(value_and_gradients, attend)
    if jit:
        run = jax.jit(run).lower(*placed).compile()
        assert not collectives(run)
        o, gradients = run(*placed)
    else:
        with jax.set_mesh(on):  # JAX's own eager gradients ask for it
            o, gradients = run(*placed)
    for x, like in zip((o, *gradients), (placed[0], *placed), strict=True):
        assert jax.typeof(x).sharding.spec == jax.typeof(like).sharding.spec
    assert_alike((o, gradients), on_one_device(attend))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "spec", "check_vma"),
    [
        ("plain", BATCH, True),
        ("plain", HEADS, True),
        ("plain", BATCH, False),
        ("jacobi", HEADS, True),
        ("window", BATCH, True),
        ("window", HEADS, False),
    ],
)
def test_shard_map(case: str, spec: P, check_vma: bool) -> None:
    def attend(*qkv: jax.Array) -> jax.Array:
        return lla_attention(*qkv, implementation="xla", **CASES[case])

    sharded = jax.shard_map(attend, mesh=mesh(AxisType.Auto), in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma)
    placed = [jax.device_put(x, NamedSharding(mesh(AxisType.Auto), spec)) for x in arrays()]
    run = jax.jit(partial(value_and_gradients, sharded)).lower(*placed).compile()
    assert not collectives(run)
    assert_alike(run(*placed), on_one_device(attend))


@pytest.mark.slow
def test_shard_map_with_replicated_keys_and_ridge() -> None:
    """What only some arguments vary over: the gradients of the others are summed over the devices."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, lam: jax.Array) -> jax.Array:
        return lla_attention(q, k, v, ridge_lambda=lam, is_causal=False, implementation="xla")

    sharded = jax.shard_map(
        attend, mesh=mesh(AxisType.Auto), in_specs=(P(None, "x"), P(), P(), P()), out_specs=P(None, "x")
    )
    args = (*arrays(), jnp.array(0.7))
    got, expected = (jax.grad(lambda *a, f=f: loss(f(*a)), argnums=(0, 1, 2, 3))(*args) for f in (sharded, attend))
    assert_alike(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [BATCH, HEADS, P(None, None, None, "x")], ids=str)
def test_automatic_mesh(spec: P) -> None:
    def attend(*qkv: jax.Array) -> jax.Array:
        return lla_attention(*qkv, implementation="xla")

    q, k, v = arrays()
    placed = [jax.device_put(x, NamedSharding(mesh(AxisType.Auto), spec)) for x in (q, k, v)]
    run = jax.jit(partial(value_and_gradients, attend)).lower(*placed).compile()
    assert bool(collectives(run)) == (spec not in (BATCH, HEADS))
    assert_alike(run(*placed), on_one_device(attend))


Shapes = list[tuple[tuple[int, ...], ...]]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """The XLA path in place of the kernels. Yields the shapes that it is given."""
    given: Shapes = []

    def forward(q: Any, k: Any, v: Any, lam: Any, seen: Any, options: Options, plan: Any) -> Any:
        given.append((q.shape, k.shape, seen.start.shape))
        return blockwise.forward(q, k, v, lam, seen, options)

    def backward(q: Any, k: Any, v: Any, lam: Any, seen: Any, saved: Any, g: Any, options: Options, plan: Any) -> Any:
        given.append((q.shape, k.shape, seen.start.shape))
        return blockwise.backward(q, k, v, lam, seen, saved, g, options)

    monkeypatch.setattr(passes, "forward", forward)
    monkeypatch.setattr(passes, "backward", backward)
    return given


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "kv_heads", "local", "case"),
    [
        *((BATCH, 2, ((1, 12, 4, 8), (1, 20, 2, 8)), case) for case in ("plain", "mask", "lengths")),
        *((HEADS, 2, ((2, 12, 2, 8), (2, 20, 1, 8)), case) for case in ("plain", "mask")),
        (HEADS, 4, ((2, 12, 2, 8), (2, 20, 2, 8)), "plain"),
        (HEADS, 1, ((2, 12, 4, 8), (2, 20, 1, 8)), "plain"),  # one key head: every device computes all
        (P(None, "x"), 2, ((2, 6, 4, 8), (2, 20, 2, 8)), "plain"),  # of all keys
    ],
    ids=str,
)
def test_kernels_on_an_automatic_mesh(case: str, spec: P, kv_heads: int, local: Any, stand_ins: Shapes) -> None:
    """XLA cannot see into the kernels: it is told that batch, heads and length may be divided, and does so."""
    plan = object()  # a plan of this test's own: what was traced with another one is not looked at
    hidden = CASES[case]

    def attend(*qkv: jax.Array) -> jax.Array:
        return operate(*qkv, only="triton", plan=plan, **hidden)

    inputs = draw(dataclasses.replace(SHAPE, kv_heads=kv_heads), "float32")[:3]
    on = mesh(AxisType.Auto)
    by = [spec, P() if kv_heads == 1 else spec, P() if kv_heads == 1 else spec]
    placed = [jax.device_put(x, NamedSharding(on, s)) for x, s in zip(inputs, by, strict=True)]
    lowered = jax.jit(lambda *qkv: value_and_gradients(attend, *qkv)).lower(*placed)
    stand_ins.clear()
    run = lowered.compile()
    intervals = 1 if case == "plain" else local[0][0]  # as the batch is divided, so are its intervals
    assert set(stand_ins) == {(*local, (intervals, local[0][1]))}
    divided = local != ((2, 12, 4, 8), (2, 20, kv_heads, 8))
    if divided and spec != P(None, "x"):
        assert not collectives(run)
    got = run(*placed)
    if divided:
        assert all(x.sharding == y.sharding for x, y in zip((got[0], *got[1]), (placed[0], *placed), strict=True))
    xla = partial(lla_attention, implementation="xla", **hidden)
    assert_alike(got, jax.jit(partial(value_and_gradients, xla))(*inputs))


def test_refusals() -> None:
    wide = P(None, None, None, "x")
    q, k, v = (jax.device_put(x, NamedSharding(mesh(AxisType.Explicit), wide)) for x in arrays())
    with pytest.raises(NotImplementedError, match=r"query is sharded along its head dimension \(mesh axis 'x'\)"):
        lla_attention(q, k, v)
    given = (arrays()[0][:, :4], *arrays()[1:])
    query, k, v = (jax.device_put(x, NamedSharding(mesh(AxisType.Explicit), P(None, "x"))) for x in given)
    with pytest.raises(NotImplementedError, match=r"query is sharded along its length \(mesh axis 'x'\)"):
        lla_decode(query, k, v, 20)


def test_too_few_key_heads() -> None:
    q, k, v = arrays()
    placed = jax.device_put(q, NamedSharding(mesh(AxisType.Explicit), HEADS))
    with pytest.raises(NotImplementedError, match=r"key/value heads must divide evenly among the 2 shards .* got 1"):
        lla_attention(placed, k[:, :, :1], v[:, :, :1])
