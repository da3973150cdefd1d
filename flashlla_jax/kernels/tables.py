"""Which tiles a kernel visits, and which of them it need not compare: small int32 tables, made outside of the kernels.

A row, one for every tile of the program's own side, holds four numbers of tiles of the other side: the first one
visited, the first that is visible as a whole, one past the last such, and one past the last visited. From intervals
this takes memory linear in both lengths. With a mask the numbers are places in a list of the tiles that have something
to see, the whole ones first.

Where queries of two documents lie in one tile, every query would wait for the slowest, and no key is seen by all of
them: such a program takes some five times as long as others with as many keys, and a few of them at the end of a kernel
keep all others waiting. So there a tile may be cut in two, at the boundary, and the programs of all parts are listed,
those with the most work first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from flashlla_jax.visibility import Visibility, dense


class Table(NamedTuple):
    """The arrays for a kernel: the table, and a list (else one number).

    With a mask the table points into the list. Where tiles are cut the list has the queries of each row of the table:
    the first, and one past the last.
    """

    rows: Int[Array, "B N tiles 4"]
    order: Int[Array, "B N tiles others"]


class _Extremes(NamedTuple):
    """Of the intervals of a tile's queries, those that see nothing aside: (B, tiles) each."""

    first_start: Array
    last_start: Array
    first_end: Array
    last_end: Array


def by_query_tiles(seen: Visibility, keys: int, queries_per_tile: int, keys_per_tile: int, cut: int = 0) -> Table:
    """For each tile of queries, the tiles of keys.

    Args:
        seen: the visibility.
        keys: how many there are.
        queries_per_tile: of the kernel.
        keys_per_tile: of the kernel.
        cut: one tile of so many may be cut, so there are as many more rows; 0: tiles stay whole and in order.
    """
    if seen.mask is not None:
        some, every = _summary(seen, keys, queries_per_tile, keys_per_tile)
        return _listed(some, every)
    start, end = _by_tile(seen, queries_per_tile)
    if cut:
        return _cut(seen, start, end, keys, keys_per_tile, cut)
    return _table(seen, *_key_tiles(_extremes(start, end, start < end, keys), keys_per_tile))


def _cut(seen: Visibility, start: Array, end: Array, keys: int, keys_per_tile: int, cut: int) -> Table:
    """``by_query_tiles`` of starts and ends (B, tiles, rows) where tiles are cut."""
    _, tiles, rows = start.shape
    middle = _cuts(start, keys_per_tile, cut)[..., None]
    row = jnp.arange(rows, dtype=jnp.int32)[None, None]
    first = rows * jnp.arange(tiles, dtype=jnp.int32)[None, :, None]

    def parts(first: Array, second: Array) -> Array:
        return jnp.concatenate([first, second], axis=1)

    sees = parts(row < middle, row >= middle) & parts(start < end, start < end)
    tile = _extremes(parts(start, start), parts(end, end), sees, keys)
    table = _table(seen, *_key_tiles(tile, keys_per_tile)).rows[:, 0]
    m0, stop = parts(first + 0 * middle, first + middle), parts(first + middle, first + rows + 0 * middle)
    work = jnp.where(m0 < stop, table[..., 3:] - table[..., :1], -1)[..., 0]
    order = jnp.argsort(-work, axis=1, stable=True)[:, : tiles + tiles // cut, None]
    listed = jnp.take_along_axis(jnp.concatenate([table, m0, stop], axis=2), order, axis=1)[:, None]
    return Table(listed[..., :4], listed[..., 4:])


def _cuts(start: Int[Array, "B tiles rows"], least: int, cut: int) -> Int[Array, "B tiles"]:
    """Before which of its queries a tile is cut, where a document begins; its rows: it is not cut.

    One tile of ``cut`` may be, those where the most is saved: the length of the document before, at least ``least``.
    """
    tiles, rows = start.shape[1:]
    step = jnp.diff(start, axis=2)
    most = jnp.max(step, axis=2)
    number = jnp.arange(tiles, dtype=jnp.int32)[None]
    mine, other = most[:, :, None], most[:, None, :]
    before = (other > mine) | ((other == mine) & (number[:, None, :] < number[:, :, None]))
    rank = jnp.sum(before, axis=2, dtype=jnp.int32)
    chosen = (most >= least) & (rank < tiles // cut)
    return jnp.where(chosen, 1 + jnp.argmax(step, axis=2).astype(jnp.int32), rows)


def _key_tiles(tile: _Extremes, keys_per_tile: int) -> tuple[Array, Array, Array, Array]:
    """The columns of a row, of what the queries of a tile see."""
    low, high = tile.first_start // keys_per_tile, -(-tile.last_end // keys_per_tile)
    low = jnp.minimum(low, high)  # both 0 if nothing is seen
    return low, -(-tile.last_start // keys_per_tile), tile.first_end // keys_per_tile, high


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
    start, end = _by_tile(seen, queries_per_tile)
    tile = _extremes(start, end, start < end, keys)
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


def _by_tile(seen: Visibility, rows: int) -> tuple[Int[Array, "B tiles rows"], Int[Array, "B tiles rows"]]:
    """Starts and ends; beyond the last query they are its own."""
    padding = -seen.start.shape[1] % rows
    start, end = (jnp.pad(x, ((0, 0), (0, padding)), mode="edge") for x in (seen.start, seen.end))
    return start.reshape(start.shape[0], -1, rows), end.reshape(end.shape[0], -1, rows)


def _extremes(start: Array, end: Array, sees: Array, keys: int) -> _Extremes:
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
