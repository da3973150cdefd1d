"""The forward kernel: softmax statistics, the solve for x, the output. One program per tile of BM queries of a head."""

from typing import NamedTuple

import triton
import triton.language as tl

from flashlla_jax.kernels.solver import solve
from flashlla_jax.kernels.tiles import (
    Rows,
    as_operand,
    head_base,
    is_hard,
    key_scale,
    keys_of,
    load_keys,
    load_queries,
    load_rows,
    load_values,
    log_weights,
    logits,
    moved,
    one_column,
    query_program,
    relative_queries,
    rounded_product,
    some,
    store_queries,
    store_rows,
    store_tile,
    weights,
    with_a0,
)
from flashlla_jax.kernels.visible import key_tile, load_intervals, visible_to_queries

# NO_KEYS is the lse of a query that sees no key: every weight computed from it is 0. NO_LOGIT is the largest logit
# before any key. It is finite: if the first tile is all hidden, there is no inf - inf.
NO_KEYS: tl.constexpr = tl.constexpr(1e38)
NO_LOGIT: tl.constexpr = tl.constexpr(-3e38)


class Solution(NamedTuple):
    """-x as the products take it: hi + lo, and the rest beyond both. a_ij = (a0 + (hi + lo + rest).k_j) + a0_rest.

    EXACT: ``near`` is -x.kbar, and a_ij = 1 + (a0 + (near + (hi + lo + rest).k_j)).
    """

    hi: tl.tensor
    lo: tl.tensor
    rest: tl.tensor
    near: tl.tensor
    a0: tl.tensor
    a0_rest: tl.tensor


@triton.jit
def matters(part, scale2, THRESHOLD: tl.constexpr):
    """Whether kc.part has a standard deviation, |part| sqrt(scale2), above THRESHOLD in some row. NaN counts."""
    part = part.to(tl.float32)
    worst = tl.max(tl.sum(part * part, 1), 0) * scale2
    return (worst <= THRESHOLD * THRESHOLD) == 0


