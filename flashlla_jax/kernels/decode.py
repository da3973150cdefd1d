"""The kernels of a decode step: the moments of a query's keys, by split of the cache, and the solve from all splits.

For every query (row) the cache is cut into SPLITS parts, so that there is work for the whole GPU at any batch size. A
program of the first kernel takes BD of the key's features of one row and one split, and adds up

    top = max_j s_j,  omega = sum_j p_j,  kbar, vbar,  M = sum_j p_j (k_j - kbar) (k_j - kbar, v_j - vbar)^T

with p_j = exp2(s_j - top). All four sums over the features are products for the tensor cores. M is a product
of the weighted keys with the keys and values. The weighted keys are relative to a point near the mean, and are hi + lo
halves in registers. Keys and values stay in shared memory. How often it is read bounds this kernel at D = 128. The
logits and the two means are products with a vector: a matrix has the vector's parts in the first of its COLUMNS.
Products of float32 have a kernel of their own, decode_float32.py, with the same results.

A program of the second kernel merges the splits of one row (Chan, Golub and LeVeque 1979) and solves by conjugate
gradients on the matrix scaled to a unit diagonal. Nothing is added atomically: the same inputs give the same bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# The largest logit before any key, and of a split that sees no key. It is finite, so that there is no inf - inf.
NO_LOGIT: tl.constexpr = tl.constexpr(-3e38)
# Columns of a matrix that stands for a vector: the fewest that a product takes.
COLUMNS: tl.constexpr = tl.constexpr(16)
# The weighted keys are relative to the mean of so many keys.
FEW: tl.constexpr = tl.constexpr(32)


class Split(NamedTuple):
    """One split of a row: its keys, and where it is read and written."""

    low: tl.tensor  # the first key
    high: tl.tensor  # one past the last; as low if it has none
    first: tl.tensor  # position of the first key that the row sees
    row: tl.tensor  # number of the row among all queries and heads
    k: tl.tensor  # pointer to the keys of the row's key head
    v: tl.tensor  # and to its values
    mask: tl.tensor  # pointer to the row's mask, with MASK
    place: tl.tensor  # number of the split among those of all rows


class Partials(NamedTuple):
    """The sums of a split, for each of rows x SPLITS."""

    top: tl.tensor
    omega: tl.tensor
    means: tl.tensor  # (DP + DVP,): kbar and vbar
    moments: tl.tensor  # (DP, DP + DVP): M


@triton.jit
def row_of(number, T, c: tl.constexpr):
    """Batch entry, token, query head and key head of a row. The rows of one key head follow each other."""
    GROUP: tl.constexpr = c.HEADS // c.KV_HEADS
    member = number % GROUP
    token = number // GROUP % T
    kv_head = number // GROUP // T % c.KV_HEADS
    batch = (number // GROUP // T // c.KV_HEADS).to(tl.int64)
    return batch, token, kv_head * GROUP + member, kv_head


@triton.jit
def split_of(k, v, interval_ptr, first_ptr, mask_ptr, program, T, S, c: tl.constexpr):
    """The ``Split`` of a program. The splits of a row follow each other, and then the rows of a key head."""
    number, split = program // c.SPLITS, program % c.SPLITS
    batch, token, head, kv_head = row_of(number, T, c)
    query = batch * T + token
    start = tl.load(interval_ptr + 2 * query)
    end = tl.load(interval_ptr + 2 * query + 1)
    blocks = tl.cdiv(tl.cdiv(end - start, c.BN), c.SPLITS)
    low = start + split * blocks * c.BN
    mask = mask_ptr
    if c.MASK:
        mask += mask_offset(batch, token, head, T, S, c)
    return Split(
        low,
        tl.minimum(low + blocks * c.BN, end),
        first_seen(interval_ptr, first_ptr, query, head, c),
        query * c.HEADS + head,
        k + (batch * S * c.KV_HEADS + kv_head) * c.D,
        v + (batch * S * c.KV_HEADS + kv_head) * c.DV,
        mask,
        number.to(tl.int64) * c.SPLITS + split,
    )


@triton.jit
def mask_offset(batch, token, head, T, S, c: tl.constexpr):
    """The offset of a row in the mask. MASK_B to MASK_S are 1 for axes as long as the call's, 0 for axes of size 1."""
    tokens = 1 + c.MASK_T * (T - 1)
    keys = 1 + c.MASK_S * (S - 1)
    heads = 1 + c.MASK_N * (c.HEADS - 1)
    return ((c.MASK_B * batch * heads + c.MASK_N * head) * tokens + c.MASK_T * token) * keys


