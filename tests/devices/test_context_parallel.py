"""The length divided among devices: what each computes is what one would, and no more is sent than has to be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashlla_jax import context_parallel, lla_attention
from flashlla_jax.context_parallel import groups_of_heads, over_length
from flashlla_jax.visibility import Visibility
from tests.cases import Shape, draw
from tests.devices.meshes import WAYS, assert_alike, attending, collectives, compiled, mesh, output_and_gradients

SHAPE = Shape(batch=2, queries=32, keys=32, heads=4, kv_heads=2, dim=8, value_dim=12)
_RNG = np.random.default_rng(0)
_SCATTERED = {
    "segment_ids": _RNG.integers(0, 3, (2, 32)),
    "key_value_seq_lengths": np.array([32, 19]),
    "query_seq_lengths": np.array([27, 32]),
    "query_offset": np.int32(-2),
    "mask": _RNG.random((2, 1, 32, 32)) < 0.7,
}
# arrays that hide keys, and what is known of them when the call is traced
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "packed": ({"segment_ids": np.sort(_RNG.integers(0, 4, (2, 32)), axis=1)}, {}),
    "window": ({}, {"local_window_size": (9, 2), "is_causal": False}),
    "all at once": (_SCATTERED, {}),
}


def given(shape: Shape = SHAPE) -> list[jax.Array]:
    """q, k, v, the ridge and the cotangent."""
    q, k, v, g = draw(shape, "float32")
    lam = np.random.default_rng(1).uniform(0.5, 2, shape.ridge)
    return [q, k, v, jnp.asarray(lam, jnp.float32), g]


@cache
def on_one_device(case: str) -> Any:
    hidden, static = CASES[case]
    attend = attending(**static)
    return jax.jit(partial(output_and_gradients, attend))(jax.tree.map(jnp.asarray, hidden), *given())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "way"),
    [
        *(("plain", way) for way in WAYS),
        ("packed", "automatic"),
        ("window", "shard_map"),
        ("all at once", "shard_map"),
        ("all at once", "explicit"),
    ],
)
def test_equals_one_device(case: str, way: str) -> None:
    hidden, static = CASES[case]
    run, arrays = compiled(way, {"x": 2}, hidden, static, given(), length="x")
    got = run(*arrays)
    assert_alike(got, on_one_device(case))
    o, residuals, (dq, dk, dv, dlam) = got
    for x in (o, *residuals, dq, dk, dv, dlam):
        assert x.sharding.shard_shape(x.shape)[1] == 16  # it lies as the length does

    sent = collectives(run)
    keys = {"all-gather f32[2,32,2,8]", "all-gather f32[2,32,2,12]"}
    scattered = {"reduce-scatter f32[2,16,2,8]", "reduce-scatter f32[2,16,2,12]"}
    # XLA sees of shard_map that the keys of the backward pass are those of the forward pass; the partitions it cannot
    assert {name: sent.pop(name) for name in keys} == dict.fromkeys(keys, 2 if way == "automatic" else 1)
    assert {name: sent.pop(name) for name in scattered} == dict.fromkeys(scattered, 1)
    # of two devices one half-chunk each, there and back, forward and backward: all arrays of it at once
    halves = [name for name in sent.elements() if name.startswith("collective-permute u")]
    assert len([name for name in halves if "[2,8," in name]) == (0 if case == "window" else 4)
    # what is left are integers and booleans, of the visibility
    assert not [name for name in sent - Counter(halves) if re.search(r" (f|bf|u32\[2,)", name)]


IN_GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "packed": CASES["packed"],
    "a mask of each head": ({"mask": _RNG.random((1, 4, 32, 32)) < 0.7}, {}),
    "Parallax": ({}, {"parallax": True}),
}


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SHAPE has 128 rows a device: its two key heads are taken one after another then, in both passes."""
    jax.clear_caches()  # of the sizes that are traced
    for name in ("_ROWS_OF_A_GROUP", "_ROWS_OF_FEW_KEYS"):
        monkeypatch.setattr(context_parallel, name, 32)
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(
    ("case", "way"),
    [
        *(("plain", way) for way in WAYS),
        ("packed", "automatic"),
        ("a mask of each head", "shard_map"),
        ("Parallax", "automatic"),
    ],
)
def test_heads_in_groups(case: str, way: str) -> None:
    hidden, static = IN_GROUPS[case]
    q, k, v, own, g = given()
    if case == "Parallax":
        own = 0.1 * q
    run, arrays = compiled(way, {"x": 2}, hidden, static, [q, k, v, own, g], length="x")
    one = jax.jit(partial(output_and_gradients, attending(**static)))
    assert_alike(run(*arrays), one(jax.tree.map(jnp.asarray, hidden), q, k, v, own, g))

    sent = collectives(run)
    wide = {name: n for name, n in sent.items() if re.fullmatch(r"(all-gather|reduce-scatter) f32\[2,.*,.*,.*\]", name)}
    halves = {f"all-gather f32[2,32,1,{dim}]": 2 for dim in (8, 12)}  # in the loops of both passes
    assert wide == halves | {f"reduce-scatter f32[2,16,1,{dim}]": 1 for dim in (8, 12)}


