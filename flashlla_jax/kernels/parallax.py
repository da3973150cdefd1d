"""The kernels of Parallax: a forward kernel, and two backward ones, per tile of queries and per tile of keys.

blockwise_parallax.py has the formulas, with the same symbols. The forward kernel passes once over the keys. It keeps
the running maximum of the logits, the running mean t of k.r, and two sums of the values: one by p, which gives vbar,
and one by p a, which gives o. When a tile moves t by delta, every a so far grows by delta, and the
second sum by delta times the first. So a key that has most of the weight is always near t, and nothing large cancels.

Beside the normaliser and t, the backward kernels need only vbar and the excess o - vbar: gbar is g.vbar, and c is
-g.excess.

The sums of the weights are those of the rounded weights (tiles.py, rounded_product). vbar is divided by the sum of p.
The sum of p a says how much of vbar the excess has too much. So the rounding error is a part of the values' spread. It
is 0 if one key has all the weight. k.r needs no halves: the probe is given, not solved for.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flashlla_jax.kernels.forward import NO_KEYS, NO_LOGIT
from flashlla_jax.kernels.tiles import (
    Rows,
    as_logits,
    head_base,
    key_program,
    keys_of,
    load_cotangents,
    load_key_tile,
    load_keys,
    load_origin,
    load_pairs,
    load_queries,
    load_rows,
    load_values,
    log_weights,
    logits,
    one_column,
    query_program,
    relative_queries,
    rounded_product,
    store_full,
    store_pairs,
    store_queries,
    store_rows,
    store_tile,
    weights,
)
from flashlla_jax.kernels.visible import (
    Tiles,
    Visible,
    key_tile,
    load_intervals,
    load_tiles,
    sees,
    table_row,
    visible_to,
    visible_to_queries,
    visited,
)


class Softmax(NamedTuple):
    """A tile of queries after its pass over the keys."""

    top: tl.tensor  # (BM,), the largest logit
    omega: tl.tensor  # the sum of the weights relative to it
    t: tl.tensor  # the mean of k.r
    vbar: tl.tensor  # (BM, DVP)
    excess: tl.tensor  # o - vbar


class Queries(NamedTuple):
    """Pointers to a head's queries that may see a tile of keys, and to the query kernel's results for them."""

    q: tl.tensor
    r: tl.tensor
    g: tl.tensor
    lse_t: tl.tensor
    gbar_c: tl.tensor
    lse_rest: tl.tensor
    origins: tl.tensor
    batch: tl.tensor
    kv_head: tl.tensor
    tiles: Tiles
    visible: Visible


@triton.jit
def a_of(t, kr, c: tl.constexpr):
    """a_ij = 1 + t - k.r. EXACT: 1 is added last, after the large parts have cancelled."""
    if c.EXACT:
        a = (t - kr) + 1.0
    else:
        a = (1.0 + t) - kr
    return a


@triton.jit
def safe(total):
    """The sum as a divisor: 1 for a query that has seen no key."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def attend(rows, R, keys, c: tl.constexpr):
    """The one pass over the keys. It returns ``Softmax``."""
    top = tl.full((c.BM,), NO_LOGIT, tl.float32)
    omega = tl.zeros((c.BM,), tl.float32)
    t = tl.zeros((c.BM,), tl.float32)
    acc_p = tl.zeros((c.BM, c.DVP), tl.float32)
    acc_pa = tl.zeros((c.BM, c.DVP), tl.float32)
    sum_p = tl.zeros((c.BM, 16), tl.float32)
    sum_pa = tl.zeros((c.BM, 16), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            V = load_values(keys, n0, edge == 1, c)
            s = logits(rows, K, n0, keys, edge == 1, c)
            kr = tl.dot(R, tl.trans(K), input_precision=c.PRECISION)
            new_top = tl.maximum(top, tl.max(s, 1))
            w = tl.math.exp2(log_weights(s, new_top[:, None], 0.0, c))
            shrink = tl.math.exp2(log_weights(top, new_top, 0.0, c))
            before = omega * shrink
            omega = before + tl.sum(w, 1)
            delta = tl.sum(w * (kr - t[:, None]), 1) / safe(omega)
            if c.EXACT:  # once more, for the rest: see _mean in blockwise_parallax.py
                delta += (tl.sum(w * (kr - (t + delta)[:, None]), 1) - before * delta) / safe(omega)
            t += delta
            acc_p *= shrink[:, None]
            sum_p *= shrink[:, None]
            acc_pa = acc_pa * shrink[:, None] + acc_p * delta[:, None]
            sum_pa = sum_pa * shrink[:, None] + sum_p * delta[:, None]
            acc_p, sum_p = rounded_product(w, V, acc_p, sum_p, False, c.PRECISION)
            acc_pa, sum_pa = rounded_product(w * a_of(t[:, None], kr, c), V, acc_pa, sum_pa, False, c.PRECISION)
            top = new_top
    vbar = acc_p / safe(one_column(sum_p))[:, None]
    excess = (acc_pa - one_column(sum_pa)[:, None] * vbar) / safe(omega)[:, None]
    return Softmax(top, omega, t, vbar, excess)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    r,
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
    vbar_ptr,
    excess_ptr,
    lse_ptr,
    lse_rest_ptr,
    t_ptr,
    omega_ptr,
    logsumexp_ptr,
    c: tl.constexpr,
):
    """The output of a tile of queries, and for the backward kernels vbar, o - vbar, the normaliser and t."""
    at = query_program(order, T, c)
    if c.CUT:
        if at.m0 >= at.stop:
            return
    m0, stop, batch, head, kv_head = at.m0, at.stop, at.batch, at.head, at.kv_head
    row_base = batch.to(tl.int64) * T * c.HEADS + head
    visible = visible_to_queries(start, end, query_ids, key_ids, mask, order, at, T, S, c)
    keys = keys_of(k, v, origins, table, at, visible, T, S, c)
    Q = load_queries(head_base(q, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
    R = load_queries(head_base(r, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
    intervals = load_intervals(visible, m0, c)
    zeros = tl.zeros((c.BM,), tl.float32)
    found = attend(Rows(Q, zeros, zeros, Q, zeros, intervals), R, keys, c)

    # the interval decides too, as in forward.py: by omega alone blind rows had an output on an H100, why is not known
    blind = (intervals.end <= intervals.start) | (found.omega == 0.0)
    omega = tl.where(blind, 0.0, found.omega)
    vbar = tl.where(blind[:, None], 0.0, found.vbar)
    excess = tl.where(blind[:, None], 0.0, found.excess)
    lse = found.top
    lse_rest = tl.where(blind, NO_KEYS, tl.math.log2(safe(omega)))
    logsumexp = lse * c.STEEPNESS + lse_rest
    if not c.EXACT:
        lse = tl.where(blind, NO_KEYS, found.top + tl.math.log2(safe(omega)))
        logsumexp = lse
    _, taken_off = relative_queries(Q, keys.origin, anchors, m0, batch, kv_head, T, c)
    logsumexp += c.SCALE * taken_off
    store_rows(lse_ptr + row_base, lse, m0, stop, c.HEADS, c.BM)
    if c.EXACT:
        store_rows(lse_rest_ptr + row_base, lse_rest, m0, stop, c.HEADS, c.BM)
    store_rows(t_ptr + row_base, tl.where(blind, 0.0, found.t), m0, stop, c.HEADS, c.BM)
    store_rows(omega_ptr + row_base, omega, m0, stop, c.HEADS, c.BM)
    store_rows(logsumexp_ptr + row_base, logsumexp * 0.6931471805599453, m0, stop, c.HEADS, c.BM)  # ln 2
    base = batch.to(tl.int64) * T * c.HEADS * c.DV + head * c.DV
    store_tile(o + base, vbar + excess, m0, stop, c.HEADS * c.DV, c.DV, c.BM, c.DVP)
    store_tile(vbar_ptr + base, vbar, m0, stop, c.HEADS * c.DV, c.DV, c.BM, c.DVP)
    store_tile(excess_ptr + base, excess, m0, stop, c.HEADS * c.DV, c.DV, c.BM, c.DVP)


@triton.jit
def key_centre(intervals, keys, c: tl.constexpr):
    """A key among those that the tile sees, (DP,): the mean of the first whole tile, or one key."""
    n0 = key_tile(keys, 0, False, c)
    row = 0
    if not c.FROM_FIRST:  # the last of the rows' first keys: all see it if they have a key in common
        row = tl.max(tl.where(intervals.start < intervals.end, intervals.start, 0), 0)
    whole = keys.tiles.wholes > 0
    first = tl.where(whole, n0, row)
    rows = first + tl.arange(0, c.BN)
    columns = tl.arange(0, c.DP)
    counted = (rows < keys.visible.S) & (whole | (rows == row))
    pointers = keys.k + rows.to(tl.int64)[:, None] * c.KV_HEADS * c.D + columns[None, :]
    K = tl.load(pointers, mask=counted[:, None] & (columns < c.D)[None, :], other=0.0).to(tl.float32)
    return tl.sum(K, 0) / tl.where(whole, c.BN * 1.0, 1.0) - keys.origin


@triton.jit
def query_gradients(rows, R, G, t, gbar, cc, keys, c: tl.constexpr):
    """sum_j ds_ij k_j (of the logits q.k) and sum_j p_ij b_ij k_j."""
    acc_q = tl.zeros((c.BM, c.DP), tl.float32)
    sum_q = tl.zeros((c.BM, 16), tl.float32)
    acc_r = tl.zeros((c.BM, c.DP), tl.float32)
    sum_r = tl.zeros((c.BM, 16), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            V = load_values(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            kr = tl.dot(R, tl.trans(K), input_precision=c.PRECISION)
            pb = w * (tl.dot(G, tl.trans(V), input_precision=c.PRECISION) - gbar[:, None])
            acc_r, sum_r = rounded_product(pb, K, acc_r, sum_r, False, c.PRECISION)
            ds = pb * a_of(t[:, None], kr, c) + w * cc[:, None]
            acc_q, sum_q = rounded_product(ds, K, acc_q, sum_q, False, c.PRECISION)
    # both sums are 0 except for rounding, which an offset of the keys would multiply
    centre = key_centre(rows.intervals, keys, c)
    return (
        acc_q - one_column(sum_q)[:, None] * centre[None, :],
        acc_r - one_column(sum_r)[:, None] * centre[None, :],
    )


@triton.jit
def query_kernel(
    q,
    k,
    v,
    r,
    start,
    end,
    query_ids,
    key_ids,
    mask,
    table,
    order,
    origins,
    vbar_ptr,
    excess_ptr,
    lse_ptr,
    lse_rest_ptr,
    t_ptr,
    g,
    T,
    S,
    dq,
    dr,
    lse_t_ptr,
    gbar_c_ptr,
    weight_rest_ptr,
    c: tl.constexpr,
):
    """dq, dr, and for the key kernel two pairs of each row of a tile: the lse with t, and gbar with c."""
    at = query_program(order, T, c)
    if c.CUT:
        if at.m0 >= at.stop:
            return
    m0, stop, batch, head = at.m0, at.stop, at.batch, at.head
    row_base = batch.to(tl.int64) * T * c.HEADS + head
    visible = visible_to_queries(start, end, query_ids, key_ids, mask, order, at, T, S, c)
    keys = keys_of(k, v, origins, table, at, visible, T, S, c)
    Q = load_queries(head_base(q, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
    R = load_queries(head_base(r, batch, T, head, c.HEADS, c.D), m0, stop, True, c)
    G = load_cotangents(head_base(g, batch, T, head, c.HEADS, c.DV), m0, stop, True, c)
    vbar = load_cotangents(head_base(vbar_ptr, batch, T, head, c.HEADS, c.DV), m0, stop, True, c)
    gbar = tl.sum(G.to(tl.float32) * vbar, 1)
    excess = load_cotangents(head_base(excess_ptr, batch, T, head, c.HEADS, c.DV), m0, stop, True, c)
    cc = -tl.sum(G.to(tl.float32) * excess.to(tl.float32), 1)
    lse = load_rows(lse_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
    t = load_rows(t_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)
    lse_rest = lse
    if c.EXACT:
        lse_rest = load_rows(lse_rest_ptr + row_base, m0, stop, c.HEADS, c.BM, 0.0)

    valid = m0 + tl.arange(0, c.BM) < stop  # the key kernel reads the other rows of the tile too: their weight is 0
    first_row = (batch.to(tl.int64) * c.HEADS + head) * tl.cdiv(T, c.BM) * c.BM
    nothing = tl.where(valid, 0.0, float("inf"))
    if c.EXACT:
        store_full(weight_rest_ptr + first_row, lse_rest + nothing, at, 1, c)
        store_pairs(lse_t_ptr + first_row * 2, lse, t, at, c)
    else:
        store_pairs(lse_t_ptr + first_row * 2, lse + nothing, t, at, c)
    store_pairs(gbar_c_ptr + first_row * 2, gbar, cc, at, c)

    rows = Rows(Q, lse, lse_rest, Q, lse, load_intervals(visible, m0, c))
    acc_q, acc_r = query_gradients(rows, R, G, t, gbar, cc, keys, c)
    store_queries(head_base(dq, batch, T, head, c.HEADS, c.D), c.QK_SCALE * acc_q, m0, stop, c)
    store_queries(head_base(dr, batch, T, head, c.HEADS, c.D), -acc_r, m0, stop, c)


@triton.jit
def key_gradients(dk, dv, at, queries, c: tl.constexpr):
    """dk and dv with the share of the queries of one head added; tiles are keys by queries, the edges come first.

    This is a part of ``key_gradients`` in backward_key.py: see there.
    """
    T = queries.visible.T
    for whole in tl.static_range(2):
        count = queries.tiles.wholes if whole else queries.tiles.edges
        for i in tl.range(0, count, num_stages=c.STAGES if whole else c.EDGE_STAGES):
            m0 = visited(queries.tiles, queries.visible.order, i, whole == 0, not c.MASK, c) * c.BM
            Q = load_queries(queries.q, m0, T, whole == 0, c)
            R = load_queries(queries.r, m0, T, whole == 0, c)
            G = load_cotangents(queries.g, m0, T, whole == 0, c)
            K = at.K
            if c.UPCAST:
                K -= load_origin(queries.origins, m0, queries.batch, queries.kv_head, T, c)[None, :]
            lse, t = load_pairs(queries.lse_t, m0, c.BM)
            gbar, cc = load_pairs(queries.gbar_c, m0, c.BM)
            lse_rest = lse
            if c.EXACT:
                lse_rest = tl.load(queries.lse_rest + m0 + tl.arange(0, c.BM))
            s = tl.dot(K, tl.trans(Q), input_precision=c.PRECISION)
            kr = tl.dot(K, tl.trans(R), input_precision=c.PRECISION)
            gamma = tl.dot(at.V, tl.trans(G), input_precision=c.PRECISION)
            s = log_weights(as_logits(s, c), lse[None, :], lse_rest[None, :], c)
            if whole == 0:
                intervals = load_intervals(queries.visible, m0, c)
                s = tl.where(sees(intervals, at.n0 + tl.arange(0, c.BN), queries.visible, True, c), s, -float("inf"))
            w = tl.math.exp2(s)
            a = a_of(t[None, :], kr, c)
            dv = tl.dot((w * a).to(K.dtype), G, acc=dv, input_precision=c.PRECISION)
            less_b = w * (gbar[None, :] - gamma)
            dk = tl.dot(less_b.to(K.dtype), R, acc=dk, input_precision=c.PRECISION)
            ds = c.QK_SCALE * (w * cc[None, :] - a * less_b)
            dk = tl.dot(ds.to(K.dtype), Q, acc=dk, input_precision=c.PRECISION)
    return dk, dv


@triton.jit
def key_kernel(
    q,
    k,
    v,
    r,
    start,
    end,
    query_ids,
    key_ids,
    mask,
    table,
    order,
    origins,
    g,
    lse_t_ptr,
    gbar_c_ptr,
    lse_rest_ptr,
    T,
    S,
    dk_ptr,
    dv_ptr,
    c: tl.constexpr,
):
    """dk and dv of a tile of BN keys, summed in float32 over the query heads that share it."""
    tiles, tile, batch, kv_head = key_program(S, c)
    n0 = tile * c.BN
    rows_of_pairs = tl.cdiv(T, c.QUERY_BM) * c.QUERY_BM
    at = load_key_tile(k, v, n0, batch, kv_head, S, c)
    dk = tl.zeros((c.BN, c.DP), tl.float32)
    dv = tl.zeros((c.BN, c.DVP), tl.float32)
    for member in range(c.HEADS // c.KV_HEADS):
        head = kv_head * (c.HEADS // c.KV_HEADS) + member
        row = table_row(batch, head, tiles, tile, c)
        first_row = (batch.to(tl.int64) * c.HEADS + head) * rows_of_pairs
        queries = Queries(
            head_base(q, batch, T, head, c.HEADS, c.D),
            head_base(r, batch, T, head, c.HEADS, c.D),
            head_base(g, batch, T, head, c.HEADS, c.DV),
            lse_t_ptr + first_row * 2,
            gbar_c_ptr + first_row * 2,
            lse_rest_ptr + first_row,
            origins,
            batch,
            kv_head,
            load_tiles(table, row),
            visible_to(start, end, query_ids, key_ids, mask, order + row * tl.cdiv(T, c.BM), batch, head, T, S, c),
        )
        dk, dv = key_gradients(dk, dv, at, queries, c)
    store_tile(head_base(dk_ptr, batch, S, kv_head, c.KV_HEADS, c.D), dk, n0, S, c.KV_HEADS * c.D, c.D, c.BN, c.DP)
    store_tile(head_base(dv_ptr, batch, S, kv_head, c.KV_HEADS, c.DV), dv, n0, S, c.KV_HEADS * c.DV, c.DV, c.BN, c.DVP)
