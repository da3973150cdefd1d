"""Calls on several devices: each computes the batch entries, the heads and the queries that it holds.

Batch entries and heads are independent. If the length is divided, ``context_parallel.py`` sends keys and gradients.
Inside ``jax.shard_map`` the call names the mesh axes that divide the length, and JAX asks over which axes each array
varies. On a mesh with explicit axes the call goes through ``jax.shard_map``. On a mesh with automatic axes XLA is told
how to divide the call.
"""

from __future__ import annotations

import dataclasses
import math
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
    """The mesh axes over which the batch, the queries and the heads lie."""

    batch: Any
    length: Any
    heads: Any


def by_shard(
    attend: Callable[..., Any],
    query: Array,
    key: Array,
    value: Array,
    own: Array,
    hiding: dict[str, Any],
    *,
    lengthwise: bool = False,
) -> Any:
    """Runs ``attend`` on the canonical call. On a mesh with explicit axes each device computes its part.

    ``own`` is the ridge, (B, T, N), or Parallax's probe, (B, T, N, D).
    ``hiding`` holds arrays, and pairs with the queries' array first. Axis 0 is the batch (or 1, or missing). Axis 1 of
    the mask is the heads (or 1), and axis 2 the queries (or 1).

    With ``lengthwise`` the length may be divided. ``attend`` then has one more argument at the end: the mesh axes that
    divide the length, or None. Keys and values are divided as the query is.
    """

    def local(query: Array, key: Array, value: Array, own: Array, hiding: dict[str, Any]) -> Any:
        given = (query, key, value, own, hiding)
        return attend(*varying_like(given, given), *((names(axes.length),) if lengthwise else ()))

    given = (query, key, value, own, hiding)
    mesh, axes = _placed({"query": query, "key": key, "value": value}, lengthwise)
    if mesh is None:
        return local(*given)
    _check_division(mesh, axes, key)
    rows = P(axes.batch, axes.length, axes.heads)
    wide = P(axes.batch, axes.length, axes.heads, None)

    def place(x: Array, axis_1: Any) -> P:
        batch = axes.batch if x.ndim and x.shape[0] == query.shape[0] else None
        if x.ndim == 4:
            return P(batch, axes.heads if x.shape[1] > 1 else None, axes.length if x.shape[2] > 1 else None, None)
        return P(*(batch, axis_1)[: x.ndim])

    def place_all(x: Any) -> Any:
        return tuple(place(ids, axes.length) for ids in x) if isinstance(x, tuple) else place(x, None)

    specs = (wide, wide, wide, wide if own.ndim == 4 else rows, {name: place_all(x) for name, x in hiding.items()})
    placed = jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), given, specs)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(wide, rows))(*placed)


def _placed(arrays: dict[str, Array], lengthwise: bool) -> tuple[Any, _Axes]:
    """The mesh with explicit axes that some array lies on, if any, and the axes of the call.

    The query's axes count first. If it has none for the batch or the heads, those of key and value count, unless they
    are in use. The query alone decides on the length.
    """
    found: dict[int, Any] = {}
    mesh = None
    for name, x in arrays.items():
        sharding = jax.typeof(x).sharding
        for i, axis in enumerate(sharding.spec):
            if axis is None:
                continue
            if i == 3 or (i == 1 and not lengthwise):
                what = "length" if i == 1 else "head dimension"
                may = "batch, length and heads" if lengthwise else "batch and heads"
                raise NotImplementedError(
                    f"{name} is sharded along its {what} (mesh axis {axis!r}); only {may} may be: "
                    "use jax.sharding.reshard before the call"
                )
            mesh = sharding.mesh
            used = {name for other in found.values() for name in names(other) or ()}
            if name == "query" or (i != 1 and not used.intersection(names(axis) or ())):
                found.setdefault(i, axis)
    return mesh, _Axes(found.get(0), found.get(1), found.get(2))


def _check_division(mesh: Any, axes: _Axes, key: Array) -> None:
    shards = _size(mesh, axes.heads)
    if key.shape[2] % shards:
        raise NotImplementedError(
            f"the key/value heads must divide evenly among the {shards} shards of mesh axis {axes.heads!r}, got "
            f"{key.shape[2]}; repeat them, or shard the batch instead"
        )
    shards = _size(mesh, axes.length)
    if key.shape[1] % shards:
        raise NotImplementedError(
            f"if the query's length is sharded, the key's must divide evenly among the {shards} shards of mesh axis "
            f"{axes.length!r}, got {key.shape[1]}; pad keys and values and give key_value_seq_lengths and query_offset"
        )


def names(axes: Any) -> tuple[str, ...] | None:
    """The mesh axes of an entry of a PartitionSpec; None if there is none."""
    return axes if axes is None or isinstance(axes, tuple) else (axes,)


def _size(mesh: Any, axes: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in names(axes) or ())


class _Places(NamedTuple):
    """Which axes of an array are the batch, the heads, the queries and the keys.

    None if the array has no such axis, if all share one entry, or if the axis stays whole.
    """

    batch: int | None
    heads: int | None
    queries: int | None
    keys: int | None


