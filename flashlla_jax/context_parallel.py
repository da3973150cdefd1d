"""One device's part of a divided length, inside ``jax.shard_map`` or one of XLA's partitions.

Every solve belongs to one query. So the queries stay, and K and V are gathered whole. A device computes its queries'
share of dk and dv, for all keys. The shares are added up and scattered. Nothing is sent in between.

In a causal call later queries see more keys, so equal parts of the queries are not equal work. Each device then works
on two of the 2n half-chunks of the queries: device d on the d-th and on the d-th from the end. That is the same work
for every d. The half-chunks are exchanged before the work, and the results are exchanged back after it. Outside,
the data keeps its order. The intervals of a visibility travel with their queries, so the pass itself does not notice.

All keys and their gradients, of all heads, would be most of the memory of a long call. So a long call takes its key
heads in groups, one after another. It holds the gathered, exchanged and scattered arrays of one group at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from flashlla_jax.sharding import varying_like
from flashlla_jax.visibility import Hiding, Part, Visibility, visibility

Axes = tuple[str, ...]  # the mesh axes that divide a length, the first one outermost

# A group of heads has at least so many rows of queries, over batch and heads: 1024 programs of 64 rows. They keep an
# H100 (264 programs at a time) busy, except for a few per cent at the end. Fewer would be slower.
_ROWS_OF_A_GROUP = 65536

# A row that sees few keys is little work: in a packed call it took a sixth of the time of a causal one. Beside its work
# every group costs about 1 ms on an H100, for the transfers before and after it and the ends of its kernels. So these
# groups are larger. They take more memory: the keys of four times the heads, and their gradients.
_ROWS_OF_FEW_KEYS = 4 * _ROWS_OF_A_GROUP

# A forward pass holds no gradients, so its groups may be larger without a higher peak of memory.
_FORWARD = 2


def gathered(x: Array, axes: Axes) -> Array:
    """The whole array; each device has a part of axis 1, the length."""
    return lax.all_gather(x, axes, axis=1, tiled=True)


def local_visibility(hiding: Hiding, queries: int, keys: int, axes: Axes) -> Visibility:
    """The visibility of all keys by this device's queries.

    ``queries`` and ``keys`` are the device's own. Segment ids, and a mask of keys alone, may lie as the keys.
    """
    devices = lax.axis_size(axes)
    if hiding.segment_ids is not None:
        query_ids, key_ids = hiding.segment_ids
        hiding = hiding._replace(segment_ids=(query_ids, gathered(key_ids, axes)))
    if hiding.mask is not None and 1 != hiding.mask.shape[3] != devices * keys:
        hiding = hiding._replace(mask=lax.all_gather(hiding.mask, axes, axis=3, tiled=True))
    return visibility(hiding, devices * queries, devices * keys, Part(lax.axis_index(axes), devices))


def over_length(run: Callable[..., Any], axes: Axes, *, backward: bool) -> Callable[..., Any]:
    """Makes a pass over parts of queries and keys from ``run``, which takes some queries and all keys.

    ``run`` is a forward or backward pass. Its arguments are query, key, value, ridge or probe, and a ``Visibility`` of
    all keys. A backward pass also takes the saved arrays and the cotangent. A forward pass returns arrays of the
    queries, a backward pass the four gradients. Axis 2 is the heads, or 1, except in the arrays of the visibility.
    """

    def divided(query: Array, key: Array, value: Array, own: Array, seen: Visibility, *rest: Any) -> Any:
        devices = lax.axis_size(axes)
        balanced = seen.uneven and devices > 1 and query.shape[1] % 2 == 0
        halves = _Halves(axes, devices, query.shape[1]) if balanced else None
        groups = groups_of_heads(query, key, few_keys=seen.few_keys, backward=backward) if devices > 1 else 1
        if groups == 1:
            return _part(run, axes, halves, backward, query, key, value, own, seen, *rest)
        if halves is not None:  # once for all groups
            seen = _with_query_side(seen, halves.exchanged(_query_side(seen)))
        part = partial(_part, _held_together(run), axes, halves, backward, exchanged=True)
        return _one_after_another(part, groups, (query, key, value, own, seen, *rest))

    return divided


def _part(
    run: Callable[..., Any],
    axes: Axes,
    halves: _Halves | None,
    backward: bool,
    query: Array,
    key: Array,
    value: Array,
    own: Array,
    seen: Visibility,
    *rest: Any,
    exchanged: bool = False,
) -> Any:
    """``run`` for this device's part and all heads of the arrays. ``exchanged``: the visibility already is."""
    key, value = gathered(key, axes), gathered(value, axes)
    if halves is not None:
        rows = {} if exchanged else _query_side(seen)
        query, own, rows, rest = halves.exchanged((query, own, rows, rest))
        seen = _with_query_side(seen, rows)
    out = run(query, key, value, own, seen, *rest)
    if not backward:
        return out if halves is None else halves.returned(out)
    dq, dk, dv, down = out
    dk, dv = (lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True) for x in (dk, dv))
    if halves is not None:
        dq, down = halves.returned((dq, down))
    return dq, dk, dv, down


