"""Which tiles a program visits, and which keys of them its queries see.

Tensors that travel together are a NamedTuple. Compile-time constants are in ``c``, see ``constants.py``.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Visible(NamedTuple):
    """Where the visibility lies, of one batch entry and head."""

    start: tl.tensor  # (T,)
    end: tl.tensor
    query_ids: tl.tensor
    key_ids: tl.tensor  # (S,)
    mask: tl.tensor  # (T, S)
    order: tl.tensor  # tiles in the order that they are visited, of the program's own tile
    T: tl.tensor  # one past the last query that counts
    S: tl.tensor


class Tiles(NamedTuple):
    """Which tiles a program visits: ``wholes`` of them from ``whole`` on uncompared, ``edges`` on both sides compared.

    With a mask these are places in a list.
    """

    low: tl.tensor  # the first edge
    left: tl.tensor  # edges before the whole tiles
    whole: tl.tensor
    wholes: tl.tensor
    edges: tl.tensor


class Intervals(NamedTuple):
    """Which keys the queries of a tile see."""

    start: tl.tensor  # (BM,)
    end: tl.tensor
    ids: tl.tensor
    m0: tl.tensor  # the first query


@triton.jit
def visible_to(start, end, query_ids, key_ids, mask, order, batch, head, T, S, c: tl.constexpr):
    """The visibility as head ``head`` of batch entry ``batch`` has it; ``order`` is still that of all its tiles."""
    entry = batch.to(tl.int64) * c.PER_BATCH
    mask_row = tl.cast(S, tl.int64) if c.MASK_S else tl.cast(1, tl.int64)
    mask_head = mask_row * T if c.MASK_T else mask_row
    mask_batch = mask_head * c.HEADS if c.MASK_N else mask_head
    mask += batch * mask_batch * c.MASK_B + head * mask_head * c.MASK_N
    return Visible(start + entry * T, end + entry * T, query_ids + entry * T, key_ids + entry * S, mask, order, T, S)


@triton.jit
def visible_to_queries(start, end, query_ids, key_ids, mask, order, at, T, S, c: tl.constexpr):
    """The same, of a program for a tile of queries."""
    order += at.row * tl.cdiv(S, c.BN)
    all = visible_to(start, end, query_ids, key_ids, mask, order, at.batch, at.head, T, S, c)
    return Visible(all.start, all.end, all.query_ids, all.key_ids, all.mask, all.order, at.stop, S)


@triton.jit
def table_row(batch, head, tiles, tile, c: tl.constexpr):
    """Which row of a table is a tile's own."""
    row = batch.to(tl.int64) * c.PER_BATCH
    if c.PER_HEAD:
        row = row * c.HEADS + head
    return row * tiles + tile


@triton.jit
def load_tiles(table, row):
    """``Tiles`` from a table's row: first tile visited, first whole one, one past the last whole one, and visited."""
    low = tl.load(table + 4 * row)
    whole = tl.load(table + 4 * row + 1)
    whole_end = tl.load(table + 4 * row + 2)
    high = tl.load(table + 4 * row + 3)
    return Tiles(low, whole - low, whole, whole_end - whole, high - low - (whole_end - whole))


@triton.jit
def visited(tiles, order, i, EDGE: tl.constexpr, LEFT: tl.constexpr, c: tl.constexpr):
    """The i-th whole tile, or the i-th edge. LEFT: there may be edges before the whole tiles.

    The edges on both sides are one loop: a second one would double the kernel, and cost it registers.
    """
    if EDGE:
        if LEFT:
            tile = tiles.low + i + tl.where(i < tiles.left, 0, tiles.wholes)
        else:
            tile = tiles.wholes + i
    else:
        tile = tiles.whole + i
    if c.MASK:
        tile = tl.load(order + tile)
    return tile


@triton.jit
def key_tile(keys, i, EDGE: tl.constexpr, c: tl.constexpr):
    """The first key of the i-th tile that is visited."""
    return visited(keys.tiles, keys.visible.order, i, EDGE, not (c.FROM_FIRST or c.MASK), c) * c.BN


@triton.jit
def load_intervals(visible, m0, c: tl.constexpr):
    """Rows beyond the last query get the last query's."""
    rows = tl.minimum(m0 + tl.arange(0, c.BM), visible.T - 1)
    end = tl.load(visible.end + rows)
    start = tl.zeros((c.BM,), tl.int32)
    if not c.FROM_FIRST:
        start = tl.load(visible.start + rows)
    ids = start
    if c.IDS:
        ids = tl.load(visible.query_ids + rows)
    return Intervals(start, end, ids, m0)


@triton.jit
def sees(intervals, columns, visible, KEYS_FIRST: tl.constexpr, c: tl.constexpr):
    """Whether the tile's queries see the keys ``columns``: (BM, BN), or (BN, BM) if KEYS_FIRST."""
    row: tl.constexpr = 0 if KEYS_FIRST else 1
    start = tl.expand_dims(intervals.start, row)
    end = tl.expand_dims(intervals.end, row)
    column = tl.expand_dims(columns, 1 - row)
    if c.FROM_FIRST:
        seen = column < end
    else:  # one comparison: below the start the difference is huge
        seen = (column - start).to(tl.uint32, bitcast=True) < (end - start).to(tl.uint32, bitcast=True)
    if c.IDS:
        ids = tl.load(visible.key_ids + columns, mask=columns < visible.S, other=-1)
        seen = seen & (tl.expand_dims(intervals.ids, row) == tl.expand_dims(ids, 1 - row))
    if c.MASK:
        queries = intervals.m0 + tl.arange(0, c.BM)
        offset = tl.expand_dims(queries, row).to(tl.int64) * (visible.S if c.MASK_S else 1) * c.MASK_T
        inside = (tl.expand_dims(queries, row) < visible.T) & (column < visible.S)
        seen = seen & (tl.load(visible.mask + offset + column * c.MASK_S, mask=inside, other=0) != 0)
    return seen