class _Sides(NamedTuple):
    """The sizes that decide which axis of an array is which."""

    batch: int
    queries: int | None  # how many; None if the length stays whole
    key_results: tuple[int, ...]

    def of_given(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The places of a call's arguments. The second and third belong to the keys."""
        return tuple(self._of(x, i in (1, 2)) for i, x in enumerate(given))

    def of_results(self, results: Any) -> Any:
        if not isinstance(results, tuple):
            return self._of(results, False)
        return tuple(self._of(x, i in self.key_results) for i, x in enumerate(results))

    def _of(self, tree: Any, keys: bool) -> Any:
        def of(x: Any) -> Any:
            if isinstance(x, Visibility):
                return self._of_visibility(x)
            heads = 2 if x.shape[2] > 1 else None
            if self.queries is None:
                return _Places(0, heads, None, None)
            if keys:
                return _Places(0, heads, None, 1)
            return _Places(0, heads, 1 if x.shape[1] == self.queries else None, None)  # None: a placeholder

        return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, Visibility))

    def _of_visibility(self, seen: Visibility) -> Any:
        rows = {"start", "end", "query_ids", "mask"} if self.queries is not None else set()

        def of(name: str, x: Any) -> Any:
            if x is None:
                return None
            mask = len(x.shape) == 4
            axis = 2 if mask else 1
            divided = name in rows and x.shape[axis] > 1
            batch = 0 if x.shape[0] == self.batch else None
            return _Places(batch, 1 if mask and x.shape[1] > 1 else None, axis if divided else None, None)

        fields = ("start", "end", "query_ids", "key_ids", "contiguous", "mask")
        return dataclasses.replace(seen, **{name: of(name, getattr(seen, name)) for name in fields})


def _leaves(places: Any) -> list[_Places]:
    return jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, _Places))


def divisible(
    run: Callable[..., Any],
    over_length: Callable[[tuple[str, ...]], Callable[..., Any]] | None = None,
    key_results: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Lets XLA divide the opaque ``run`` by batch, heads and length, on a mesh with automatic axes.

    The first arguments of ``run`` are query, key and value, and one may be a ``Visibility``. In all other arguments
    and results axis 0 is the batch, and axis 2 the heads, the key/value heads, or 1. ``over_length(mesh axes)`` gives
    the function that computes a part of the length. Axis 1 is then the keys in key, value and the results that
    ``key_results`` numbers, and the queries (or 1) in the others. Without ``over_length`` the length stays whole. So
    does a length of queries or keys that does not divide evenly. On one device ``run`` is lowered as it is.
    """

    def sides(query: Any) -> _Sides:
        return _Sides(query.shape[0], None if over_length is None else query.shape[1], key_results)

    def partition(mesh: Any, given: Any, results: Any) -> Any:
        query, key = given[:2]
        batch, length, heads, _ = query.sharding.spec
        if key.shape[2] % _size(mesh, heads):
            heads = None  # a group of query heads needs its key head
        if over_length is None or query.shape[1] % _size(mesh, length) or key.shape[1] % _size(mesh, length):
            length = None

        def place(x: Any, places: _Places) -> NamedSharding:
            axes = {places.batch: batch, places.heads: heads, places.queries: length, places.keys: length}
            return NamedSharding(mesh, P(*(axes.get(i) for i in range(len(x.shape)))))

        of = sides(query)
        shardings = jax.tree.map(place, (given, results), (of.of_given(given), of.of_results(results)))
        lower = over_length(names(length) or ()) if over_length is not None and length is not None else run
        return mesh, lower, shardings[1], shardings[0]

    def call(*arrays: Any) -> Any:
        if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
            return run(*arrays)  # inside jax.shard_map it is divided already
        # a lambda, because custom_partitioning fills in the keywords of a partial
        divided = custom_partitioning(lambda *arrays: run(*arrays))
        rule = partial(_rule, sides(arrays[0]), jax.tree.structure(arrays))
        divided.def_partition(partition, sharding_rule=rule)
        return divided(*arrays)

    return call


def _rule(of: _Sides, tree: Any, mesh: Any, given: Any, results: Any) -> tuple[str, dict[str, Any]]:
    """In the notation of ``custom_partitioning``: which axes of the arrays are divided together, and which are not.

    ``given`` and ``results`` are the types of the flat arrays, ``tree`` is the structure of the arguments.
    """
    given, results = tree.unflatten(given), tuple(results)
    query, key = given[:2]
    kv_heads = key.shape[2]
    whole: list[str] = []

    def axes(x: Any, places: _Places) -> str:
        named = {places.batch: "batch", places.queries: "queries", places.keys: "keys"}
        if places.heads is not None and kv_heads > 1:
            named[places.heads] = "heads" if x.shape[places.heads] == kv_heads else "(heads group)"
        found = [named.get(i, "") for i in range(len(x.shape))]
        for i, name in enumerate(found):
            if not name:
                found[i] = f"whole{len(whole)}"
                whole.append(found[i])
        return " ".join(found)

    def side(tree: Any, places: Any) -> str:
        return ", ".join(axes(x, of) for x, of in zip(jax.tree.leaves(tree), _leaves(places), strict=True))

    rule = f"{side(given, of.of_given(given))} -> {side(results, of.of_results(results))}"
    sizes = {"group": query.shape[2] // kv_heads} if "group" in rule else {}
    return rule, {"need_replication_factors": tuple(whole), **sizes}