def groups_of_heads(query: Any, key: Any, *, few_keys: bool, backward: bool) -> int:
    """Into how many groups a device divides its key heads: as many as leave enough work in each."""
    batch, length, heads, _ = query.shape
    rows = (batch if isinstance(batch, int) else 1) * length * heads  # may be symbolic in an export
    least = (_ROWS_OF_FEW_KEYS if few_keys else _ROWS_OF_A_GROUP) * (1 if backward else _FORWARD)
    return max(n for n in range(1, key.shape[2] + 1) if key.shape[2] % n == 0 and n <= max(1, rows // least))


def _held_together(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, with a barrier: no result is sent before all are there.

    Else XLA sends dq back while it computes dk and dv, and holds dq twice at the peak of memory.
    """
    return lambda *given: lax.optimization_barrier(run(*given))


def _one_after_another(part: Callable[..., Any], groups: int, given: tuple[Any, ...]) -> Any:
    """``part`` of one group of heads after another.

    It is a loop, because else XLA sees that both passes gather the same keys, merges the two gathers, and keeps the
    keys in between.
    """

    def cut(group: Array, x: Any) -> Any:
        if isinstance(x, Visibility):
            return x if x.mask is None else dataclasses.replace(x, mask=of_group(group, x.mask, 1))
        return of_group(group, x, 2)

    def of_group(group: Array, x: Array, axis: int) -> Array:
        size = x.shape[axis] // groups
        return x if size == 0 else lax.dynamic_slice_in_dim(x, group * size, size, axis)

    def put(group: Array, whole: Array, x: Array) -> Array:
        if whole.shape == x.shape:  # a placeholder
            return x
        return lax.dynamic_update_slice_in_dim(whole, x, group * x.shape[2], 2)

    def step(group: Array, out: Any) -> Any:
        of_heads = jax.tree.map(partial(cut, group), given, is_leaf=lambda x: isinstance(x, Visibility))
        # else XLA's pipelining of collectives gathers the next turn's keys before this one ends
        of_heads, out = lax.optimization_barrier((of_heads, out))
        return jax.tree.map(partial(put, group), out, varying_like(part(*of_heads), given))

    types = jax.eval_shape(part, *given)
    out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    return lax.fori_loop(0, groups, step, varying_like(out, given))


def _query_side(seen: Visibility) -> dict[str, Array | None]:
    """The arrays of a visibility that belong to the queries, with the queries as axis 1."""
    mask = None if seen.mask is None else jnp.moveaxis(seen.mask, 2, 1)
    return {"start": seen.start, "end": seen.end, "query_ids": seen.query_ids, "mask": mask}


def _with_query_side(seen: Visibility, rows: dict[str, Any]) -> Visibility:
    if rows.get("mask") is not None:
        rows = rows | {"mask": jnp.moveaxis(rows["mask"], 1, 2)}
    return dataclasses.replace(seen, **rows)


class _Halves(NamedTuple):
    """The half-chunks of the queries: device d has the ones numbered 2d and 2d + 1, and works on d and 2n - 1 - d.

    The even ones go to n different devices, and so do the odd ones. So there are two permutations, and each sends all
    arrays at once. Device d works first on the earlier of its two, which is the even one if d is even.
    """

    axes: Axes
    devices: int
    queries: int  # of a device

    def exchanged(self, tree: Any) -> Any:
        """The arrays of a tree, for the half-chunks that this device works on in place of those that it has."""

        def move(even: list[Array], odd: list[Array]) -> Any:
            return self._swapped(self._sent(even, 0, back=False), self._sent(odd, 1, back=False))

        return self._over(tree, move)

    def returned(self, tree: Any) -> Any:
        """The inverse of ``exchanged``."""

        def move(first: list[Array], second: list[Array]) -> Any:
            even, odd = self._swapped(first, second)
            return self._sent(even, 0, back=True), self._sent(odd, 1, back=True)

        return self._over(tree, move)

    def _over(self, tree: Any, move: Callable[[list[Array], list[Array]], Any]) -> Any:
        """``move`` of both halves of the arrays whose axis 1 is the queries; arrays with 1 there stay as they are."""
        leaves, structure = jax.tree.flatten(tree)
        places = [i for i, x in enumerate(leaves) if x.shape[1] == self.queries]
        halves = zip(*(jnp.split(leaves[i], 2, axis=1) for i in places), strict=True)
        for i, *pair in zip(places, *move(*map(list, halves)), strict=True):
            leaves[i] = jnp.concatenate(pair, axis=1)
        return structure.unflatten(leaves)

    def _swapped(self, first: list[Array], second: list[Array]) -> tuple[list[Array], list[Array]]:
        """Swaps both halves on odd devices: from the order by number to the order of the work, or back."""
        swap = lax.axis_index(self.axes) % 2 == 1
        chosen = [(jnp.where(swap, b, a), jnp.where(swap, a, b)) for a, b in zip(first, second, strict=True)]
        return [pair[0] for pair in chosen], [pair[1] for pair in chosen]

    def _sent(self, halves: list[Array], odd: int, *, back: bool) -> list[Array]:
        """Sends the even or the odd half-chunks to the devices that work on them, or back."""
        chunks = [2 * device + odd for device in range(self.devices)]
        pairs = [(device, min(chunk, 2 * self.devices - 1 - chunk)) for device, chunk in enumerate(chunks)]
        if all(source == target for source, target in pairs):
            return halves
        pairs = tuple(pair[::-1] for pair in pairs) if back else tuple(pairs)
        sent: dict[int, Array] = {}
        for batch in sorted({x.shape[0] for x in halves}):
            places = [i for i, x in enumerate(halves) if x.shape[0] == batch]
            sent |= zip(places, _permuted(self.axes, pairs, [halves[i] for i in places]), strict=True)
        return [sent[i] for i in range(len(halves))]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _permuted(axes: Axes, pairs: tuple[tuple[int, int], ...], arrays: list[Array]) -> list[Array]:
    """Sends arrays of one batch size as one of integers. JAX takes its derivative for zero, so the rule stands here."""
    packed, unpack = _packed(arrays)
    return unpack(lax.ppermute(packed, axes, pairs))


@_permuted.defjvp
def _permuted_jvp(axes: Axes, pairs: Any, primals: Any, tangents: Any) -> tuple[list[Array], list[Any]]:
    (arrays,), (moved,) = primals, tangents
    floats = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
    sent: Any = _permuted(axes, pairs, [moved[i] for i in floats]) if floats else []
    moved = dict(enumerate(moved)) | dict(zip(floats, sent, strict=True))
    return _permuted(axes, pairs, arrays), list(moved.values())


def _packed(arrays: list[Array]) -> tuple[Array, Callable[[Array], list[Array]]]:
    """Arrays ``(B, L, ...)`` of any dtypes as one of unsigned integers, ``(B, L, words)``, and the way back.

    Each collective has a fixed cost. This is one in place of a dozen.
    """
    dtypes = [x.dtype for x in arrays]
    given = [x.astype(jnp.uint8) if x.dtype == bool else x for x in arrays]
    width = math.gcd(4, *(math.prod(x.shape[2:]) * x.dtype.itemsize for x in given))
    word = jnp.dtype(f"uint{8 * width}")

    words = [_bits(x.reshape(*x.shape[:2], -1), word) for x in given]
    stops = list(itertools.accumulate(x.shape[2] for x in words))[:-1]

    def unpack(packed: Array) -> list[Array]:
        parts = zip(jnp.split(packed, stops, axis=2), given, dtypes, strict=True)
        return [_bits(part, x.dtype).reshape(x.shape).astype(dtype) for part, x, dtype in parts]

    return jnp.concatenate(words, axis=2), unpack


def _bits(x: Array, dtype: Any) -> Array:
    """The same bits, row by row, as numbers of another dtype: ``(B, L, m)`` -> ``(B, L, n)``."""
    more = jnp.dtype(dtype).itemsize // x.dtype.itemsize
    if more > 1:
        x = x.reshape(*x.shape[:2], -1, more)
    return lax.bitcast_convert_type(x, dtype).reshape(*x.shape[:2], -1)
