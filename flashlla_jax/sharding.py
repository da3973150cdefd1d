"""Calls on several devices: each computes the batch entries and heads that it holds, and none needs another's.

Inside ``jax.shard_map`` that is so by itself; JAX then wants to know of every array over which mesh axes it varies. On
a mesh with explicit axes the call goes through ``jax.shard_map``. On one with automatic axes XLA divides what it can
see into; what it cannot, it is told how to divide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from flashlla_jax.interface import Options
from flashlla_jax.mask import without_unseen

_Tree = TypeVar("_Tree")


def varying_like(tree: _Tree, like: Any) -> _Tree:
    """Inside ``jax.shard_map``: the arrays of ``tree``, varying over the mesh axes that any array of ``like`` does."""
    axes = {axis for x in jax.tree.leaves(like) for axis in _varying(x)}

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - _varying(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _attend(
    attend: Callable[..., Any], query: Array, key: Array, value: Array, lam: Array, options: Options, mask: Array | None
) -> Any:
    if mask is not None:
        key, value = without_unseen(query, key, value, mask, options.is_causal)
    given = (query, key, value, lam, mask)
    query, key, value, lam, mask = varying_like(given, given)
    return attend(query, key, value, lam, options, mask)


class _Axes(NamedTuple):
    """The mesh axes over which the batch and the heads lie."""

    batch: Any
    heads: Any


def by_shard(attend: Callable[..., Any]) -> Callable[..., Any]:
    """``attend`` of the canonical call, run where the arrays lie if a mesh with explicit axes says where."""

    def call(query: Array, key: Array, value: Array, lam: Array, options: Options, mask: Array | None) -> Any:
        arrays = {"query": query, "key": key, "value": value}
        mesh, axes = _placed(arrays)
        if mesh is None:
            return _attend(attend, query, key, value, lam, options, mask)
        shards = _size(mesh, axes.heads)
        if key.shape[2] % shards:
            raise NotImplementedError(
                f"the key/value heads must divide evenly among the {shards} shards of mesh axis {axes.heads!r}, got "
                f"{key.shape[2]}; repeat them, or shard the batch instead"
            )
        over = (False, False) if mask is None else tuple(n > 1 for n in mask.shape[:2])
        return _sharded(attend, options, mesh, axes, over)(query, key, value, lam, mask)

    return call


def _placed(arrays: dict[str, Array]) -> tuple[Any, _Axes]:
    """The mesh with explicit axes that some array lies on, if any, and the axes of batch and heads."""
    found: dict[int, Any] = {}
    mesh = None
    for name, x in arrays.items():
        sharding = jax.typeof(x).sharding
        for i, axis in enumerate(sharding.spec):
            if axis is None:
                continue
            if i not in (0, 2):
                what = "length" if i == 1 else "head dimension"
                raise NotImplementedError(
                    f"{name} is sharded along its {what} (mesh axis {axis!r}); only the batch and the heads may be: "
                    "use jax.sharding.reshard before the call"
                )
            mesh = sharding.mesh
            found.setdefault(i, axis)
    return mesh, _Axes(found.get(0), found.get(2))


def _size(mesh: Any, axes: Any) -> int:
    size = 1
    for axis in axes if isinstance(axes, tuple) else (axes,) if axes is not None else ():
        size *= mesh.shape[axis]
    return size


@cache
def _sharded(
    attend: Callable[..., Any], options: Options, mesh: Any, axes: _Axes, mask_over: tuple[bool, ...]
) -> Callable[..., Any]:
    rows = P(axes.batch, None, axes.heads)
    wide = P(axes.batch, None, axes.heads, None)
    mask = P(*(axis if over else None for axis, over in zip(axes, mask_over, strict=True)), None, None)
    specs = (wide, wide, wide, rows, mask)

    def local(query: Array, key: Array, value: Array, lam: Array, mask: Array | None) -> Any:
        return _attend(attend, query, key, value, lam, options, mask)

    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(wide, rows))

    @jax.jit
    def call(*given: Array | None) -> Any:  # the mask may be None
        placed: list[Any] = [
            None if x is None else jax.sharding.reshard(x, NamedSharding(mesh, spec))
            for x, spec in zip(given, specs, strict=True)
        ]
        return run(*placed)

    return call


def divisible(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, opaque to XLA, as what XLA may divide by batch and heads on a mesh with automatic axes.

    Its first arguments are query and key; of all its arrays, in and out, axis 0 is the batch, and axis 2 the heads, the
    key/value heads, or 1. On one device nothing changes: ``run`` is lowered as it is.
    """
    divided = custom_partitioning(lambda *arrays: run(*arrays))  # which would fill in a partial's keywords

    def partition(mesh: Any, given: Any, results: Any) -> Any:
        query, key = given[:2]
        batch, _, heads, _ = query.sharding.spec
        if key.shape[2] % _size(mesh, heads):
            heads = None  # a group of query heads needs its key head

        def place(x: Any) -> NamedSharding:
            axes = (batch, None, heads if x.shape[2] > 1 else None)
            return NamedSharding(mesh, P(*axes, *(None for _ in x.shape[3:])))

        return mesh, run, jax.tree.map(place, results), jax.tree.map(place, given)

    divided.def_partition(partition, sharding_rule=_rule)

    def call(*arrays: Any) -> Any:
        # inside jax.shard_map it is divided already
        inside = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
        return (run if inside else divided)(*arrays)

    return call


def _rule(mesh: Any, given: Any, results: Any) -> tuple[str, dict[str, Any]]:
    """In the notation of ``custom_partitioning``: which axes of the arrays are divided together, and which are not."""
    kv_heads = given[1].shape[2]
    whole: list[str] = []

    def axes(x: Any) -> str:
        heads = "" if kv_heads == 1 else {1: "", kv_heads: "heads"}.get(x.shape[2], "(heads group)")
        names = ["batch", "", heads, *("" for _ in x.shape[3:])]
        for i, name in enumerate(names):
            if not name:
                names[i] = f"whole{len(whole)}"
                whole.append(names[i])
        return " ".join(names)

    rule = " -> ".join(", ".join(axes(x) for x in arrays) for arrays in (given, results))
    sizes = {"group": given[0].shape[2] // kv_heads} if "group" in rule else {}
    return rule, {"need_replication_factors": tuple(whole), **sizes}