@triton.jit
def first_seen(interval_ptr, first_ptr, query, head, c: tl.constexpr):
    """The position of the first key that a row sees: the interval's start, unless the mask has heads of its own."""
    if c.MASK_N:
        first = tl.load(first_ptr + query * c.HEADS + head)
    else:
        first = tl.load(interval_ptr + 2 * query)
    return first.to(tl.int64)


@triton.jit
def visible_keys(at, n, c: tl.constexpr):
    """Which of the keys ``n`` a row sees; none beyond the split."""
    visible = n < at.high
    if c.MASK:
        visible = visible & (tl.load(at.mask + n * c.MASK_S, mask=visible, other=0) != 0)
    return visible


@triton.jit
def load_vector(base, d, c: tl.constexpr):
    """Features ``d`` of a query or a probe, in float32."""
    return tl.load(base + d, mask=d < c.D, other=0.0).to(tl.float32)


@triton.jit
def load_origin(at, d, c: tl.constexpr):
    """Features ``d`` of the first key that a row sees, in float32; 0 if the split has no key."""
    pointers = at.k + at.first * (c.KV_HEADS * c.D) + d
    return tl.load(pointers, mask=(d < c.D) & (at.high > at.low), other=0.0).to(tl.float32)


@triton.jit
def load_values(at, n, visible, c: tl.constexpr):
    """(BN, DVP): the values of the keys ``n``, zero if they are not visible, in the products' dtype."""
    d = tl.arange(0, c.DVP)
    pointers = at.v + n.to(tl.int64)[:, None] * (c.KV_HEADS * c.DV) + d[None, :]
    return widened(tl.load(pointers, mask=visible[:, None] & (d[None, :] < c.DV), other=0.0), c)


@triton.jit
def load_columns(at, n, d, visible, c: tl.constexpr):
    """Features ``d`` of the keys ``n``, one key a column: the keys as a product's first operand."""
    pointers = at.k + n.to(tl.int64)[None, :] * (c.KV_HEADS * c.D) + d[:, None]
    return widened(tl.load(pointers, mask=visible[None, :] & (d[:, None] < c.D), other=0.0), c)


@triton.jit
def centre_of(at, d, c: tl.constexpr):
    """Features ``d`` of the mean of the visible keys among the first few of a split; 0 if none is visible.

    The products' rounding errors are relative to the weighted keys and to their sum. Near the mean both are small,
    whatever offset the keys have in common.
    """
    n = at.low + tl.arange(0, FEW)
    visible = visible_keys(at, n, c)
    few = load_columns(at, n, d, visible, c).to(tl.float32)
    return tl.sum(few, 1) / tl.maximum(tl.sum(visible.to(tl.float32), 0), 1.0)


@triton.jit
def widened(block, c: tl.constexpr):
    if c.UPCAST:
        block = block.to(tl.float32)
    elif c.WIDEN:
        block = block.to(tl.bfloat16)  # float8 is exact in it
    return block