@triton.jit
def statistics(rows, keys, SPLIT: tl.constexpr, c: tl.constexpr):
    """The largest logit, the sum of the weights relative to it, and kbar."""
    top = tl.full((c.BM,), NO_LOGIT, tl.float32)
    omega = tl.zeros((c.BM,), tl.float32)
    sums = tl.zeros((c.BM, 16), tl.float32)
    acc = tl.zeros((c.BM, c.DP), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            s = logits(rows, K, n0, keys, edge == 1, c)
            new_top = tl.maximum(top, tl.max(s, 1))
            w = tl.math.exp2(log_weights(s, new_top[:, None], 0.0, c))
            shrink = tl.math.exp2(log_weights(top, new_top, 0.0, c))
            omega = omega * shrink + tl.sum(w, 1)
            acc, sums = rounded_product(w, K, acc * shrink[:, None], sums * shrink[:, None], SPLIT, c.PRECISION)
            top = new_top
    # divided by the sum of the rounded weights: see rounded_product
    return top, omega, acc / one_column(sums)[:, None]


@triton.jit
def mean_of_keys(rows, keys, c: tl.constexpr):
    """kbar once more, with the weights as hi + lo."""
    acc = tl.zeros((c.BM, c.DP), tl.float32)
    sums = tl.zeros((c.BM, 16), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            acc, sums = rounded_product(w, K, acc, sums, True, c.PRECISION)
    total = one_column(sums)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def x_dot_k(solution, K, PARTS: tl.constexpr, c: tl.constexpr):
    """(hi + lo + rest).k_j, or of the first PARTS.

    The smallest comes first: a large sum cuts off the last digits of a small term.

    EXACT: the sum begins with ``near``. Then its bits do not depend on the compiler.
    """
    a = tl.zeros((c.BM, c.BN), tl.float32)
    if c.EXACT:
        a += solution.near[:, None]
    if PARTS > 2:
        a = tl.dot(solution.rest, tl.trans(K), acc=a, input_precision=c.PRECISION)
    if PARTS > 1:
        a = tl.dot(solution.lo, tl.trans(K), acc=a, input_precision=c.PRECISION)
    return tl.dot(solution.hi, tl.trans(K), acc=a, input_precision=c.PRECISION)


@triton.jit
def mean_with(a0, rows, keys, solution, c: tl.constexpr):
    """The mean of a0 + x.k_j under p.

    The mean of a_ij is 1 by definition. If A is nearly singular, or x.k is huge, a0 and x.k nearly cancel. Their
    rounding errors, and that of kbar, are mostly the same for all keys that count, as a0 is. They are wholly the same
    if one key holds all the weight. So a change of a0 can make up for them.
    """
    total = tl.zeros((c.BM,), tl.float32)
    whole = tl.zeros((c.BM,), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            a = x_dot_k(solution, K, c.PARTS, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            total += tl.sum(w * (a + a0[:, None]), 1)
            if c.EXACT:
                whole += tl.sum(w, 1)
    if c.EXACT:  # near may be off by 100: then it matters that the weights sum to 1 only to 1e-7
        total /= tl.where(whole == 0.0, 1.0, whole)
    return total


@triton.jit
def balanced(a0, chosen, rows, keys, solution, c: tl.constexpr):
    """a0, moved in the chosen rows so that their a_ij sum to 1, and what rounding it left.

    An a0 of 1e7 has no digits behind the point.
    """
    a0_rest = tl.zeros((c.BM,), tl.float32)
    if some(chosen):
        a0, a0_rest = moved(a0, tl.where(chosen, 1.0 - mean_with(a0, rows, keys, solution, c), 0.0))
    return a0, a0_rest


@triton.jit
def output(rows, keys, solution, CARE: tl.constexpr, c: tl.constexpr):
    """sum_j p_ij a_ij v_j. Where x is long the p_ij a_ij are larger than their sum, 1: HIGH takes them as hi + lo."""
    acc = tl.zeros((c.BM, c.DVP), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            V = load_values(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            a = x_dot_k(solution, K, c.PARTS if CARE > 0 else c.FEWEST_PARTS, c)
            pa = w * with_a0(a, solution.a0[:, None], solution.a0_rest[:, None], CARE, c)
            hi = pa.to(V.dtype)
            acc = tl.dot(hi, V, acc=acc, input_precision=c.PRECISION)
            if c.SPLIT_ALL and CARE > 0:
                lo = (pa - hi.to(tl.float32)).to(V.dtype)
                acc = tl.dot(lo, V, acc=acc, input_precision=c.PRECISION)
    return acc


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    lam_ptr,
    start,
    end,
    query_ids,
    key_ids,
    mask,
    table,
    order,
    origins,
    anchors,
    T,
    S,
    o,
    x_hi,
    x_lo,
    x_rest,
    lse_ptr,
    lse_rest_ptr,
    near_ptr,
    a0_ptr,
    a0_rest_ptr,
    damping_ptr,
    omega_ptr,
    logsumexp_ptr,
    iterations_ptr,
    residual_ptr,
    error_ptr,
    converged_ptr,
    c: tl.constexpr,
):
    """SPLIT_ALL: the weights of kbar and of the solve's products are hi + lo, else in hard rows, see ``is_hard``.

    LAST_ABOVE: the last part of x is used if it moves some kc.x by more than this. BALANCED_ABOVE (inf: never): the
    a_ij of a row are made to sum to 1 if |x.kbar| is larger, which the last part goes with, or if the rest is used.
    """
    at = query_program(order, T, c)
    if c.CUT:
        if at.m0 >= at.stop:
            return
    m0, stop, batch, head, kv_head = at.m0, at.stop, at.batch, at.head, at.kv_head
    row_base = batch.to(tl.int64) * T * c.HEADS + head
    visible = visible_to_queries(start, end, query_ids, key_ids, mask, order, at, T, S, c)
    keys = keys_of(k, v, origins, table, at, visible, T, S, c)
    Q = load_queries(head_base(q, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
    lam = load_rows(lam_ptr + row_base, m0, stop, c.HEADS, c.BM, 1.0)
    intervals = load_intervals(visible, m0, c)
    zeros = tl.zeros((c.BM,), tl.float32)
    rows = Rows(Q, zeros, zeros, tl.zeros((c.BM, c.DP), tl.float32), lam, intervals)

    top, omega, kbar = statistics(rows, keys, c.SPLIT_ALL, c)
    blind = intervals.end <= intervals.start
    if c.CUT:  # rows of the other part would only take steps
        blind = blind | (m0 + tl.arange(0, c.BM) >= stop)
    if c.MASK:  # the interval is that of all heads
        blind = blind | (omega == 0.0)
    omega = tl.where(blind, 0.0, omega)
    total = tl.where(blind, 1.0, omega)
    lse = top
    lse_rest = tl.where(blind, NO_KEYS, tl.math.log2(total))
    logsumexp = lse * c.STEEPNESS + lse_rest
    if not c.EXACT:
        lse = tl.where(blind, NO_KEYS, top + tl.math.log2(total))
        logsumexp = lse
    kbar = tl.where(blind[:, None], 0.0, kbar)
    scale2 = key_scale(keys, c)
    hard = is_hard(lam, omega, scale2, c)
    if (c.HARD_BELOW > 0.0) and not c.SPLIT_ALL:
        if some(hard):
            mean = mean_of_keys(Rows(Q, lse, lse_rest, kbar, lam, intervals), keys, c)
            kbar = tl.where(hard[:, None], mean, kbar)
    rows = Rows(Q, lse, lse_rest, kbar, lam, intervals)

    relative, taken_off = relative_queries(Q, keys.origin, anchors, m0, batch, kv_head, T, c)
    m = tl.where(blind[:, None], 0.0, kbar - relative)
    solved = solve(m, rows, keys, hard, c)
    x = tl.where(((lam == lam) | blind)[:, None], solved.x, float("nan"))  # a bad ridge never gives a plausible number

    hi = as_operand(-x, Q.dtype, c.PRECISION)
    store_queries(head_base(x_hi, batch, T, head, c.HEADS, c.D), hi, m0, stop, c)
    used = hi.to(tl.float32)
    lo = as_operand(-x - used, Q.dtype, c.PRECISION)
    rest = lo
    care = 0
    far = tl.abs(tl.sum(x * kbar, 1)) > c.BALANCED_ABOVE
    # if the last part does not matter, it is stored as 0, so that the backward pass uses the same x
    if c.PARTS == 2:
        more = matters(lo, scale2, c.LAST_ABOVE) | some(far)
        care = more.to(tl.int32)
        if c.MOST_CARE == 2:
            care += some(far).to(tl.int32)
        lo = tl.where(more, lo, 0.0).to(Q.dtype)
    if c.PARTS > 1:
        store_queries(head_base(x_lo, batch, T, head, c.HEADS, c.D), lo, m0, stop, c)
        used += lo.to(tl.float32)
    if c.PARTS == 3:
        rest = as_operand(-x - used, Q.dtype, c.PRECISION)
        more = matters(rest, scale2, c.LAST_ABOVE) | some(far)
        care = more.to(tl.int32)
        far = far | more
        rest = tl.where(more, rest, 0.0).to(Q.dtype)
        store_queries(head_base(x_rest, batch, T, head, c.HEADS, c.D), rest, m0, stop, c)
        used += rest.to(tl.float32)
    near = -tl.sum(used * kbar, 1)
    a0 = 1.0 + near
    if c.EXACT:
        a0 = -mean_with(zeros, rows, keys, Solution(hi, lo, rest, near, zeros, zeros), c)
    a0_rest = zeros
    if c.BALANCED_ABOVE < float("inf"):
        a0, a0_rest = balanced(a0, far, rows, keys, Solution(hi, lo, rest, near, a0, zeros), c)
    damping = total / (total + c.DELTA_EPS * (1.0 + tl.sum(m * x, 1)))

    store_rows(lse_ptr + row_base, lse, m0, stop, c.HEADS, c.BM)
    logsumexp += c.SCALE * taken_off
    store_rows(logsumexp_ptr + row_base, logsumexp * 0.6931471805599453, m0, stop, c.HEADS, c.BM)  # ln 2
    if c.EXACT:
        store_rows(lse_rest_ptr + row_base, lse_rest, m0, stop, c.HEADS, c.BM)
        store_rows(near_ptr + row_base, near, m0, stop, c.HEADS, c.BM)
    if c.EXACT or (c.BALANCED_ABOVE < float("inf")):
        store_rows(a0_ptr + row_base, a0, m0, stop, c.HEADS, c.BM)
    if c.BALANCED_ABOVE < float("inf"):
        store_rows(a0_rest_ptr + row_base, a0_rest, m0, stop, c.HEADS, c.BM)
    store_rows(damping_ptr + row_base, damping, m0, stop, c.HEADS, c.BM)
    store_rows(omega_ptr + row_base, omega, m0, stop, c.HEADS, c.BM)
    store_rows(iterations_ptr + row_base, solved.iterations, m0, stop, c.HEADS, c.BM)
    store_rows(residual_ptr + row_base, solved.residual_norm, m0, stop, c.HEADS, c.BM)
    store_rows(error_ptr + row_base, solved.error, m0, stop, c.HEADS, c.BM)
    store_rows(converged_ptr + row_base, solved.converged, m0, stop, c.HEADS, c.BM)

    solution = Solution(hi, lo, rest, near, a0, a0_rest)
    if care > 0:
        if c.MOST_CARE == 1:
            out = output(rows, keys, solution, 1, c)
        elif care == 1:
            out = output(rows, keys, solution, 1, c)
        else:
            out = output(rows, keys, solution, 2, c)
    else:
        out = output(rows, keys, solution, 0, c)
    base = head_base(o, batch, T, head, c.HEADS, c.DV)
    store_tile(base, out * damping[:, None], m0, stop, c.HEADS * c.DV, c.DV, c.BM, c.DVP)
