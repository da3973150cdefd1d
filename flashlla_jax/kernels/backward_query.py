"""The query kernel of the backward pass: a program per tile of queries solves for u and forms dq and dlambda.

Everything but dq and dlambda is kept per unit of the cotangent as it came: the damping of ``delta_eps`` is a factor of
each row that enters once, through ``weight_lse`` = lse - log2(damping). x and u are kept negated: then a_ij and b_ij
are the accumulators plus one number per row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flashlla_jax.kernels.solver import conjugate_gradients, solve
from flashlla_jax.kernels.tiles import (
    Rows,
    as_operand,
    as_two_operands,
    head_base,
    is_hard,
    key_scale,
    keys_of,
    load_cotangents,
    load_keys,
    load_queries,
    load_rows,
    load_tile,
    load_values,
    moved,
    one_column,
    one_key_dominates,
    query_program,
    rounded_product,
    some,
    store_full,
    store_pairs,
    store_queries,
    store_rows,
    weights,
    with_a0,
    with_b0,
)
from flashlla_jax.kernels.visible import key_tile, load_intervals, visible_to_queries


class Solutions(NamedTuple):
    """x and u negated, in parts, and the numbers of a row: c0 = lambda u.x, a = (a0 + x.k) + a0_rest,
    b = (b0 + g.v + u.k) + b0_rest.

    EXACT: a = 1 + (a0 + (near_x + x.k)), b = b0 + (near_u + u.k + g.v), the sums in this order.
    """

    x_hi: tl.tensor
    x_lo: tl.tensor
    x_rest: tl.tensor
    u_hi: tl.tensor
    u_lo: tl.tensor
    near_x: tl.tensor
    near_u: tl.tensor
    a0: tl.tensor
    a0_rest: tl.tensor
    b0: tl.tensor
    b0_rest: tl.tensor
    c0: tl.tensor


@triton.jit
def value_centre(intervals, keys, c: tl.constexpr):
    """A value that every query of the tile sees (if there is one): the mean of the first whole tile, or one value."""
    n0 = key_tile(keys, 0, False, c)
    mean = tl.sum(load_tile(keys.v, n0, keys.visible.S, c.KV_HEADS * c.DV, c.DV, c.BN, c.DVP, True, True), 0) / c.BN
    row = 0
    if not c.FROM_FIRST:  # the last one's first: all see it if they have a key in common
        row = tl.max(tl.where(intervals.start < intervals.end, intervals.start, 0), 0)
    columns = tl.arange(0, c.DVP)
    base = keys.v + tl.cast(row, tl.int64) * c.KV_HEADS * c.DV
    one = tl.load(base + columns, mask=columns < c.DV, other=0.0).to(tl.float32)
    return tl.where(keys.tiles.wholes > 0, mean, one)


@triton.jit
def rounded_by_hand(t, dtype: tl.constexpr):
    """t rounded to 16 bits, in float32: for bfloat16 the conversion there and back would run at the rate of exp2."""
    if dtype == tl.bfloat16:
        near = ((t.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)
    else:
        near = t.to(dtype).to(tl.float32)
    return near


@triton.jit
def right_hand_side(rows, G, g0, keys, hard, refined, parts, c: tl.constexpr):
    """kbar again (cheaper than keeping it), y = sum_j p_ij (gamma_ij - gbar_i) kc_ij, gbar, and gamma's variance.

    y's weights are rounded like gamma - g0, so g0 ought to be near gbar. A first pass finds it, if some rows are to be
    ``refined``. Without it their y would be the difference of two large sums: if nearly all the weight is on one key, y
    is 1e-5 of either, and the tensor cores keep no more of a sum.

    The last ``parts`` (1 or 2) passes gather both: the weights as rounded to bfloat16, and in hard rows the remainder.
    (A choice between two loops would be faster than two passes, but then ptxas serialises the wgmma of both: C7515.)

    The variance is found if CORRECTED_BELOW asks for it.
    """
    acc_k = tl.zeros((c.BM, c.DP), tl.float32)
    sums_k = tl.zeros((c.BM, 16), tl.float32)
    acc_y = tl.zeros((c.BM, c.DP), tl.float32)
    sums_y = tl.zeros((c.BM, 16), tl.float32)
    excess = tl.zeros((c.BM,), tl.float32)
    squares = tl.zeros((c.BM,), tl.float32)
    left = tl.where(hard, 1.0, 0.0)
    moved = tl.where(refined, 1.0, 0.0)
    refine = some(refined).to(tl.int32)
    for part in range(refine + parts):
        gathered = tl.where(part > refine, 1.0, 0.0)  # an earlier part of y is kept
        g0 += excess * moved * (1.0 - gathered)
        excess *= gathered
        squares *= gathered
        acc_k *= gathered
        sums_k *= gathered
        acc_y *= gathered
        sums_y *= gathered
        for edge in tl.static_range(2):
            count = keys.tiles.edges if edge else keys.tiles.wholes
            for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
                n0 = key_tile(keys, i, edge == 1, c)
                K = load_keys(keys, n0, edge == 1, c)
                V = load_values(keys, n0, edge == 1, c)
                w = weights(rows, K, n0, keys, edge == 1, c)
                gamma = tl.dot(G, tl.trans(V), input_precision=c.PRECISION) - g0[:, None]
                t = w * gamma
                excess += tl.sum(t, 1)
                if c.CORRECTED_BELOW > 0.0:
                    squares += tl.sum(t * gamma, 1)
                if not c.UPCAST and not c.SPLIT_ALL:
                    near = rounded_by_hand(t, K.dtype)
                    t = tl.where(part > refine, (t - near) * left[:, None], near)
                    near = rounded_by_hand(w, K.dtype)
                    w = tl.where(part > refine, (w - near) * left[:, None], near)
                acc_k, sums_k = rounded_product(w, K, acc_k, sums_k, c.SPLIT_ALL, c.PRECISION)
                acc_y, sums_y = rounded_product(t, K, acc_y, sums_y, c.SPLIT_ALL, c.PRECISION)
    total = one_column(sums_k)
    kbar = acc_k / tl.where(total == 0.0, 1.0, total)[:, None]  # 0 for a query that sees no key
    excess = excess / parts
    # excess * 0: a NaN, which rounding by hand may lose
    y = acc_y - one_column(sums_y)[:, None] * kbar + (excess * 0.0)[:, None]
    return kbar, y, g0 + excess, squares / parts - excess * excess


@triton.jit
def corrected(u, needed, rows, G, gbar, keys, hard, c: tl.constexpr):
    """u and gbar with one step of iterative refinement in the rows that need it.

    The b_ij may be 1e-4 of gamma: if few keys have all the weight, the regression goes through their gamma. Then the
    rounding of y's weights, and of those of the solve's products, is 1e-2 of them. What the normal equations leave is
    gathered from the b_ij themselves, so that it is rounded like these: sum_j p_ij b_ij kc_ij - lambda u. A few digits
    of the correction will do. By definition the b_ij have a mean of 0; gbar takes up what they have.
    """
    hi, lo = as_two_operands(-u, rows.Q.dtype, c.PRECISION)
    used = hi.to(tl.float32) + lo.to(tl.float32)
    b0 = -tl.sum(used * rows.kbar, 1) - gbar
    mean = tl.zeros((c.BM,), tl.float32)
    acc = tl.zeros((c.BM, c.DP), tl.float32)
    sums = tl.zeros((c.BM, 16), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            V = load_values(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            b = tl.dot(G, tl.trans(V), input_precision=c.PRECISION)
            b = tl.dot(lo, tl.trans(K), acc=b, input_precision=c.PRECISION)
            b = tl.dot(hi, tl.trans(K), acc=b, input_precision=c.PRECISION)
            pb = w * (b + b0[:, None])
            mean += tl.sum(pb, 1)
            acc, sums = rounded_product(pb, K, acc, sums, True, c.PRECISION)
    left = acc - one_column(sums)[:, None] * rows.kbar + rows.lam[:, None] * used
    correction = conjugate_gradients(tl.where(needed[:, None], left, 0.0), rows, keys, hard, True, c, SLACK=1e4).x
    return tl.where(needed[:, None], correction - used, u), tl.where(needed, gbar + mean, gbar)


@triton.jit
def mean_of_b(b0, rows, G, keys, u_hi, u_lo, near_u, c: tl.constexpr):
    """sum_j p_ij b_ij; without rounding it would be 0, see ``mean_with`` of the forward kernel.

    Where few tiles need it, there is no pipeline, for the shared memory that it takes.
    """
    mean = tl.zeros((c.BM,), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=(c.EDGE_STAGES if edge else c.STAGES) if c.EXACT else 1):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            V = load_values(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            if c.EXACT:
                b = tl.zeros((c.BM, c.BN), tl.float32) + near_u[:, None]
                b = tl.dot(u_hi, tl.trans(K), acc=b, input_precision=c.PRECISION)
                b = tl.dot(G, tl.trans(V), acc=b, input_precision=c.PRECISION)
            else:
                b = tl.dot(G, tl.trans(V), input_precision=c.PRECISION)
                b = tl.dot(u_lo, tl.trans(K), acc=b, input_precision=c.PRECISION)
                b = tl.dot(u_hi, tl.trans(K), acc=b, input_precision=c.PRECISION)
            mean += tl.sum(w * (b + b0[:, None]), 1)
    return mean


@triton.jit
def query_gradient(rows, G, keys, solutions, CARE: tl.constexpr, c: tl.constexpr):
    """sum_j ds_ij k_j, the ds_ij summing to 0.

    With a third part of x there is no pipeline: its shared memory would leave one program a multiprocessor at D = 128.
    """
    PARTS: tl.constexpr = c.PARTS if CARE > 0 else c.FEWEST_PARTS
    acc = tl.zeros((c.BM, c.DP), tl.float32)
    sums = tl.zeros((c.BM, 16), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge or PARTS > 2 else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            V = load_values(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            a = tl.zeros((c.BM, c.BN), tl.float32)
            if c.EXACT:
                a += solutions.near_x[:, None]
                b = tl.zeros((c.BM, c.BN), tl.float32) + solutions.near_u[:, None]
            else:
                b = tl.dot(G, tl.trans(V), input_precision=c.PRECISION)
            # the smallest parts come first, as in the forward pass
            if PARTS > 2:
                a = tl.dot(solutions.x_rest, tl.trans(K), acc=a, input_precision=c.PRECISION)
            if PARTS > 1:
                a = tl.dot(solutions.x_lo, tl.trans(K), acc=a, input_precision=c.PRECISION)
                b = tl.dot(solutions.u_lo, tl.trans(K), acc=b, input_precision=c.PRECISION)
            a = tl.dot(solutions.x_hi, tl.trans(K), acc=a, input_precision=c.PRECISION)
            b = tl.dot(solutions.u_hi, tl.trans(K), acc=b, input_precision=c.PRECISION)
            if c.EXACT:
                b = tl.dot(G, tl.trans(V), acc=b, input_precision=c.PRECISION)
            a = with_a0(a, solutions.a0[:, None], solutions.a0_rest[:, None], CARE, c)
            b = with_b0(b, solutions.b0[:, None], solutions.b0_rest[:, None], CARE, c)
            ds = w * (a * b + solutions.c0[:, None])
            acc, sums = rounded_product(ds, K, acc, sums, False, c.PRECISION)
    return acc - one_column(sums)[:, None] * rows.kbar


@triton.jit
def query_kernel(
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
    x_hi_ptr,
    x_lo_ptr,
    x_rest_ptr,
    lse_ptr,
    lse_rest_ptr,
    near_ptr,
    a0_ptr,
    a0_rest_ptr,
    damping_ptr,
    omega_ptr,
    g,
    T,
    S,
    dq,
    dlam_ptr,
    u_hi_ptr,
    u_lo_ptr,
    lse_a0_ptr,
    b0_c0_ptr,
    rests_ptr,
    nears_ptr,
    weight_rest_ptr,
    care_ptr,
    c: tl.constexpr,
):
    """dq, dlambda, and for the key kernel u and six numbers of each row, in three pairs.

    The pairs are the lse of its weights with a0, b0 with c0, and the rests of a0 and b0; they have a place for every
    row of the last tile. EXACT: no rests, but three more numbers, near_x with near_u, and the rest of the lse.
    """
    at = query_program(order, T, c)
    if c.CUT:
        if at.m0 >= at.stop:
            return
    m0, stop, batch, head = at.m0, at.stop, at.batch, at.head
    row_base = batch.to(tl.int64) * T * c.HEADS + head
    visible = visible_to_queries(start, end, query_ids, key_ids, mask, order, at, T, S, c)
    keys = keys_of(k, v, origins, table, at, visible, T, S, c)
    Q = load_queries(head_base(q, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
    G = load_cotangents(head_base(g, batch, T, head, c.HEADS, c.DV), m0, stop, True, c)
    lam = load_rows(lam_ptr + row_base, m0, stop, c.HEADS, c.BM, 1.0)
    lse = load_rows(lse_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
    damping = load_rows(damping_ptr + row_base, m0, stop, c.HEADS, c.BM, 1.0)
    intervals = load_intervals(visible, m0, c)
    lse_rest = lse
    if c.EXACT:
        lse_rest = load_rows(lse_rest_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
    rows = Rows(Q, lse, lse_rest, tl.zeros((c.BM, c.DP), tl.float32), lam, intervals)
    omega = load_rows(omega_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
    hard = is_hard(lam, omega, key_scale(keys, c), c)

    # gamma relative to that of a value that the queries see
    g0 = tl.sum(G.to(tl.float32) * value_centre(intervals, keys, c)[None, :], 1)
    parts = 1
    refined = omega > 0.0
    if not c.UPCAST:  # where it matters, or so few keys are seen that this is cheap
        few = keys.tiles.wholes + keys.tiles.edges <= 4
        refined = one_key_dominates(omega) | (refined & few)
        if not c.SPLIT_ALL:  # else both parts of y are gathered at once
            parts = 1 + some(hard).to(tl.int32)
    kbar, y, gbar, variance = right_hand_side(rows, G, g0, keys, hard, refined, parts, c)
    rows = Rows(Q, lse, lse_rest, kbar, lam, intervals)
    u = solve(y, rows, keys, hard, c).x
    if c.CORRECTED_BELOW > 0.0:
        needed = variance - tl.sum(u * y, 1) < c.CORRECTED_BELOW * variance
        if some(needed):
            u, gbar = corrected(u, needed, rows, G, gbar, keys, hard, c)

    x_hi = load_queries(head_base(x_hi_ptr, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
    u_hi = as_operand(-u, Q.dtype, c.PRECISION)
    store_queries(head_base(u_hi_ptr, batch, T, head, c.HEADS, c.D), u_hi, m0, stop, c)
    x_used = x_hi.to(tl.float32)
    u_used = u_hi.to(tl.float32)
    x_lo = x_hi
    x_rest = x_hi
    u_lo = u_hi
    care = 0
    if c.PARTS > 1:
        x_lo = load_queries(head_base(x_lo_ptr, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
        x_used += x_lo.to(tl.float32)
        last = x_lo
        if c.PARTS == 3:
            x_rest = load_queries(head_base(x_rest_ptr, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
            x_used += x_rest.to(tl.float32)
            last = x_rest
        # whether the last part of x matters: the forward pass left it at 0 if not; NaN is something
        more = (tl.max(tl.sum(tl.abs(last.to(tl.float32)), 1), 0) <= 0.0) == 0
        care = more.to(tl.int32)
        u_lo = as_operand(-u - u_used, Q.dtype, c.PRECISION)
        if c.PARTS == 2:  # u goes with x
            u_lo = tl.where(more, u_lo, 0.0).to(Q.dtype)
        store_queries(head_base(u_lo_ptr, batch, T, head, c.HEADS, c.D), u_lo, m0, stop, c)
        u_used += u_lo.to(tl.float32)
    valid = m0 + tl.arange(0, c.BM) < stop  # the key kernel reads the other rows of the tile too: of weight zero
    first_row = (batch.to(tl.int64) * c.HEADS + head) * tl.cdiv(T, c.BM) * c.BM
    pairs = first_row * 2
    near_x = -tl.sum(x_used * kbar, 1)
    near_u = -tl.sum(u_used * kbar, 1)
    a0 = 1.0 + near_x
    a0_rest = a0
    b0 = near_u - gbar
    b0_rest = b0
    if c.EXACT:
        near_x = load_rows(near_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
        a0 = load_rows(a0_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
        b0 = -gbar
        b0 -= mean_of_b(b0, rows, G, keys, u_hi, u_lo, near_u, c)
    elif c.BALANCED_ABOVE < float("inf"):  # as the forward pass found it: so that the a_ij sum to 1
        a0 = load_rows(a0_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
        a0_rest = load_rows(a0_rest_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
        b0_rest = tl.zeros((c.BM,), tl.float32)
        dominated = one_key_dominates(omega)
        if c.MOST_CARE == 2:
            care *= 1 + some(dominated | (a0_rest != 0.0)).to(tl.int32)
        # if one key has all the weight, its b_ij is the rounding of gbar, and x is m / lambda: that would be all of dk
        if (care == c.MOST_CARE) & some(dominated):
            mean = mean_of_b(b0, rows, G, keys, u_hi, u_lo, near_u, c)
            b0, b0_rest = moved(b0, tl.where(dominated, -mean, 0.0))
        store_pairs(rests_ptr + pairs, tl.where(valid, a0_rest, 0.0), tl.where(valid, b0_rest, 0.0), at, c)
    if c.PARTS > 1:
        store_rows(care_ptr + row_base, tl.zeros((c.BM,), tl.int32) + care, m0, stop, c.HEADS, c.BM)
    dlam = -tl.sum(u * x_used, 1)
    c0 = lam * dlam
    store_rows(dlam_ptr + row_base, dlam * damping, m0, stop, c.HEADS, c.BM)
    if c.EXACT:
        weight_rest = tl.where(valid, lse_rest - tl.math.log2(damping), float("inf"))
        weight_lse = tl.where(valid, lse, 0.0)
        store_full(weight_rest_ptr + first_row, weight_rest, at, 1, c)
        store_pairs(nears_ptr + pairs, tl.where(valid, near_x, 0.0), tl.where(valid, near_u, 0.0), at, c)
    else:
        weight_lse = tl.where(valid, lse - tl.math.log2(damping), float("inf"))
    store_pairs(lse_a0_ptr + pairs, weight_lse, tl.where(valid, a0, 0.0), at, c)
    store_pairs(b0_c0_ptr + pairs, tl.where(valid, b0, 0.0), tl.where(valid, c0, 0.0), at, c)

    solutions = Solutions(x_hi, x_lo, x_rest, u_hi, u_lo, near_x, near_u, a0, a0_rest, b0, b0_rest, c0)
    if care > 0:
        if c.MOST_CARE == 1:
            acc = query_gradient(rows, G, keys, solutions, 1, c)
        elif care == 1:
            acc = query_gradient(rows, G, keys, solutions, 1, c)
        else:
            acc = query_gradient(rows, G, keys, solutions, 2, c)
    else:
        acc = query_gradient(rows, G, keys, solutions, 0, c)
    out = (c.QK_SCALE * acc + u) * damping[:, None]
    store_queries(head_base(dq, batch, T, head, c.HEADS, c.D), out, m0, stop, c)