@pytest.mark.parametrize(
    ("query", "kv_heads", "groups", "forward", "of_few_keys"),
    [
        ((1, 8192, 8, 64), 8, 1, 1, 1),
        ((1, 16384, 8, 64), 8, 2, 1, 1),
        ((4, 4096, 8, 64), 8, 2, 1, 1),
        ((1, 65536, 8, 64), 8, 8, 4, 2),
        ((1, 65536, 8, 64), 1, 1, 1, 1),
        ((1, 65536, 6, 64), 6, 6, 3, 1),
        ((1, 43691, 6, 64), 6, 3, 2, 1),
        ((1, 8, 8, 64), 8, 1, 1, 1),
    ],
    ids=str,
)
def test_groups_leave_enough_to_do(
    query: tuple[int, ...], kv_heads: int, groups: int, forward: int, of_few_keys: int
) -> None:
    key = (query[0], 2 * query[1], kv_heads, query[3])
    number = partial(groups_of_heads, *(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (query, key)))
    assert number(few_keys=False, backward=True) == groups
    assert number(few_keys=False, backward=False) == forward
    assert number(few_keys=True, backward=True) == of_few_keys


@pytest.mark.parametrize(
    ("query", "key", "kind"),
    [
        (P(None, "x"), P(), AxisType.Explicit),
        (P(None, "x"), P(), AxisType.Auto),
        (P(), P(None, "x"), AxisType.Explicit),
        (P(None, "x"), P("x"), AxisType.Auto),
    ],
    ids=["whole keys, explicit", "whole keys, automatic", "whole queries, explicit", "keys by the batch, automatic"],
)
def test_queries_and_keys_may_lie_apart(query: P, key: P, kind: AxisType) -> None:
    attend = attending()
    q, k, v, lam, g = given()
    on = mesh(kind)
    placed = [jax.device_put(x, NamedSharding(on, spec)) for x, spec in zip((q, k, v), (query, key, key), strict=True)]
    lam, g = (jax.device_put(x, NamedSharding(on, P(*query))) for x in (lam, g))
    got = jax.jit(partial(output_and_gradients, attend, {}))(*placed, lam, g)
    assert_alike(got, on_one_device("plain"))


def test_reference() -> None:
    run, arrays = compiled("shard_map", {"x": 2}, {}, {"implementation": "reference"}, given(), length="x")
    assert_alike(run(*arrays)[2], on_one_device("plain")[2])


@pytest.mark.slow
def test_mapped_inside_of_shard_map() -> None:
    q, k, v = given()[:3]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vmap(partial(lla_attention, axis_name="x"), in_axes=(None, 0, 0))(q, k, v)

    k, v = jnp.stack([k, k + 1]), jnp.stack([v, v])
    over, rows = P(None, None, "x"), P(None, "x")
    divided = jax.shard_map(attend, mesh=mesh(AxisType.Auto), in_specs=(rows, over, over), out_specs=over)
    expected = jax.vmap(lla_attention, in_axes=(None, 0, 0))
    assert_alike(jax.jit(divided)(q, k, v), jax.jit(expected)(q, k, v))


@pytest.mark.slow
def test_hessian_vector_product_inside_of_shard_map() -> None:
    q, k, v = given()[:3]
    rows = P(None, "x")
    run = partial(lla_attention, axis_name="x", implementation="xla")
    divided = jax.shard_map(run, mesh=mesh(AxisType.Auto), in_specs=(rows,) * 3, out_specs=rows)

    def product(attend: Any) -> Any:
        gradient = jax.grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv))), argnums=(0, 1, 2))
        return jax.jit(lambda *qkv: jax.jvp(gradient, qkv, tuple(jnp.cos(x) for x in qkv))[1])(q, k, v)

    expected = product(partial(lla_attention, implementation="xla"))
    largest = max(float(jnp.max(jnp.abs(x))) for x in expected)
    assert_alike(product(divided), expected, atol=2e-5 * largest)


