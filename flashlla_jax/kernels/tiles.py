"""What the kernels share: tiles of rows, the visible range of keys, softmax weights, and products of rounded operands.

A tile is a (BLOCK, DP) piece of a (length, D) matrix whose rows are STRIDE elements apart, padded with zeros to the
power of two DP. Logits are in units of log 2: SCALE is qk_scale * log2(e), and ``lse`` is the log2 of the normaliser.
"""

import triton
import triton.language as tl


@triton.jit
def head_base(pointer, batch, length, head, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where head ``head`` of batch ``batch`` starts in a contiguous (B, length, HEADS, WIDTH) array; 64-bit."""
    return pointer + (batch.to(tl.int64) * length * HEADS + head) * WIDTH


@triton.jit
def tile_pointers(base, start, STRIDE: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr):
    # the tile's start is 64-bit, what is within the tile fits in 32
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
def load_pairs(base, start, BLOCK: tl.constexpr):
    """Two numbers per row, kept side by side in a (rows, 2) float32 matrix that has every row of the tile."""
    start = tl.multiple_of(start, BLOCK)
    # as one 64-bit number: every thread copies the pairs that it needs by itself, so fewer loads are less time
    pairs = tl.load(base.to(tl.pointer_type(tl.int64), bitcast=True) + (start + tl.arange(0, BLOCK)))
    return pairs.to(tl.int32).to(tl.float32, bitcast=True), (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def store_pairs(base, first, second, start, BLOCK: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    tl.store(base + 2 * rows, first)
    tl.store(base + 2 * rows + 1, second)


@triton.jit
def load_first(base, D: tl.constexpr, DP: tl.constexpr):
    """The first row, in float32."""
    columns = tl.arange(0, DP)
    return tl.load(base + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def load_origin(k_base, m0, T, S, STRIDE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, DP: tl.constexpr,
                CAUSAL: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """What keys are taken relative to where products are in float32 (UPCAST), for the queries of a tile.

    The logits change by a constant per query and the regression not at all, but what a common offset of the keys would
    lose to rounding is kept. It is the mean of the first keys, at most 32 of those that the queries see in common; the
    same in all kernels, so that what one keeps another can use: a tile lies in one aligned block of 32 queries.
    bfloat16 keys stay as they are: their differences would have to be rounded.
    """
    origin = tl.zeros((DP,), tl.float32)
    if UPCAST:
        tl.static_assert(BM <= 32)
        visible = m0 // 32 * 32 + S - T + 1 if CAUSAL else S
        count = tl.minimum(tl.minimum(visible, S), 32)
        first = load_first(k_base, D, DP)
        offsets = load_tile(k_base, 0, count, STRIDE, D, 32, DP, True, UPCAST) - first[None, :]
        origin = first + tl.sum(tl.where((tl.arange(0, 32) < count)[:, None], offsets, 0.0), 0) / count
    return origin


@triton.jit
def load_keys(k_base, n0, S, origin, STRIDE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr,
              RAGGED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """A tile of keys relative to ``origin``."""
    K = load_tile(k_base, n0, S, STRIDE, D, BN, DP, RAGGED, UPCAST)
    if UPCAST:
        K -= origin[None, :]
    return K


@triton.jit
def store_tile(base, tile, start, length, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr):
    pointers = tile_pointers(base, start, STRIDE, BLOCK, DP)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=tile_mask(start, length, D, BLOCK, DP))


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
def key_range(m0, T, S, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(whole, end): key tiles below ``whole`` are seen by every query of the tile, those up to ``end`` by some."""
    if CAUSAL:  # aligned at the end: query i sees keys up to i + S - T
        first = tl.minimum(m0 + S - T + 1, S)
        end = tl.minimum(m0 + BM + S - T, S)
    else:
        first = S
        end = S
    # Through a reduction, which LLVM cannot see through: told that the masked tiles are at most a few, it peels their
    # loop, and ptxas then serialises every wgmma of the kernel (its C7515), which takes up to twice the time.
    return tl.max(tl.zeros((BM,), tl.int32) + first // BN * BN, 0), end


@triton.jit
def logits(Q, K, m0, n0, T, S, SCALE, CAUSAL: tl.constexpr, MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """SCALE q.k of a tile pair, (BM, BN); -inf where hidden if MASK."""
    s = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * SCALE
    if MASK:
        columns = n0 + tl.arange(0, BN)
        if CAUSAL:
            visible = tl.minimum(m0 + tl.arange(0, BM) + S - T + 1, S)
            s = tl.where(columns[None, :] < visible[:, None], s, -float("inf"))
        else:
            s = tl.where(columns[None, :] < S, s, -float("inf"))
    return s


@triton.jit
def as_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x rounded to what a product of this dtype and precision keeps of it."""
    if dtype == tl.float32:
        if PRECISION == "tf32":  # 10 bits of mantissa, to the nearest
            x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)
    else:
        x = x.to(dtype)
    return x


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
        if K.dtype == tl.bfloat16:  # cut, not rounded: one integer operation, and lo carries what is left
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
