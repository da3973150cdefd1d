"""Shared by the kernels: tiles of rows, softmax weights, products of rounded operands.

A tile is a (BLOCK, DP) piece of a (length, D) matrix whose rows are STRIDE elements apart, padded with zeros to the
power of two DP. Logits are in units of log 2, and ``lse`` is the log2 of the normaliser.

If queries and keys are huge, products of 1e5 and more nearly cancel against three numbers of a row: q.k against the
normaliser, x.k and u.k against the row's part of a_ij and b_ij. One float32 number would round these to 1e-7 of the
product. With EXACT each is two numbers: one near the products, which their sum begins with, and a rest, found from the
remainder of those very products. This needs the same bits of a product in every kernel, so each sums in the same order.
(At HIGH a product of two tf32 halves may still differ by a rounding in the key kernel, which has its operands swapped.)

Tensors that travel together are a NamedTuple. Compile-time constants are in ``c``, see ``constants.py``.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flashlla_jax.kernels.visible import Intervals, Tiles, Visible, key_tile, load_tiles, sees, table_row


class Rows(NamedTuple):
    """The queries of a tile."""

    Q: tl.tensor  # (BM, DP), in the products' dtype
    lse: tl.tensor  # (BM,), EXACT: the largest logit, and the log2 of the sum of the weights relative to it
    lse_rest: tl.tensor
    kbar: tl.tensor  # (BM, DP), relative to the keys' origin
    lam: tl.tensor  # (BM,)
    intervals: Intervals


class Keys(NamedTuple):
    """The keys that a tile of queries may see."""

    k: tl.tensor  # pointers to the first key and value of the head
    v: tl.tensor
    origin: tl.tensor  # (DP,), subtracted from the keys
    tiles: Tiles
    visible: Visible


class QueryTile(NamedTuple):
    """The queries of a program: those of a head from ``m0`` on, BM at the most, before ``stop``."""

    m0: tl.tensor
    stop: tl.tensor
    full: tl.tensor  # one past the last that has a place where every row of a tile has one, used or not
    row: tl.tensor  # of the table
    batch: tl.tensor
    head: tl.tensor
    kv_head: tl.tensor


class KeyTile(NamedTuple):
    """The keys and values whose gradients a program forms."""

    K: tl.tensor
    V: tl.tensor
    n0: tl.tensor


@triton.jit
def query_program(order, T, c: tl.constexpr):
    """``QueryTile``: of which queries of a head a program is. Where tiles are cut, ``order`` says it."""
    count = tl.cdiv(T, c.BM)
    if c.CUT:
        count += count // c.CUT
        head = tl.program_id(0) % c.HEADS  # the most work first
        number = tl.program_id(0) // c.HEADS % count
    else:
        number = count - 1 - tl.program_id(0) % count  # the longest prefixes first
        head = tl.program_id(0) // count % c.HEADS
    batch = tl.program_id(0) // count // c.HEADS
    row = table_row(batch, head, count, number, c)
    m0 = number * c.BM
    full = m0 + c.BM
    stop = T
    if c.CUT:
        m0 = tl.load(order + 2 * row)
        full = tl.load(order + 2 * row + 1)
        stop = tl.minimum(full, T)
    return QueryTile(m0, stop, full, row, batch, head, head // (c.HEADS // c.KV_HEADS))


@triton.jit
def key_program(S, c: tl.constexpr):
    """For a program with a tile of keys: the number of tiles, then its tile, batch and key head."""
    tiles = tl.cdiv(S, c.BN)
    tile = tl.program_id(0) % tiles  # the first keys are seen by the most queries
    kv_head = tl.program_id(0) // tiles % c.KV_HEADS
    batch = tl.program_id(0) // tiles // c.KV_HEADS
    return tiles, tile, batch, kv_head


@triton.jit
def head_base(pointer, batch, length, head, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where head ``head`` of batch ``batch`` starts in a contiguous (B, length, HEADS, WIDTH) array; 64-bit."""
    return pointer + (batch.to(tl.int64) * length * HEADS + head) * WIDTH


@triton.jit
def tile_pointers(base, start, STRIDE: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr):
    # the tile's start is 64-bit; offsets within the tile fit in 32
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, DP)
    return base + tl.cast(start, tl.int64) * STRIDE + (rows[:, None] * STRIDE + columns[None, :])


