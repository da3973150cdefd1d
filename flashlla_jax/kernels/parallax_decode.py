"""The kernels of a decode step of Parallax: what a query gathers in each split of the cache, and the output of all.

The cache is split as decode.py has it. A program of the first kernel takes one row and one split, and gathers there

    top = max_j s_j,  omega = sum_j p_j,  tau = sum_j p_j h_j,  sum_j p_j v_j,  sum_j p_j h_j v_j

with p_j = exp2(s_j - top) and h_j = k_j.r less the same of the first key that the row sees. These are sums, so a
program of the second kernel adds up the splits of a row. With t = tau / omega the output is

    o = (1 + t) vbar - sum_j p_j h_j v_j / omega

Where one key has nearly all the weight, t vbar and the last term cancel. So p and p h enter every sum as the same two
parts. Logits and h are one product, of the keys and a matrix that holds query and probe; both sums of the values are
another. So shared memory is read twice for a block of the cache.
"""

import triton
import triton.language as tl

from flashlla_jax.kernels.decode import (
    COLUMNS,
    NO_LOGIT,
    columns_of,
    load_columns,
    load_origin,
    load_values,
    load_vector,
    row_of,
    split_of,
    two_parts,
    visible_keys,
)

# Of a product's columns: those from here on are the second vector's, the probe's or that of p h.
SECOND: tl.constexpr = tl.constexpr(8)
# Splits that the second kernel reads at once.
AT_ONCE: tl.constexpr = tl.constexpr(16)


@triton.jit
def two_vectors(x, y, DTYPE: tl.constexpr, PARTS: tl.constexpr):
    """(len(x), COLUMNS): the parts of x, and from SECOND on those of y."""
    return columns_of(x, DTYPE, PARTS) + columns_of(y, DTYPE, PARTS, SECOND)


@triton.jit
def two_sums(columns):
    """What the first and the second vector's columns add up to, each (len(columns),)."""
    second = tl.arange(0, COLUMNS)[None, :] >= SECOND
    return tl.sum(tl.where(second, 0.0, columns), 1), tl.sum(tl.where(second, columns, 0.0), 1)


@triton.jit
def gather_kernel(q, k, v, r, interval_ptr, first_ptr, mask_ptr, T, S, tops, omegas, taus, sums, c: tl.constexpr):
    """One row, one split."""
    at = split_of(k, v, interval_ptr, first_ptr, mask_ptr, tl.program_id(0), T, S, c)
    d, dv = tl.arange(0, c.DP), tl.arange(0, c.DVP)
    origin = load_origin(at, d, c)
    query, probe = load_vector(q + at.row * c.D, d, c), load_vector(r + at.row * c.D, d, c)
    DTYPE: tl.constexpr = tl.float32 if c.UPCAST else (tl.bfloat16 if c.WIDEN else k.dtype.element_ty)
    PARTS: tl.constexpr = 1 if c.UPCAST else 2
    # a float32 query may go with a bfloat16 cache
    vectors = two_vectors(query, probe, DTYPE, 1 if c.UPCAST else 3)
    # float32 keys are taken relative to the origin at once; others as they are, which is exact
    shift = 0.0 if c.UPCAST else tl.sum(probe * origin, 0)

    top = NO_LOGIT
    weights = tl.zeros((c.BN,), tl.float32)  # added up at the end: a sum now would make all warps wait
    moved = tl.zeros((c.BN,), tl.float32)
    acc = tl.zeros((c.DVP, COLUMNS), tl.float32)
    for n0 in tl.range(at.low, at.high, c.BN, num_stages=c.STAGES):
        columns = n0 + tl.arange(0, c.BN)
        visible = visible_keys(at, columns, c)
        keys = load_columns(at, columns, d, visible, c)
        V = load_values(at, columns, visible, c)
        if c.UPCAST:
            keys -= origin[:, None]
        s, h = two_sums(tl.dot(tl.trans(keys), vectors, input_precision=c.PRECISION))
        s = tl.where(visible, s * c.SCALE, NO_LOGIT)
        new_top = tl.maximum(top, tl.max(s, 0))
        p = two_parts(tl.where(visible, tl.math.exp2(s - new_top), 0.0), DTYPE)
        ph = two_parts(p * (h - shift), DTYPE)
        shrink = tl.math.exp2(top - new_top)
        top = new_top
        weights = weights * shrink + p
        moved = moved * shrink + ph
        acc = tl.dot(tl.trans(V), two_vectors(p, ph, DTYPE, PARTS), acc=acc * shrink, input_precision=c.PRECISION)

    place = at.place
    tl.store(tops + place, top)
    tl.store(omegas + place, tl.sum(weights, 0))
    tl.store(taus + place, tl.sum(moved, 0))
    values, moved_values = two_sums(acc)
    tl.store(sums + place * 2 * c.DVP + dv, values)
    tl.store(sums + place * 2 * c.DVP + c.DVP + dv, moved_values)


@triton.jit
def merge_kernel(tops, omegas, taus, sums, T, S, o, c: tl.constexpr):
    """The output of one row; 0 where no split has a key."""
    number = tl.program_id(0)
    batch, token, head, _ = row_of(number, T, c)
    dv = tl.arange(0, c.DVP)
    place = number.to(tl.int64) * c.SPLITS
    all_splits = tl.arange(0, c.SPLITS_PADDED)
    top = tl.max(tl.load(tops + place + all_splits, mask=all_splits < c.SPLITS, other=NO_LOGIT), 0)
    omega = 0.0
    tau = 0.0
    values = tl.zeros((c.DVP,), tl.float32)
    moved_values = tl.zeros((c.DVP,), tl.float32)
    for i in range(0, c.SPLITS, AT_ONCE):
        splits = i + tl.arange(0, AT_ONCE)
        there = splits < c.SPLITS
        shrink = tl.math.exp2(tl.load(tops + place + splits, mask=there, other=NO_LOGIT) - top)
        omega += tl.sum(shrink * tl.load(omegas + place + splits, mask=there, other=0.0), 0)
        tau += tl.sum(shrink * tl.load(taus + place + splits, mask=there, other=0.0), 0)
        of_split = sums + (place + splits)[:, None] * 2 * c.DVP + dv[None, :]
        values += tl.sum(shrink[:, None] * tl.load(of_split, mask=there[:, None], other=0.0), 0)
        moved_values += tl.sum(shrink[:, None] * tl.load(of_split + c.DVP, mask=there[:, None], other=0.0), 0)
    blind = omega == 0.0
    total = tl.where(blind, 1.0, omega)
    out = ((1.0 + tau / total) * values - moved_values) / total
    row = ((batch * T + token) * c.HEADS + head) * c.DV
    tl.store(o + row + dv, tl.where(blind, 0.0, out), mask=dv < c.DV)
