"""The points that keys are taken relative to.

Relative keys change the logits by a constant per query, and the regression not at all. Rounding would lose digits to a
large common offset of the keys. Relative keys keep them. Any point near the keys that a query sees will do, if all its
keys share it.

The origin of a block of queries is the mean of a few keys that every query of the block sees. So not even the last bits
of a query's result depend on a key that is hidden from it. If the queries have no such key in common, the origin is the
mean of a few keys that some query sees.

Documents that are packed into one row, by ids or by a mask, may lie far from each other, and a block sees several. So
the keys of a document are first taken relative to one of them, its anchor.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax.interface import accumulation_dtype
from flashlla_jax.visibility import Visibility, dense

# The mean is of so many keys: enough to be near the middle, few enough to cost nothing beside the block's own work.
_FEW = 32


class Anchored(NamedTuple):
    """Keys relative to their documents' anchors, and the anchor of every query's document; 0 for a blind query."""

    key: Float[Array, "B S K D"]
    anchor: Float[Array, "B T K D"]


def anchored(key: Float[Array, "B S K D"], seen: Visibility) -> Anchored | None:
    """The keys in the accumulation dtype; None if the visibility has neither segment ids nor a mask.

    The anchor is the first key of the document that some query sees. Without a window every query of the document sees
    it. With one, some do not. So a key that is not finite is no anchor, and does them no harm.
    """
    documents = _documents(seen, key.shape[1])
    if documents is None:
        return None
    batch, keys = key.shape[:2]

    def of_entry(key: Array, start: Array, query_ids: Array, key_ids: Array) -> Anchored:
        key = key.astype(accumulation_dtype(key.dtype))
        first = jnp.full(keys, keys, jnp.int32).at[query_ids].min(start, mode="drop")

        def anchors(ids: Array) -> Array:
            place = first.at[ids].get(mode="fill", fill_value=keys)
            anchor = key.at[place].get(mode="fill", fill_value=0)
            return jnp.where(jnp.isfinite(anchor), anchor, 0)

        return Anchored(key - anchors(key_ids), anchors(query_ids))

    return jax.vmap(of_entry)(key, *(jnp.broadcast_to(x, (batch, x.shape[1])) for x in (seen.start, *documents)))


def _documents(seen: Visibility, keys: int) -> tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None:
    """Which document a query and a key belong to: numbers below ``keys``; ``keys`` for none."""
    if seen.mask is not None:
        # A mask shows documents if, for every key, the queries that see it all begin at the same key.
        visible = jnp.any(dense(seen, keys), axis=1)
        start = seen.start[..., None]
        low = jnp.min(jnp.where(visible, start, keys), axis=1)
        high = jnp.max(jnp.where(visible, start, 0), axis=1)
        apart = jnp.all(low >= high, axis=1, keepdims=True)
        query_ids, key_ids = jnp.where(apart, seen.start, keys), jnp.where(apart, low, keys)
    elif seen.query_ids is not None and seen.key_ids is not None:
        query_ids, key_ids = seen.query_ids, jnp.where(seen.key_ids >= 0, seen.key_ids, keys)
    else:
        return None
    return jnp.where(seen.start < seen.end, query_ids, keys), key_ids


def origins(key: Float[Array, "B S K D"], seen: Visibility, rows: int) -> Float[Array, "B I K D"]:
    """The origin of every block of ``rows`` queries and every key head, in the accumulation dtype.

    Blocks begin at multiples of ``rows``; the last one may be shorter. 0 for a block that sees nothing.
    """
    if seen.mask is not None:
        return _of_mask(key, seen, rows)
    keys = key.shape[1]
    blind = _blocks(seen.start >= seen.end, rows)
    start, end = (_blocks(x, rows) for x in (seen.start, seen.end))
    lowest = jnp.min(jnp.where(blind, keys, start), axis=2)
    last_start = jnp.max(jnp.where(blind, 0, start), axis=2)
    means, found = [], []
    for first, all_of_them in ((last_start, True), (lowest, False)):
        place, columns = _window(first, keys)
        visible = (start[..., None] <= place[:, :, None]) & (place[:, :, None] < end[..., None])
        if seen.query_ids is not None and seen.key_ids is not None:
            ids = _rows_of(jnp.broadcast_to(seen.key_ids, (start.shape[0], keys)), columns)
            visible = visible & (_blocks(seen.query_ids, rows)[..., None] == ids[:, :, None])
        chosen = jnp.all(visible | blind[..., None], axis=2) if all_of_them else jnp.any(visible, axis=2)
        chosen = chosen & jnp.any(~blind, axis=2)[..., None]
        columns = jnp.broadcast_to(columns, (key.shape[0], *columns.shape[1:]))
        few = jnp.swapaxes(_rows_of(key, columns), 2, 3).astype(accumulation_dtype(key.dtype))  # (B, I, K, few, D)
        means.append(_mean(few, jnp.broadcast_to(chosen[:, :, None], few.shape[:-1])))
        found.append(jnp.any(chosen, axis=2))
    return jnp.where(found[0][..., None, None], means[0], means[1])


def _of_mask(key: Array, seen: Visibility, rows: int) -> Array:
    """``origins`` with a mask, in memory proportional to the mask's. Any keys of the interval may be chosen."""
    batch, keys, heads, _ = key.shape
    visible = dense(seen, keys)  # (#B, #N, T, S)
    if visible.shape[1] > 1:
        visible = visible.reshape(visible.shape[0], heads, -1, *visible.shape[2:])
    else:
        visible = visible[:, None]
    blind = ~jnp.any(visible, axis=-1, keepdims=True)
    count = -(-visible.shape[3] // rows)
    padding = [(0, 0)] * 3 + [(0, count * rows - visible.shape[3]), (0, 0)]

    def blocks(x: Array, fill: bool) -> Array:
        x = jnp.pad(x, padding, constant_values=fill)
        return x.reshape(*x.shape[:3], count, rows, x.shape[4])

    some = jnp.any(blocks(visible, False), axis=(2, 4))  # (#B, #K, I, S)
    shared = jnp.all(blocks(visible | blind, True), axis=(2, 4)) & jnp.any(some, axis=-1, keepdims=True)
    chosen = jnp.where(jnp.any(shared, axis=-1, keepdims=True), shared, some)
    # the first few of them: an earlier key has a larger rank
    rank = jnp.where(chosen, keys - jnp.arange(keys, dtype=jnp.int32)[None, None, None], 0)
    rank, columns = lax.top_k(rank, min(_FEW, keys))
    columns, chosen = (jnp.broadcast_to(x, (batch, heads, *x.shape[2:])) for x in (columns, rank > 0))
    b, h = (jnp.arange(n, dtype=jnp.int32) for n in (batch, heads))
    few = key[b[:, None, None, None], columns, h[None, :, None, None]].astype(accumulation_dtype(key.dtype))
    return jnp.moveaxis(_mean(few, chosen), 1, 2)


def _blocks(x: Array, rows: int) -> Array:
    """(B, T) -> (B, I, rows), padded with the last query. All, or some, still see the same keys."""
    count = -(-x.shape[1] // rows)
    x = jnp.pad(x, [(0, 0), (0, count * rows - x.shape[1])], mode="edge")
    return x.reshape(x.shape[0], count, rows)


def _window(first: Int[Array, "#B I"], keys: int) -> tuple[Int[Array, "#B I few"], Int[Array, "#B I few"]]:
    """Positions from ``first`` on, and the same, cut to the positions that exist."""
    place = first[..., None] + jnp.arange(_FEW, dtype=jnp.int32)[None, None]
    return place, jnp.minimum(place, keys - 1)


def _rows_of(x: Array, columns: Int[Array, "B I few"]) -> Array:
    """x[b, columns[b, i, j]]."""
    batch = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None, None]
    return x[batch, columns]


def _mean(few: Float[Array, "*shape few D"], chosen: Bool[Array, "*shape few"]) -> Float[Array, "*shape D"]:
    number = jnp.maximum(jnp.sum(chosen, axis=-1, dtype=few.dtype), 1)
    return jnp.sum(jnp.where(chosen[..., None], few, 0), axis=-2) / number[..., None]
