"""Calls on several devices: each computes the batch entries and heads that it holds, and none needs another's.

Inside ``jax.shard_map`` that is so by itself; JAX then wants to know of every array over which mesh axes it varies. On
a mesh with explicit axes the call goes through ``jax.shard_map``. On one with automatic axes XLA divides what it can
see into; what it cannot, it is told how to divide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from flashlla_jax.visibility import Visibility

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


class _Axes(NamedTuple):
    """The mesh axes over which the batch and the heads lie."""

    batch: Any
    heads: Any


def by_shard(
    attend: Callable[..., Any], query: Array, key: Array, value: Array, lam: Array, hiding: dict[str, Any]
) -> Any:
    """``attend`` of the canonical call, run where the arrays lie if a mesh with explicit axes says where.

    ``hiding`` holds arrays, or pairs of them, whose axis 0 is the batch (or 1, or missing) and, of the mask, axis 1 the
    heads (or 1).
    """

    def local(query: Array, key: Array, value: Array, lam: Array, hiding: dict[str, Any]) -> Any:
        given = (query, key, value, lam, hiding)
        return attend(*varying_like(given, given))

    given = (query, key, value, lam, hiding)
    mesh, axes = _placed({"query": query, "key": key, "value": value})
    if mesh is None:
        return local(*given)
    shards = _size(mesh, axes.heads)
    if key.shape[2] % shards:
        raise NotImplementedError(
            f"the key/value heads must divide evenly among the {shards} shards of mesh axis {axes.heads!r}, got "
            f"{key.shape[2]}; repeat them, or shard the batch instead"
        )
    rows = P(axes.batch, None, axes.heads)
    wide = P(axes.batch, None, axes.heads, None)

    def place(x: Array) -> P:
        batch = axes.batch if x.ndim and x.shape[0] == query.shape[0] else None
        if x.ndim == 4:
            return P(batch, axes.heads if x.shape[1] > 1 else None, None, None)
        return P(*(batch if i == 0 else None for i in range(x.ndim)))

    specs = (wide, wide, wide, rows, jax.tree.map(place, hiding))
    placed = jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), given, specs)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(wide, rows))(*placed)


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


class _Places(NamedTuple):
    """Which axes of an array are the batch and the heads; None where it has no such axis, or all share one."""

    batch: int | None
    heads: int | None


def _places(arrays: Any, batch: int) -> Any:
    """The places of every array of the tree: those of a visibility's, and axes 0 and 2 of all others."""

    def of(x: Any) -> Any:
        if not isinstance(x, Visibility):
            return _Places(0, 2 if x.shape[2] > 1 else None)
        return jax.tree.map(of_hiding, x)

    def of_hiding(x: Any) -> _Places:
        return _Places(0 if x.shape[0] == batch else None, 1 if len(x.shape) == 4 and x.shape[1] > 1 else None)

    return jax.tree.map(of, arrays, is_leaf=lambda x: isinstance(x, Visibility))


def divisible(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, opaque to XLA, as what XLA may divide by batch and heads on a mesh with automatic axes.

    Its first arguments are query and key, one may be a ``Visibility``; of all its other arrays, in and out, axis 0 is
    the batch, and axis 2 the heads, the key/value heads, or 1. On one device nothing changes: ``run`` is lowered as it
    is.
    """

    def partition(mesh: Any, given: Any, results: Any) -> Any:
        query, key = given[:2]
        batch, _, heads, _ = query.sharding.spec
        if key.shape[2] % _size(mesh, heads):
            heads = None  # a group of query heads needs its key head

        def place(x: Any, places: _Places) -> NamedSharding:
            axes = {places.batch: batch, places.heads: heads}
            return NamedSharding(mesh, P(*(axes.get(i) for i in range(len(x.shape)))))

        def shardings(tree: Any) -> Any:
            return jax.tree.map(place, tree, _places(tree, query.shape[0]))

        return mesh, run, shardings(results), shardings(given)

    def call(*arrays: Any) -> Any:
        if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
            return run(*arrays)  # inside jax.shard_map it is divided already
        divided = custom_partitioning(lambda *arrays: run(*arrays))  # which would fill in a partial's keywords
        divided.def_partition(partition, sharding_rule=partial(_rule, jax.tree.structure(arrays)))
        return divided(*arrays)

    return call


def _rule(tree: Any, mesh: Any, given: Any, results: Any) -> tuple[str, dict[str, Any]]:
    """In the notation of ``custom_partitioning``: which axes of the arrays are divided together, and which are not.

    ``given`` and ``results`` are the types of the flat arrays, ``tree`` is the structure of the arguments.
    """
    given = tree.unflatten(given)
    query, key = given[:2]
    kv_heads = key.shape[2]
    whole: list[str] = []

    def axes(x: Any, places: _Places) -> str:
        names = ["" for _ in x.shape]
        if places.batch is not None:
            names[places.batch] = "batch"
        if places.heads is not None and kv_heads > 1:
            names[places.heads] = "heads" if x.shape[places.heads] == kv_heads else "(heads group)"
        for i, name in enumerate(names):
            if not name:
                names[i] = f"whole{len(whole)}"
                whole.append(names[i])
        return " ".join(names)

    def side(tree: Any) -> str:
        leaves, places = jax.tree.leaves(tree), _places(tree, query.shape[0])
        places = jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, _Places))
        return ", ".join(axes(x, of) for x, of in zip(leaves, places, strict=True))

    rule = f"{side(given)} -> {side(results)}"
    sizes = {"group": query.shape[2] // kv_heads} if "group" in rule else {}
    return rule, {"need_replication_factors": tuple(whole), **sizes}