@triton.jit
def tile_mask(start, length, D: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    columns = tl.arange(0, DP)
    return (rows[:, None] < length) & (columns[None, :] < D)


@triton.jit
def load_tile(
    base,
    start,
    length,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Zero beyond the matrix. RAGGED: the tile may reach past the last row. UPCAST: to float32."""
    pointers = tile_pointers(base, start, STRIDE, BLOCK, DP)
    if RAGGED:
        tile = tl.load(pointers, mask=tile_mask(start, length, D, BLOCK, DP), other=0.0)
    elif D == DP:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=tl.arange(0, DP)[None, :] < D, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_key_tile(k, v, n0, batch, kv_head, S, c: tl.constexpr):
    """The ``KeyTile`` that begins at key n0."""
    k_base = head_base(k, batch, S, kv_head, c.KV_HEADS, c.D)
    v_base = head_base(v, batch, S, kv_head, c.KV_HEADS, c.DV)
    K = load_tile(k_base, n0, S, c.KV_HEADS * c.D, c.D, c.BN, c.DP, True, c.UPCAST)
    V = load_tile(v_base, n0, S, c.KV_HEADS * c.DV, c.DV, c.BN, c.DVP, True, c.UPCAST)
    return KeyTile(K, V, n0)


@triton.jit
def load_queries(base, m0, length, RAGGED: tl.constexpr, c: tl.constexpr):
    """A tile of query, x or u: (BM, DP)."""
    return load_tile(base, m0, length, c.HEADS * c.D, c.D, c.BM, c.DP, RAGGED, c.UPCAST)


@triton.jit
def load_cotangents(base, m0, length, RAGGED: tl.constexpr, c: tl.constexpr):
    """A tile of g: (BM, DVP)."""
    return load_tile(base, m0, length, c.HEADS * c.DV, c.DV, c.BM, c.DVP, RAGGED, c.UPCAST)


@triton.jit
def load_keys(keys, n0, RAGGED: tl.constexpr, c: tl.constexpr):
    """A tile of keys relative to their origin: (BN, DP)."""
    K = load_tile(keys.k, n0, keys.visible.S, c.KV_HEADS * c.D, c.D, c.BN, c.DP, RAGGED, c.UPCAST)
    if c.UPCAST:
        K -= keys.origin[None, :]
    return K


@triton.jit
def load_values(keys, n0, RAGGED: tl.constexpr, c: tl.constexpr):
    """A tile of values: (BN, DVP)."""
    return load_tile(keys.v, n0, keys.visible.S, c.KV_HEADS * c.DV, c.DV, c.BN, c.DVP, RAGGED, c.UPCAST)


@triton.jit
def load_origin(origins, m0, batch, kv_head, T, c: tl.constexpr):
    """What keys are taken relative to for the queries of a tile where products are in float32 (UPCAST).

    The logits change by a constant per query and the regression not at all, but what a common offset of the keys would
    lose to rounding is kept. One origin serves an aligned block of 32 queries (``origin.py``), the same in all kernels,
    so that what one keeps another can use. bfloat16 keys stay as they are: their differences would have to be rounded.

    It is the only row of a tile that is summed. Of so few numbers Triton would take a plain load as cheap, and repeat
    it, and the subtraction from every tile of keys, in each layout that a product wants: more registers than there are,
    and no pipeline. A sum it makes once.
    """
    origin = tl.zeros((c.DP,), tl.float32)
    if c.UPCAST:
        tl.static_assert(c.BM <= 32)
        base = head_base(origins, batch, tl.cdiv(T, 32), kv_head, c.KV_HEADS, c.D)
        base += (m0 // 32).to(tl.int64) * c.KV_HEADS * c.D
        origin = tl.sum(load_tile(base, 0, 1, c.D, c.D, 32, c.DP, True, True), 0)
    return origin


@triton.jit
def keys_of(k, v, origins, table, at, visible, T, S, c: tl.constexpr):
    """The ``Keys`` of a program for a tile of queries."""
    return Keys(
        head_base(k, at.batch, S, at.kv_head, c.KV_HEADS, c.D),
        head_base(v, at.batch, S, at.kv_head, c.KV_HEADS, c.DV),
        load_origin(origins, at.m0, at.batch, at.kv_head, T, c),
        load_tiles(table, at.row),
        visible,
    )


@triton.jit
def relative_queries(Q, origin, anchors, m0, batch, kv_head, T, c: tl.constexpr):
    """The queries relative to what their keys are, and what that takes off their products with keys.

    One after the other: the sum of anchor and origin would be rounded.
    """
    q = Q.to(tl.float32)
    taken_off = tl.sum(q * origin[None, :], 1)
    if c.ANCHORED:
        base = head_base(anchors, batch, T, kv_head, c.KV_HEADS, c.D)
        anchor = load_tile(base, m0, T, c.KV_HEADS * c.D, c.D, c.BM, c.DP, True, True)
        taken_off += tl.sum(q * anchor, 1)
        q -= anchor
    return q - origin[None, :], taken_off


@triton.jit
def store_tile(base, tile, start, length, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr):
    pointers = tile_pointers(base, start, STRIDE, BLOCK, DP)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=tile_mask(start, length, D, BLOCK, DP))


@triton.jit
def store_queries(base, tile, m0, length, c: tl.constexpr):
    store_tile(base, tile, m0, length, c.HEADS * c.D, c.D, c.BM, c.DP)


@triton.jit
def load_rows(base, start, length, STRIDE: tl.constexpr, BLOCK: tl.constexpr, other):
    """One number per row; ``other`` beyond the last."""
    rows = start + tl.arange(0, BLOCK)
    return tl.load(base + rows.to(tl.int64) * STRIDE, mask=rows < length, other=other)


@triton.jit
def store_rows(base, values, start, length, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    tl.store(base + rows.to(tl.int64) * STRIDE, values, mask=rows < length)


@triton.jit
def load_pairs(base, start, BLOCK: tl.constexpr):
    """Two numbers per row, kept side by side in a (rows, 2) float32 matrix that has every row of the tile."""
    start = tl.multiple_of(start, BLOCK)
    # as one 64-bit number: every thread loads the pairs that it needs, so fewer loads take less time
    pairs = tl.load(base.to(tl.pointer_type(tl.int64), bitcast=True) + (start + tl.arange(0, BLOCK)))
    return pairs.to(tl.int32).to(tl.float32, bitcast=True), (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def store_full(base, values, at, STRIDE: tl.constexpr, c: tl.constexpr):
    """One number per row of a tile of queries, those beyond the last query too: there is a place for them."""
    rows = at.m0 + tl.arange(0, c.BM)
    if c.CUT:
        tl.store(base + STRIDE * rows, values, mask=rows < at.full)
    else:
        tl.store(base + STRIDE * rows, values)


@triton.jit
def store_pairs(base, first, second, at, c: tl.constexpr):
    store_full(base, first, at, 2, c)
    store_full(base + 1, second, at, 2, c)


@triton.jit
def as_logits(products, c: tl.constexpr):
    """SCALE q.k. EXACT: with the sign of SCALE, not its size.

    A product by SCALE is rounded, or fused with the sum that follows, as the compiler likes it in each loop; so it may
    only follow the difference of two large logits.
    """
    if not c.EXACT:
        products = products * c.SCALE
    elif c.SCALE < 0:
        products = -products
    return products


@triton.jit
def log_weights(s, lse, rest, c: tl.constexpr):
    """log2 of the weights relative to a normaliser."""
    if c.EXACT:
        s = (s - lse) * c.STEEPNESS - rest
    else:
        s = s - lse
    return s


@triton.jit
def logits(rows, K, n0, keys, EDGE: tl.constexpr, c: tl.constexpr):
    """``as_logits`` of a tile pair, (BM, BN); -inf where hidden."""
    s = as_logits(tl.dot(rows.Q, tl.trans(K), input_precision=c.PRECISION), c)
    if EDGE:
        s = tl.where(sees(rows.intervals, n0 + tl.arange(0, c.BN), keys.visible, False, c), s, -float("inf"))
    return s


@triton.jit
def weights(rows, K, n0, keys, EDGE: tl.constexpr, c: tl.constexpr):
    """p_ij of a tile pair, (BM, BN); 0 where hidden."""
    s = logits(rows, K, n0, keys, EDGE, c)
    return tl.math.exp2(log_weights(s, rows.lse[:, None], rows.lse_rest[:, None], c))


@triton.jit
def with_b0(products, b0, b0_rest, CARE: tl.constexpr, c: tl.constexpr):
    """b_ij, from a product and its row's numbers. What is small comes last, after the large parts have cancelled.

    That is b0_rest, with the most CARE.
    """
    b = products + b0
    if (CARE == c.MOST_CARE) and (c.BALANCED_ABOVE < float("inf")):
        b += b0_rest
    return b


@triton.jit
def with_a0(products, a0, a0_rest, CARE: tl.constexpr, c: tl.constexpr):
    """a_ij, as ``with_b0`` forms b_ij. EXACT: what comes last is 1."""
    a = with_b0(products, a0, a0_rest, CARE, c)
    if c.EXACT:
        a += 1.0
    return a


@triton.jit
def moved(number, move):
    """The sum as two numbers, what rounding the first one left being the second. The move is the smaller."""
    total = number + move
    return total, move - (total - number)


@triton.jit
def key_scale(keys, c: tl.constexpr):
    """The variance of a key's feature: the scale that a ridge is small or large against.

    From the last tile of keys that every query of the tile sees, so that no query's arithmetic depends on keys hidden
    from it. Without such a tile it is huge: that errs on the careful side, and is cheap, since few keys are seen.
    """
    n0 = key_tile(keys, tl.maximum(keys.tiles.wholes - 1, 0), False, c)
    K = load_tile(keys.k, n0, keys.visible.S, c.KV_HEADS * c.D, c.D, c.BN, c.DP, True, c.UPCAST).to(tl.float32)
    mean = tl.sum(K, 0) * (1.0 / c.BN)
    centred = tl.where((tl.arange(0, c.DP) < c.D)[None, :], K - mean[None, :], 0.0)
    variance = tl.sum(tl.sum(centred * centred, 1), 0) * (1.0 / (c.BN * c.D))
    return tl.where(keys.tiles.wholes > 0, variance, 1e30)


@triton.jit
def one_key_dominates(omega):
    """Whether one key of a row holds a quarter of the weight; omega is one over the largest weight's share."""
    return (omega < 4.0) & (omega > 0.0)


@triton.jit
def is_hard(lam, omega, scale2, c: tl.constexpr):
    """Whether rounding the weights of a row to 8 bits would show in its solution.

    The roundings of n equal weights average out to sqrt(1 / n) of one; n is about omega, one over the largest weight.
    The ridge has to be large beside that share of the covariance. If one key holds a quarter of the weight, the
    covariance of the tile's keys says little of the row's own.
    """
    return (lam * tl.sqrt(omega) < c.HARD_BELOW * scale2) & (omega > 0.0) | one_key_dominates(omega)


@triton.jit
def some(rows):
    """Whether it is true for some row of the tile."""
    return tl.max(rows.to(tl.int32), 0) > 0


@triton.jit
def rounded_unless(hard, t, dtype: tl.constexpr, c: tl.constexpr):
    """Weights, rounded to one half in rows that are not hard: a row's bits must not depend on the rows beside it."""
    if not c.SPLIT_ALL:
        t = tl.where(hard[:, None], t, t.to(dtype).to(tl.float32))
    return t


@triton.jit
def as_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x rounded as a product of this dtype and precision rounds its operands."""
    if dtype == tl.float32:
        if PRECISION == "tf32":  # 10 bits of mantissa, to the nearest
            x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def as_two_operands(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """hi and lo: x as an operand, and what its rounding left."""
    hi = as_operand(x, dtype, PRECISION)
    return hi, as_operand(x - hi.to(tl.float32), dtype, PRECISION)


@triton.jit
def rounded_product(t, K, acc, sums, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + t K with t rounded to K's dtype (hi + lo if SPLIT), and sums + the row sums of t as it was rounded.

    Subtracting (row sum) kbar from the product leaves sum_j t_j (k_j - kbar) of the *rounded* t: the rounding error
    then lies in the span of the centred keys, where A is large, and is not amplified by 1 / lambda, nor by an offset
    of the keys. The sums, every column of (BM, 16) the same, are a product with ones: on the tensor cores they cost
    little; rounding back to float32 would double the load of the vector units.
    """
    ones = tl.full((K.shape[0], 16), 1.0, K.dtype)
    if SPLIT:
        if K.dtype == tl.bfloat16:  # cut, not rounded: one integer operation, and lo carries the remainder
            high = (t.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        else:
            high = t.to(K.dtype).to(tl.float32)
        hi = high.to(K.dtype)
        lo = (t - high).to(K.dtype)
        acc = tl.dot(hi, K, acc=acc, input_precision=PRECISION)
        acc = tl.dot(lo, K, acc=acc, input_precision=PRECISION)
        sums = tl.dot(hi, ones, acc=sums, input_precision=PRECISION)
        sums = tl.dot(lo, ones, acc=sums, input_precision=PRECISION)
    else:
        hi = t.to(K.dtype)
        acc = tl.dot(hi, K, acc=acc, input_precision=PRECISION)
        sums = tl.dot(hi, ones, acc=sums, input_precision=PRECISION)
    return acc, sums


@triton.jit
def one_column(sums):
    """The row sums out of the equal columns that ``rounded_product`` gathers; exact."""
    return tl.sum(sums, 1) * (1.0 / 16)