@triton.jit
def columns_of(x, DTYPE: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr = 0):
    """(len(x), COLUMNS): a float32 x as PARTS parts in the products' dtype, side by side. Their sum is x.

    FIRST is the column of the first one.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    out = tl.zeros((x.shape[0], COLUMNS), DTYPE)
    for i in tl.static_range(PARTS):
        part = x.to(DTYPE)
        x -= part.to(tl.float32)
        out = tl.where(column == FIRST + i, part[:, None], out)
    return out


@triton.jit
def two_parts(p, DTYPE: tl.constexpr):
    """p rounded to the sum of two parts. Every sum takes this weight."""
    hi = p.to(DTYPE).to(tl.float32)
    return hi + (p - hi).to(DTYPE).to(tl.float32)


@triton.jit
def partials_of(tops, omegas, means, moments, place, c: tl.constexpr):
    """The ``Partials`` that begin with the split of this number."""
    WIDTH: tl.constexpr = c.DP + c.DVP
    return Partials(tops + place, omegas + place, means + place * WIDTH, moments + place * (c.DP * WIDTH))


@triton.jit
def store_moments(partials, chunk, top, omega, kbar, vbar, kk, kv, c: tl.constexpr):
    """The sums of a split. kbar, kk and kv are those of a chunk of features, the others are the same for all chunks."""
    WIDTH: tl.constexpr = c.DP + c.DVP
    d, dv, chunk_d = tl.arange(0, c.DP), tl.arange(0, c.DVP), chunk * c.BD + tl.arange(0, c.BD)
    tl.store(partials.means + chunk_d, kbar)
    if chunk == 0:
        tl.store(partials.top, top)
        tl.store(partials.omega, omega)
        tl.store(partials.means + c.DP + dv, vbar)
    base = partials.moments + chunk_d[:, None] * WIDTH
    tl.store(base + d[None, :], kk)
    tl.store(base + c.DP + dv[None, :], kv)


@triton.jit
def moments_kernel(q, k, v, interval_ptr, first_ptr, mask_ptr, T, S, tops, omegas, means, moments, c: tl.constexpr):
    """One row, one split, BD features.

    The order of the programs: the chunks of features of a split, the splits of a row, the rows of a group. So programs
    that read the same keys are mostly on the GPU at once, and the cache comes from memory once.
    """
    CHUNKS: tl.constexpr = c.DP // c.BD
    chunk = tl.program_id(0) % CHUNKS
    at = split_of(k, v, interval_ptr, first_ptr, mask_ptr, tl.program_id(0) // CHUNKS, T, S, c)
    partials = partials_of(tops, omegas, means, moments, at.place, c)
    d, chunk_d = tl.arange(0, c.DP), chunk * c.BD + tl.arange(0, c.BD)
    origin = load_origin(at, d, c)
    query = load_vector(q + at.row * c.D, d, c)
    DTYPE: tl.constexpr = tl.bfloat16 if c.WIDEN else k.dtype.element_ty
    query_columns = columns_of(query, DTYPE, 3)  # a float32 query may go with a bfloat16 cache
    shift_logit = tl.sum(query * origin, 0) * c.SCALE
    # by way of memory: Triton loads it in every layout that a product wants; a computed value it would convert there
    tl.store(partials.means + chunk_d, centre_of(at, chunk_d, c))
    tl.debug_barrier()
    centre = tl.load(partials.means + chunk_d)

    top = NO_LOGIT
    weights = tl.zeros((c.BN,), tl.float32)  # added up at the end: a sum now would make all warps wait
    # SUMMED: the halves of the weighted keys are added up. Then the rest that they do not hold goes with k - kbar and
    # v - vbar, which are small if one key has most of the weight. More features leave no registers for it.
    SUMMED: tl.constexpr = c.DP <= 64
    if SUMMED:
        ones = tl.full((c.BN, COLUMNS), 1.0, DTYPE)
        w_sum = tl.zeros((c.BD, COLUMNS), tl.float32)
    k_sum = tl.zeros((c.DP,), tl.float32)
    v_sum = tl.zeros((c.DVP, COLUMNS), tl.float32)
    kk = tl.zeros((c.BD, c.DP), tl.float32)
    kv = tl.zeros((c.BD, c.DVP), tl.float32)
    for n0 in tl.range(at.low, at.high, c.BN, num_stages=c.STAGES):
        columns = n0 + tl.arange(0, c.BN)
        visible = visible_keys(at, columns, c)
        keys = load_columns(at, columns, d, visible, c)
        V = load_values(at, columns, visible, c)
        K = tl.trans(keys)
        s = tl.sum(tl.dot(K, query_columns), 1) * c.SCALE - shift_logit
        s = tl.where(visible, s, NO_LOGIT)
        new_top = tl.maximum(top, tl.max(s, 0))
        p = two_parts(tl.where(visible, tl.math.exp2(s - new_top), 0.0), DTYPE)
        shrink = tl.math.exp2(top - new_top)
        top = new_top
        weights = weights * shrink + p
        # all of this before the products: work between them would make the tensor cores wait
        v_sum *= shrink
        kk *= shrink
        kv *= shrink
        if SUMMED:
            w_sum *= shrink
        part = keys
        if CHUNKS > 1:
            part = load_columns(at, columns, chunk_d, visible, c)
        weighted = p[None, :] * (part.to(tl.float32) - centre[:, None])
        hi = weighted.to(DTYPE)
        lo = (weighted - hi.to(tl.float32)).to(DTYPE)
        if SUMMED:
            w_sum = tl.dot(hi, ones, acc=tl.dot(lo, ones, acc=w_sum))
        kk = tl.dot(hi, K, acc=tl.dot(lo, K, acc=kk))
        kv = tl.dot(hi, V, acc=tl.dot(lo, V, acc=kv))
        weight_columns = columns_of(p, DTYPE, 2)
        # added outside of the product: tensor cores round sums towards 0, and with an offset of the keys that adds up
        # (if k_sum were a matrix, Triton would make it the product's accumulator after all)
        k_sum = k_sum * shrink + tl.sum(tl.dot(keys, weight_columns), 1)
        v_sum = tl.dot(tl.trans(V), weight_columns, acc=v_sum)

    omega = tl.sum(weights, 0)
    total = tl.where(omega > 0.0, omega, 1.0)
    mean = tl.where(omega > 0.0, k_sum / total, origin)
    kbar, vbar = mean - origin, tl.sum(v_sum, 1) / total
    chunk_mean, chunk_kbar = mean, kbar
    if CHUNKS > 1:
        chunk_mean = tl.sum(tl.where(d[:, None] == chunk_d[None, :], mean[:, None], 0.0), 0)
        chunk_kbar = tl.sum(tl.where(d[:, None] == chunk_d[None, :], kbar[:, None], 0.0), 0)
    if SUMMED:
        weighted_sum = tl.sum(w_sum, 1) / COLUMNS
    else:
        weighted_sum = omega * (chunk_mean - centre)
    kk -= weighted_sum[:, None] * mean[None, :]
    kv -= weighted_sum[:, None] * vbar[None, :]

    store_moments(partials, chunk, top, omega, chunk_kbar, vbar, kk, kv, c)


@triton.jit
def solve_kernel(q, k, lam_ptr, interval_ptr, first_ptr, tops, omegas, means, moments, T, S, o, c: tl.constexpr):
    """The output of one row."""
    number = tl.program_id(0)
    batch, token, head, kv_head = row_of(number, T, c)
    d, dv = tl.arange(0, c.DP), tl.arange(0, c.DVP)
    row = (batch * T + token) * c.HEADS + head
    lam = tl.load(lam_ptr + row)
    partials = partials_of(tops, omegas, means, moments, number.to(tl.int64) * c.SPLITS, c)
    top, omega = merge_weights(partials, c)
    blind = omega == 0.0
    total = tl.where(blind, 1.0, omega)
    kbar, vbar = merge_means(partials, top, total, c)
    first = first_seen(interval_ptr, first_ptr, batch * T + token, head, c)
    origin_ptr = k + (batch * S * c.KV_HEADS + kv_head) * c.D + first * (c.KV_HEADS * c.D)
    origin = tl.load(origin_ptr + d, mask=(d < c.D) & (blind == 0), other=0.0).to(tl.float32)
    query = load_vector(q + row * c.D, d, c)
    m = tl.where(blind, 0.0, (query - origin) - kbar)

    A = merge_keys(partials, top, total, kbar, c)
    along = 0.0
    if not c.UPCAST:
        # The weighted keys of the products do not quite have the sum that was taken off. That error times the mean of
        # the keys is in A (and times vbar in Cov(k, v)). Except for it A is symmetric, so A shows it.
        mean = kbar + origin
        error = tl.sum(A * mean[None, :], 1) - tl.sum(A * mean[:, None], 0)
        error /= tl.maximum(tl.sum(mean * mean, 0), 1e-30)
        A -= error[:, None] * mean[None, :]
    x = solve(A, tl.where(blind, 1.0, lam), m, c)
    x = tl.where((lam == lam) | blind, x, float("nan"))  # a bad ridge never gives a plausible number
    if not c.UPCAST:
        along = tl.sum(error * x, 0)
    out = (1.0 - along) * vbar + times_values(partials, top, total, kbar, vbar, x, c)
    tl.store(o + row * c.DV + dv, tl.where(blind, 0.0, out), mask=dv < c.DV)


@triton.jit
def merge_weights(partials, c: tl.constexpr):
    """The largest logit of all splits, and the sum of the weights relative to it."""
    i = tl.arange(0, c.SPLITS_PADDED)
    tops = tl.load(partials.top + i, mask=i < c.SPLITS, other=NO_LOGIT)
    omegas = tl.load(partials.omega + i, mask=i < c.SPLITS, other=0.0)
    top = tl.max(tops, 0)
    return top, tl.sum(omegas * tl.math.exp2(tops - top), 0)


@triton.jit
def merge_means(partials, top, total, c: tl.constexpr):
    """kbar and vbar of all splits."""
    WIDTH: tl.constexpr = c.DP + c.DVP
    d, dv = tl.arange(0, c.DP), tl.arange(0, c.DVP)
    kbar = tl.zeros((c.DP,), tl.float32)
    vbar = tl.zeros((c.DVP,), tl.float32)
    for i in range(c.SPLITS):
        weight = tl.load(partials.omega + i) * tl.math.exp2(tl.load(partials.top + i) - top)
        kbar += weight * tl.load(partials.means + i * WIDTH + d)
        vbar += weight * tl.load(partials.means + i * WIDTH + c.DP + dv)
    return kbar / total, vbar / total


@triton.jit
def merge_keys(partials, top, total, kbar, c: tl.constexpr):
    """Cov_p(k, k): within the splits, and between their means."""
    WIDTH: tl.constexpr = c.DP + c.DVP
    d = tl.arange(0, c.DP)
    A = tl.zeros((c.DP, c.DP), tl.float32)
    for i in range(c.SPLITS):
        shrink = tl.math.exp2(tl.load(partials.top + i) - top) / total
        weight = shrink * tl.load(partials.omega + i)
        A += shrink * tl.load(partials.moments + (i * c.DP + d[:, None]) * WIDTH + d[None, :])
        means = partials.means + i * WIDTH + d
        between = tl.load(means) - kbar
        A += weight * between[:, None] * between[None, :]
    return A


@triton.jit
def times_values(partials, top, total, kbar, vbar, x, c: tl.constexpr):
    """Cov_p(v, k) x."""
    WIDTH: tl.constexpr = c.DP + c.DVP
    d, dv = tl.arange(0, c.DP), tl.arange(0, c.DVP)
    out = tl.zeros((c.DVP,), tl.float32)
    for i in range(c.SPLITS):
        shrink = tl.math.exp2(tl.load(partials.top + i) - top) / total
        weight = shrink * tl.load(partials.omega + i)
        means = partials.means + i * WIDTH
        along = tl.sum(x * (tl.load(means + d) - kbar), 0)
        out += weight * along * (tl.load(means + c.DP + dv) - vbar)
        M = tl.load(partials.moments + (i * c.DP + d[:, None]) * WIDTH + c.DP + dv[None, :])
        out += shrink * tl.sum(x[:, None] * M, 0)
    return out


@triton.jit
def solve(A, lam, m, c: tl.constexpr):
    """(A + lam I)^-1 m by conjugate gradients, on the matrix scaled to a unit diagonal.

    If the keys are large, or the ridge is small beside their covariance, rounding may make the matrix indefinite. D
    times the rounding of its entries, added to the diagonal, makes it definite again. Two rounds of iterative
    refinement restore the directions that rounding has not lost.

    A round stops when its error is small beside the solution, in the norm of the matrix. |r|^2 over the least
    eigenvalue bounds the square of the error. The sum of alpha |r|^2 is the square of the solution.
    """
    d = tl.arange(0, c.DP)
    eye = d[:, None] == d[None, :]
    diagonal = tl.sum(tl.where(eye, A, 0.0), 1) + lam
    scale = 1.0 / tl.sqrt(diagonal)
    A = tl.where(eye, 1.0, A * scale[:, None] * scale[None, :])
    least = tl.minimum(lam / tl.max(diagonal, 0), 1.0) + c.ROUNDING
    m = scale * m
    x = tl.zeros_like(m)
    energy = 0.0
    for _ in range(3):
        r = m - tl.sum(A * x[None, :], 1)
        p = r
        rr = tl.sum(r * r, 0)
        step = 0
        while (step < c.MAX_STEPS) & (rr > c.TOLERANCE * least * energy):
            Ap = tl.sum(A * p[None, :], 1) + c.ROUNDING * p
            pAp = tl.sum(p * Ap, 0)
            definite = pAp > 0.0  # else there is nothing left to gain
            alpha = tl.where(definite, rr / pAp, 0.0)
            x += alpha * p
            r -= alpha * Ap
            energy += alpha * rr
            new_rr = tl.sum(r * r, 0)
            p = r + (new_rr / rr) * p
            rr = tl.where(definite, new_rr, 0.0)
            step += 1
    return x * scale
