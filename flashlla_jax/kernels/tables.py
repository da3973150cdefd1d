"""Which tiles a kernel visits, and which of them it need not compare: small int32 tables, made outside of the kernels.

A row, one for every tile of the program's own side, holds four numbers of tiles of the other side: the first one
visited, the first that is visible as a whole, one past the last such, and one past the last visited. From intervals
this takes memory linear in both lengths. With a mask the numbers are places in a list of the tiles that have something
to see, the whole ones first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from flashlla_jax.visibility import Visibility, dense


class Table(NamedTuple):
    """The arrays for a kernel: the table, and with a mask the list that it points into (else one number)."""

    rows: Int[Array, "B N tiles 4"]
    order: Int[Array, "B N tiles others"]


class _Extremes(NamedTuple):
    """Of the intervals of a tile's queries, those that see nothing aside: (B, tiles) each."""

    first_start: Array
    last_start: Array
    first_end: Array
    last_end: Array


def by_query_tiles(seen: Visibility, keys: int, queries_per_tile: int, keys_per_tile: int) -> Table:
    """For each tile of queries, the tiles of keys."""
    if seen.mask is not None:
        some, every = _summary(seen, keys, queries_per_tile, keys_per_tile)
        return _listed(some, every)
    tile = _extremes(seen, keys, queries_per_tile)
    low, high = tile.first_start // keys_per_tile, -(-tile.last_end // keys_per_tile)
    low = jnp.minimum(low, high)  # both 0 if nothing is seen
    return _table(seen, low, -(-tile.last_start // keys_per_tile), tile.first_end // keys_per_tile, high)


def by_key_tiles(seen: Visibility, keys: int, queries_per_tile: int, keys_per_tile: int) -> Table:
    """For each tile of keys, the tiles of queries.

    Exact where starts and ends grow with the query, as causality, windows and packing have it. Else a tile may be
    visited that has nothing to see, and a whole one be compared.
    """
    queries = seen.start.shape[1]
    if seen.mask is not None:
        some, every = _summary(seen, keys, queries_per_tile, keys_per_tile)
        if queries % queries_per_tile:  # the last one reaches past the queries
            every = every.at[:, :, -1].set(False)
        return _listed(jnp.swapaxes(some, 2, 3), jnp.swapaxes(every, 2, 3))
    tile = _extremes(seen, keys, queries_per_tile)
    last_start = tile.last_start
    if queries % queries_per_tile:
        last_start = last_start.at[:, -1].set(keys)
    tiles = -(-keys // keys_per_tile)
    key_start = jnp.arange(tiles, dtype=jnp.int32) * keys_per_tile
    key_end = jnp.minimum(key_start + keys_per_tile, keys)

    # one minimum or maximum each, over comparisons that XLA fuses into it: no (tiles, tiles) in memory, and no scan
    tile_number = jnp.arange(tile.first_end.shape[1], dtype=jnp.int32)[None, None]

    def first_above(x: Array, bounds: Array) -> Array:
        """The first tile of queries with more than each bound, or their number."""
        above = x[:, None] > bounds[None, :, None]
        return jnp.min(jnp.where(above, tile_number, x.shape[1]), axis=2)

    def past_last_below(x: Array, bounds: Array) -> Array:
        """One past the last tile of queries with less than each bound, or 0."""
        below = x[:, None] < bounds[None, :, None]
        return jnp.max(jnp.where(below, tile_number + 1, 0), axis=2)

    low, high = first_above(tile.last_end, key_start), past_last_below(tile.first_start, key_end)
    whole, whole_end = past_last_below(tile.first_end, key_end), first_above(last_start, key_start)
    return _table(seen, jnp.minimum(low, high), whole, whole_end, high)


def _extremes(seen: Visibility, keys: int, rows: int) -> _Extremes:
    padding = -seen.start.shape[1] % rows
    start, end = (jnp.pad(x, ((0, 0), (0, padding)), mode="edge") for x in (seen.start, seen.end))
    start, end = (x.reshape(x.shape[0], -1, rows) for x in (start, end))
    sees = start < end
    return _Extremes(
        jnp.min(jnp.where(sees, start, keys), axis=2),
        jnp.max(jnp.where(sees, start, 0), axis=2),
        jnp.min(jnp.where(sees, end, keys), axis=2),
        jnp.max(jnp.where(sees, end, 0), axis=2),
    )


def _table(seen: Visibility, low: Array, whole: Array, whole_end: Array, high: Array) -> Table:
    """low <= whole <= whole_end <= high, and no whole tiles where the ids have to be compared."""
    whole, whole_end = jnp.maximum(whole, low), jnp.minimum(whole_end, high)
    none = whole >= whole_end
    if seen.contiguous is not None:
        none = none | ~seen.contiguous[:, None]
    # all of the edges lie behind the whole tiles then
    whole, whole_end = jnp.where(none, low, whole), jnp.where(none, low, whole_end)
    rows = jnp.stack([low, whole, whole_end, high], axis=-1)[:, None]
    return Table(rows, jnp.zeros((1, 1, 1, 1), jnp.int32))


def _summary(
    seen: Visibility, keys: int, queries_per_tile: int, keys_per_tile: int
) -> tuple[Bool[Array, "B N I J"], Bool[Array, "B N I J"]]:
    """For each pair of tiles: whether any query sees any key, and whether every query that sees a key sees all.

    A query whose interval is empty is no hindrance: the kernels know it. One that sees no key in this head only is.
    """
    visible = dense(seen, keys)
    blind = (seen.start >= seen.end)[:, None, :, None]
    batch, heads, queries, _ = visible.shape
    pad = ((0, 0), (0, 0), (0, -queries % queries_per_tile), (0, -keys % keys_per_tile))

    def tiles(x: Array, reduce: Callable[..., Array], beyond: bool) -> Array:
        x = jnp.pad(x, pad, constant_values=beyond)
        x = x.reshape(batch, heads, x.shape[2] // queries_per_tile, queries_per_tile, -1, keys_per_tile)
        return reduce(x, axis=(3, 5))

    some = tiles(visible, jnp.any, False)
    # queries beyond the last are no hindrance, keys beyond the last are
    inside = jnp.arange(keys + pad[3][1], dtype=jnp.int32).reshape(1, 1, 1, -1, keys_per_tile)[..., -1] < keys
    return some, tiles(visible | blind, jnp.all, True) & inside & some


def _listed(some: Array, every: Array) -> Table:
    """The whole tiles first, those with something to see next."""
    rank = jnp.where(every, 0, jnp.where(some, 1, 2)).astype(jnp.int32)
    order = jnp.argsort(rank, axis=3, stable=True).astype(jnp.int32)
    wholes = jnp.sum(every, axis=3, dtype=jnp.int32)
    visited = jnp.sum(some, axis=3, dtype=jnp.int32)
    zero = jnp.zeros_like(wholes)
    return Table(jnp.stack([zero, zero, wholes, visited], axis=-1), order)