def work(devices: int) -> np.ndarray:
    """By device, the positions that it works on, of four queries a device; and they come back as they went."""
    queries = 4 * devices
    positions = jnp.arange(queries, dtype=jnp.float32)[None, :, None, None]
    end = jnp.arange(1, queries + 1, dtype=jnp.int32)[None]

    def run(q: jax.Array, k: jax.Array, v: jax.Array, lam: jax.Array, seen: Visibility) -> tuple[jax.Array, ...]:
        assert k.shape[1] == queries
        assert seen.start.shape == q.shape[:2]
        here = jnp.full_like(q, lax.axis_index("x").astype(q.dtype))
        return q, here, here * 0 + seen.end[..., None, None].astype(q.dtype)

    def divided(x: jax.Array, lam: jax.Array, end: jax.Array) -> tuple[jax.Array, ...]:
        seen = Visibility(0 * end, end, None, None, None, None, True, True, uneven=True)
        return over_length(run, ("x",), backward=False)(x, x, x, lam, seen)

    rows = P(None, "x")
    over = jax.shard_map(divided, mesh=mesh(AxisType.Auto, x=devices), in_specs=(rows,) * 3, out_specs=rows)
    back, device, seen = jax.jit(over)(positions, positions[..., 0], end)
    np.testing.assert_array_equal(back, positions)
    np.testing.assert_array_equal(seen, positions + 1)
    device = np.asarray(device).ravel()
    return np.stack([np.flatnonzero(device == d) for d in range(devices)])


def test_work_is_balanced() -> None:
    """Every device has a part from the front and the same from the back."""
    assert work(2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_an_odd_share_is_not_balanced_but_right() -> None:
    q, k, v = given(Shape(queries=6, keys=6, dim=4, value_dim=4))[:3]
    rows, over = P(None, "x"), mesh(AxisType.Auto)
    divided = jax.shard_map(partial(lla_attention, axis_name="x"), mesh=over, in_specs=(rows,) * 3, out_specs=rows)
    run = jax.jit(divided).lower(q, k, v).compile()
    assert not any("permute" in name for name in collectives(run))
    assert_alike(run(q, k, v), lla_attention(q, k, v))


@pytest.mark.parametrize(
    ("axis_name", "error", "message"),
    [
        ("y", ValueError, "axis_name must name different mesh axes out of .*: 'x'; got 'y'"),
        (("x", "x"), ValueError, "different mesh axes"),
        (1, TypeError, "axis_name must be None, the name of a mesh axis or a tuple of them, got 1"),
        ((), TypeError, "axis_name must be"),
    ],
    ids=str,
)
def test_refused_names(axis_name: Any, error: type[Exception], message: str) -> None:
    def attend(*qkv: jax.Array) -> jax.Array:
        return lla_attention(*qkv, axis_name=axis_name)

    rows = P(None, "x")
    divided = jax.shard_map(attend, mesh=mesh(AxisType.Auto), in_specs=(rows,) * 3, out_specs=rows)
    with pytest.raises(error, match=message):
        divided(*given()[:3])


def test_refused_outside_of_shard_map_and_for_whole_keys() -> None:
    q, k, v = given()[:3]
    with pytest.raises(ValueError, match="none here; got 'x'"):
        lla_attention(q, k, v, axis_name="x")

    def attend(*qkv: jax.Array) -> jax.Array:
        return lla_attention(*qkv, axis_name="x")

    rows = P(None, "x")
    divided = jax.shard_map(attend, mesh=mesh(AxisType.Auto), in_specs=(rows, P(), P()), out_specs=rows)
    with pytest.raises(ValueError, match=r"key is the same on all of its devices. Divide key too"):
        divided(q, k, v)


def test_keys_that_do_not_divide_are_refused() -> None:
    q, k, v = given()[:3]
    placed = jax.device_put(q, NamedSharding(mesh(AxisType.Explicit), P(None, "x")))
    with pytest.raises(NotImplementedError, match="evenly among the 2 shards of mesh axis 'x', got 31; pad"):
        lla_attention(placed, k[:, :31], v[:, :31], is_causal=False)


@pytest.mark.slow
def test_on_eight_devices() -> None:
    """In a process of its own: this one has two."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tests.devices.eight_devices"]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
