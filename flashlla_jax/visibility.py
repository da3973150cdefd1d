"""Which keys a query sees: one interval of positions for each query, made once from the arguments that hide keys.

Causality, windows, lengths, padding, packed documents and chunked prefill all come to the same thing: query i sees the
keys j of one interval, ``start_i <= j < end_i``. If the interval does not say all, two more fields
count inside it: segments (and hidden keys) that are not contiguous, and a boolean mask. Nothing below this file knows
causality, lengths or how queries and keys are aligned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

# Positions are int32. Windows and offsets are cut to this: no array is as long, and sums of three of them fit.
LARGEST_POSITION = 2**29

# Up to so many keys for a query are few: see Visibility.few_keys.
_FEW_KEYS = 1024

# Ids of tokens that are hidden, whatever the interval says. Ids of segments are positions, so they are not negative.
_HIDDEN_KEY, _HIDDEN_QUERY = -1, -2


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("start", "end", "query_ids", "key_ids", "contiguous", "mask"),
    meta_fields=("from_first", "complete", "uneven", "few_keys"),
)
@dataclass(frozen=True)
class Visibility:
    """Query i sees key j if ``start_i <= j < end_i``, their ids are equal, and the mask is True there.

    Attributes:
        start: position of the first key that the query sees.
        end: position of the last one, plus 1. Both are 0 for a query that sees no key (in any head).
        query_ids, key_ids: None, or numbers of segments. A query sees keys of an equal id, which is not negative. The
            ids are positions of keys, and depend on the keys' ids alone: all parts of the queries have the same ones.
        contiguous: None without ids; else whether the intervals already say all that the ids say. Then the ids need not
            be compared.
        mask: None, or True where a key is visible.
        from_first: whether every start is known to be 0.
        complete: whether every query is known to see a key, and every key to be seen. Then nothing is set to 0.
        uneven: whether later queries probably see more keys than earlier ones. Then equal parts of a divided length
            are not equal work.
        few_keys: whether queries see few keys for certain (a short call, a window) or probably (packed documents). It
            does not change which keys are visible, only how the kernels are launched.
    """

    start: Int[Array, "#B T"]
    end: Int[Array, "#B T"]
    query_ids: Int[Array, "#B T"] | None
    key_ids: Int[Array, "#B S"] | None
    contiguous: Bool[Array, "#B"] | None
    mask: Bool[Array, "#B #N #T #S"] | None
    from_first: bool
    complete: bool
    uneven: bool = False
    few_keys: bool = False


class Hiding(NamedTuple):
    """The arguments that hide keys, checked, on the canonical layout; None for those that are not given.

    Python numbers are known when a call is traced, arrays are not.
    """

    is_causal: bool
    window: tuple[int, int] | None  # keys at positions [i - left, i + right] of query position i
    query_offset: int | Int[Array, ""] | Int[Array, " B"]  # the position of the first query; key j has position j
    query_lengths: Int[Array, " B"] | None
    key_lengths: Int[Array, " B"] | None
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None
    same_segments: bool  # one array for both: query and key of a position are in the same segment
    mask: Bool[Array, "#B #N #T #S"] | None


class Part(NamedTuple):
    """One of ``parts`` equal parts of the queries."""

    number: Int[Array, ""]
    parts: int


def visibility(hiding: Hiding, queries: int, keys: int, part: Part | None = None) -> Visibility:
    """The visibility of ``queries`` by ``keys``, in memory linear in both, except for the mask.

    With ``part``, the query sides of segments and mask hold that part alone, in the arguments and in the result.
    """
    static = hiding._replace(query_offset=0, query_lengths=None, key_lengths=None, segment_ids=None, mask=None)
    offset = hiding.query_offset
    known = isinstance(offset, int)
    arrays = (hiding.query_lengths, hiding.key_lengths, hiding.segment_ids, hiding.mask)
    flags = (
        hiding.window is None and hiding.segment_ids is None and hiding.mask is None,
        _complete(hiding, queries, keys),
        hiding.is_causal and (hiding.window is None or hiding.window[0] >= keys),
        hiding.segment_ids is not None or min(keys, 1 + sum(hiding.window or (keys, 0))) <= _FEW_KEYS,
    )
    first_row = None if part is None else part.number * (queries // part.parts)
    rows = queries if part is None else queries // part.parts
    traced = (None if known else offset, first_row)
    return _made(static, offset if known else None, rows, keys, flags, traced, arrays)


def _complete(hiding: Hiding, queries: int, keys: int) -> bool:
    """Whether the numbers alone say that every query sees a key and every key is seen."""
    given = (hiding.query_lengths, hiding.key_lengths, hiding.mask)
    if any(x is not None for x in given) or not isinstance(hiding.query_offset, int):
        return False
    if hiding.segment_ids is not None:
        # if both sides are the same tokens, every token sees itself
        left, right = hiding.window or (0, 0)
        return hiding.same_segments and hiding.query_offset == 0 and queries == keys and left >= 0 and right >= 0
    start, end = _rule(hiding.is_causal, hiding.window, hiding.query_offset + np.arange(queries)[None], keys)
    covered = np.zeros(keys + 1, np.int64)
    np.add.at(covered, start[0], 1)
    np.add.at(covered, np.maximum(start, end)[0], -1)
    return bool(np.all(start < end) and np.all(np.cumsum(covered)[:keys] > 0))


def _rule(is_causal: bool, window: tuple[int, int] | None, position: Any, keys: int) -> tuple[Any, Any]:
    """The interval of a query at a position, by causality and window; NumPy or JAX as the position is."""
    start, end = 0 * position, 0 * position + keys
    if is_causal:
        end = (position + 1).clip(0, keys)
    if window is not None:
        left, right = (min(width, LARGEST_POSITION) for width in window)
        start = (position - left).clip(0, keys)
        end = (position + right + 1).clip(0, end)
    return start, end


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _made(
    static: Hiding,
    known_offset: int | None,
    queries: int,
    keys: int,
    flags: tuple[bool, bool, bool, bool],
    traced: tuple[Any, Any],
    arrays: Any,
) -> Visibility:
    query_lengths, key_lengths, segment_ids, mask = arrays
    offset, first_row = traced
    offset = jnp.int32(known_offset) if known_offset is not None else _as_positions(offset)
    offset = offset.reshape(-1, 1)
    rows = jnp.arange(queries, dtype=jnp.int32)[None]
    if first_row is not None:
        rows = rows + first_row.astype(jnp.int32)
    start, end = _rule(static.is_causal, static.window, offset + rows, keys)
    if key_lengths is not None:
        end = jnp.minimum(end, _as_positions(key_lengths)[:, None])
    if query_lengths is not None:
        end = jnp.where(rows < _as_positions(query_lengths)[:, None], end, 0)
    if mask is not None and mask.shape[1:] == (1, queries, 1):  # hides whole queries
        end, mask = jnp.where(mask[:, 0, :, 0], end, 0), None
    start, end = _without_empty(start, end)

    ids = (None, None, None)
    key_mask = None
    if mask is not None and mask.shape[1:3] == (1, 1):  # hides whole keys, as padding does
        key_mask, mask = mask[:, 0, 0], None
        key_mask = jnp.broadcast_to(key_mask, (key_mask.shape[0], keys))
    if segment_ids is not None or key_mask is not None:
        start, end, ids = _within_segments(start, end, segment_ids, key_mask)
    seen = Visibility(start, end, *ids, mask, *flags)
    if mask is not None:
        start, end = first_and_last(jnp.any(dense(seen, keys), axis=1))
        seen = Visibility(start, end, *ids, mask, *flags)
    return seen


def _as_positions(x: Array) -> Array:
    """Integers of any dtype as int32, cut to the range of positions."""
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger) and x.dtype.itemsize >= 4:
        x = jnp.minimum(x, LARGEST_POSITION)
    elif x.dtype.itemsize >= 4:
        x = jnp.clip(x, -LARGEST_POSITION, LARGEST_POSITION)
    return x.astype(jnp.int32)


def _without_empty(start: Array, end: Array) -> tuple[Array, Array]:
    start, end = jnp.broadcast_arrays(start, end)
    empty = start >= end
    return jnp.where(empty, 0, start), jnp.where(empty, 0, end)


def first_and_last(seen: Array) -> tuple[Array, Array]:
    """(B, T, S) -> the tightest intervals, (B, T)."""
    some = jnp.any(seen, axis=-1)
    start = jnp.argmax(seen, axis=-1).astype(jnp.int32)
    end = seen.shape[-1] - jnp.argmax(seen[..., ::-1], axis=-1).astype(jnp.int32)
    return jnp.where(some, start, 0), jnp.where(some, end, 0)


def _within_segments(
    start: Array, end: Array, segment_ids: tuple[Array, Array] | None, key_mask: Array | None
) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """The tightest intervals that hold all visible keys, and ``(query_ids, key_ids, contiguous)``.

    The keys are sorted by segment and position, hidden ones last. A search finds the two ends of a query's interval in
    that order, and the query sees the keys between them. So the segments may come in any order.
    """
    queries = start.shape[1]
    if segment_ids is None:
        assert key_mask is not None
        segment_ids = (jnp.zeros((1, queries), jnp.int32), jnp.zeros((1, key_mask.shape[1]), jnp.int32))
    keys = segment_ids[1].shape[1]
    given = (start, end, *segment_ids, *(() if key_mask is None else (key_mask,)))
    batch = next((x.shape[0] for x in given if x.shape[0] != 1), 1)  # may be symbolic
    start, end, query_ids, key_ids = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in given[:4])

    visible = jnp.full((batch, 1), keys, jnp.int32)
    hidden: tuple[Array, ...] = ()
    if key_mask is not None:
        key_mask = jnp.broadcast_to(key_mask, (batch, keys))
        visible, hidden = jnp.sum(key_mask, axis=1, keepdims=True, dtype=jnp.int32), ((~key_mask).astype(jnp.int32),)
    ids, order = _sorted((*hidden, key_ids))

    wanted = jnp.concatenate([query_ids, query_ids, query_ids, key_ids], axis=1)
    place = jnp.concatenate([start, end, jnp.zeros_like(start), jnp.zeros_like(order)], axis=1)
    first, stop, query_ids, key_ids = jnp.split(
        _before(ids, order, visible, wanted, place), [queries, 2 * queries, 3 * queries], axis=1
    )
    some = first < stop
    start = jnp.where(some, _taken(order, jnp.minimum(first, keys - 1)), 0)
    end = jnp.where(some, _taken(order, jnp.maximum(stop - 1, 0)) + 1, 0)
    contiguous = jnp.all(end - start == jnp.where(some, stop - first, 0), axis=1)
    query_ids = jnp.where(some, query_ids, _HIDDEN_QUERY)
    if key_mask is not None:
        key_ids = jnp.where(key_mask, key_ids, _HIDDEN_KEY)
    return start, end, (query_ids, key_ids, contiguous)


def _sorted(by: tuple[Array, ...]) -> tuple[Array, Array]:
    """The last array ``(B, S)``, sorted by all of them and then by position, and the positions."""
    position = jnp.broadcast_to(jnp.arange(by[-1].shape[1], dtype=jnp.int32), by[-1].shape)
    # Ids keep their dtype, so that 64-bit ids stay apart. No two entries are equal, and a stable sort takes longer.
    *_, ids, order = lax.sort((*by, position), dimension=1, is_stable=False, num_keys=len(by) + 1)
    return ids, order


def _before(ids: Array, order: Array, visible: Array, wanted: Array, place: Array) -> Int[Array, "B n"]:
    """How many of the first ``visible`` sorted pairs ``(ids, order)`` come before ``(wanted, place)``.

    By bisection, unrolled: XLA makes one kernel of it.
    """
    count = jnp.zeros_like(place)
    for bit in reversed(range(ids.shape[1].bit_length())):
        further = count + (1 << bit)
        last = jnp.minimum(further, ids.shape[1]) - 1
        id, at = _taken(ids, last), _taken(order, last)
        comes_before = (further <= visible) & ((id < wanted) | ((id == wanted) & (at < place)))
        count = jnp.where(comes_before, further, count)
    return count


# vmap goes row by row. So XLA sees that no row needs another, and divides them among devices without sending any.


def _taken(x: Array, index: Array) -> Array:
    """``x[b, index[b]]``."""
    return jax.vmap(lambda x, index: x[index])(x, index)


def _put(index: Array, x: Array, size: int) -> Array:
    """(B, size), ``x[b, i]`` at ``index[b, i]``, which are unique; an index beyond the end is dropped."""
    return jax.vmap(lambda index, x: jnp.zeros(size, x.dtype).at[index].set(x, mode="drop"))(index, x)


def dense(seen: Visibility, keys: int) -> Bool[Array, "#B #N T S"]:
    """True where a key is visible. For small problems, and for sums over it that XLA fuses."""
    columns = jnp.arange(keys, dtype=jnp.int32)
    visible = (seen.start[..., None] <= columns[None, None]) & (columns[None, None] < seen.end[..., None])
    if seen.query_ids is not None and seen.key_ids is not None:
        visible = visible & (seen.query_ids[:, :, None] == seen.key_ids[:, None, :])
    visible = visible[:, None]
    return visible if seen.mask is None else visible & seen.mask


def seeing_queries(seen: Visibility, keys: int) -> Bool[Array, "#B T #N"]:
    """Which queries see some key."""
    if seen.mask is None or seen.mask.shape[1] == 1:  # the intervals are tight
        return (seen.start < seen.end)[..., None]
    return jnp.moveaxis(jnp.any(dense(seen, keys), axis=3), 1, 2)


def seen_keys(seen: Visibility, keys: int, kv_heads: int) -> Bool[Array, "#B S #K"]:
    """Which keys some query sees."""
    if seen.mask is not None:
        by_head = jnp.any(dense(seen, keys), axis=2)
        if by_head.shape[1] > 1:
            by_head = jnp.any(by_head.reshape(by_head.shape[0], kv_heads, -1, keys), axis=2)
        return jnp.moveaxis(by_head, 1, 2)
    if seen.query_ids is None or seen.key_ids is None:
        return _covered(seen.start, seen.end, keys)[..., None]
    # the same among the keys sorted by segment, put back in their order
    batch = seen.start.shape[0]
    ids, order = _sorted((jnp.broadcast_to(seen.key_ids, (batch, keys)),))
    every = jnp.full((batch, 1), keys, jnp.int32)
    first, stop = (_before(ids, order, every, seen.query_ids, place) for place in (seen.start, seen.end))
    return (_put(order, _covered(first, stop, keys), keys) & (seen.key_ids >= 0))[..., None]


def _covered(start: Array, end: Array, keys: int) -> Bool[Array, "B S"]:
    """Which positions lie in some interval: each adds 1 from its start on, and takes 1 off from its end on."""
    steps = jax.vmap(lambda start, end: jnp.zeros(keys + 1, jnp.int32).at[start].add(1).at[end].add(-1))
    return jnp.cumsum(steps(start, end), axis=1)[:, :keys] > 0


def without_hidden(query: Array, key: Array, value: Array, seen: Visibility) -> tuple[Array, Array, Array]:
    """The arrays with zeros at queries that see no key and at keys that none sees: NaN times a weight of 0 is NaN."""
    if seen.complete:
        return query, key, value
    keys = seen_keys(seen, key.shape[1], key.shape[2])[..., None]
    queries = seeing_queries(seen, key.shape[1])[..., None]
    return jnp.where(queries, query, 0), jnp.where(keys, key, 0), jnp.where(keys, value, 0)
