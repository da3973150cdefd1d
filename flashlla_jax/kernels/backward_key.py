"""The key kernel of the backward pass: a program per tile of keys forms dk and dv from the numbers of the query kernel.

The numbers of each row are those of ``backward_query.py``: x and u negated, and all per unit of the cotangent.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flashlla_jax.kernels.tiles import (
    as_logits,
    head_base,
    key_program,
    load_cotangents,
    load_key_tile,
    load_origin,
    load_pairs,
    load_queries,
    load_rows,
    log_weights,
    store_tile,
    with_a0,
    with_b0,
)
from flashlla_jax.kernels.visible import (
    Tiles,
    Visible,
    load_intervals,
    load_tiles,
    sees,
    table_row,
    visible_to,
    visited,
)

CARES: tl.constexpr = tl.constexpr(1024)  # rows whose care the key kernel reads at once


class Queries(NamedTuple):
    """Pointers to the queries of a head that may see a tile of keys, and to the query kernel's numbers of them."""

    q: tl.tensor
    g: tl.tensor
    x_hi: tl.tensor
    x_lo: tl.tensor
    x_rest: tl.tensor
    u_hi: tl.tensor
    u_lo: tl.tensor
    lse_a0: tl.tensor
    b0_c0: tl.tensor
    rests: tl.tensor
    nears: tl.tensor
    lse_rest: tl.tensor
    origins: tl.tensor
    batch: tl.tensor
    kv_head: tl.tensor
    tiles: Tiles
    visible: Visible


@triton.jit
def with_low_parts(a, b, K, queries, m0, PARTS: tl.constexpr, RAGGED: tl.constexpr, c: tl.constexpr):
    """a and b with the products of K and all but the first parts of x and u added, the smallest first."""
    if PARTS > 2:
        X_rest = load_queries(queries.x_rest, m0, queries.visible.T, RAGGED, c)
        a = tl.dot(K, tl.trans(X_rest), acc=a, input_precision=c.PRECISION)
    X_lo = load_queries(queries.x_lo, m0, queries.visible.T, RAGGED, c)
    U_lo = load_queries(queries.u_lo, m0, queries.visible.T, RAGGED, c)
    a = tl.dot(K, tl.trans(X_lo), acc=a, input_precision=c.PRECISION)
    b = tl.dot(K, tl.trans(U_lo), acc=b, input_precision=c.PRECISION)
    return a, b


@triton.jit
def key_gradients(dk, dk_u, dv, at, queries, CARE: tl.constexpr, c: tl.constexpr):
    """dk, the part of it that u makes, and dv, with the share of the queries of one head added.

    Tiles are (BN, BM), keys by queries: the weights are then the left operand of the products that gather dk and dv, as
    they lie in registers. The edges are hidden in part, or reach past the last query (where all is zero); they come
    first.
    """
    PARTS: tl.constexpr = c.PARTS if CARE > 0 else c.FEWEST_PARTS
    T = queries.visible.T
    for whole in tl.static_range(2):
        count = queries.tiles.wholes if whole else queries.tiles.edges
        for i in tl.range(0, count, num_stages=c.STAGES if whole else c.EDGE_STAGES):
            m0 = visited(queries.tiles, queries.visible.order, i, whole == 0, not c.MASK, c) * c.BM
            Q = load_queries(queries.q, m0, T, whole == 0, c)
            X = load_queries(queries.x_hi, m0, T, whole == 0, c)
            U = load_queries(queries.u_hi, m0, T, whole == 0, c)
            G = load_cotangents(queries.g, m0, T, whole == 0, c)
            K = at.K
            if c.UPCAST:
                K -= load_origin(queries.origins, m0, queries.batch, queries.kv_head, T, c)[None, :]
            lse, a0 = load_pairs(queries.lse_a0, m0, c.BM)
            b0, c0 = load_pairs(queries.b0_c0, m0, c.BM)
            s = tl.dot(K, tl.trans(Q), input_precision=c.PRECISION)
            lse_rest = lse
            if c.EXACT:
                near_x, near_u = load_pairs(queries.nears, m0, c.BM)
                lse_rest = tl.load(queries.lse_rest + m0 + tl.arange(0, c.BM))
                zeros = tl.zeros((c.BN, c.BM), tl.float32)
                a = tl.dot(K, tl.trans(X), acc=zeros + near_x[None, :], input_precision=c.PRECISION)
                b = tl.dot(K, tl.trans(U), acc=zeros + near_u[None, :], input_precision=c.PRECISION)
                b = tl.dot(at.V, tl.trans(G), acc=b, input_precision=c.PRECISION)
            else:
                a = tl.zeros((c.BN, c.BM), tl.float32)
                b = tl.dot(at.V, tl.trans(G), input_precision=c.PRECISION)
                if PARTS > 1 and not c.UPCAST:  # in the other kernels' order: a0 makes up for the rounding of that sum
                    a, b = with_low_parts(a, b, K, queries, m0, PARTS, whole == 0, c)
                a = tl.dot(K, tl.trans(X), acc=a, input_precision=c.PRECISION)
                b = tl.dot(K, tl.trans(U), acc=b, input_precision=c.PRECISION)
            if PARTS > 1 and c.UPCAST:  # before the first parts it would be three times the spills
                a, b = with_low_parts(a, b, K, queries, m0, PARTS, whole == 0, c)
            s = log_weights(as_logits(s, c), lse[None, :], lse_rest[None, :], c)
            if whole == 0:
                intervals = load_intervals(queries.visible, m0, c)
                s = tl.where(sees(intervals, at.n0 + tl.arange(0, c.BN), queries.visible, True, c), s, -float("inf"))
            w = tl.math.exp2(s)
            a0_rest, b0_rest = a0, b0
            if (CARE == c.MOST_CARE) and (c.BALANCED_ABOVE < float("inf")):
                a0_rest, b0_rest = load_pairs(queries.rests, m0, c.BM)
            a = with_a0(a, a0[None, :], a0_rest[None, :], CARE, c)
            pa = (w * a).to(K.dtype)
            dv = tl.dot(pa, G, acc=dv, input_precision=c.PRECISION)
            if c.DP <= 64:  # a sum of its own, so that no product of this tile waits for another; wider: no registers
                dk_u = tl.dot(pa, U, acc=dk_u, input_precision=c.PRECISION)
            else:
                dk = tl.dot(pa, U, acc=dk, input_precision=c.PRECISION)
            pb = w * with_b0(b, b0[None, :], b0_rest[None, :], CARE, c)
            ds = c.QK_SCALE * (a * pb + w * c0[None, :])
            dk = tl.dot(pb.to(K.dtype), X, acc=dk, input_precision=c.PRECISION)
            dk = tl.dot(ds.to(K.dtype), Q, acc=dk, input_precision=c.PRECISION)
    return dk, dk_u, dv


@triton.jit
def key_kernel(
    q,
    k,
    v,
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
    u_hi_ptr,
    u_lo_ptr,
    g,
    lse_a0_ptr,
    b0_c0_ptr,
    rests_ptr,
    nears_ptr,
    lse_rest_ptr,
    care_ptr,
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
    dk_u = tl.zeros((c.BN, c.DP), tl.float32)
    dv = tl.zeros((c.BN, c.DVP), tl.float32)

    for member in range(c.HEADS // c.KV_HEADS):
        head = kv_head * (c.HEADS // c.KV_HEADS) + member
        row = table_row(batch, head, tiles, tile, c)
        first_row = (batch.to(tl.int64) * c.HEADS + head) * rows_of_pairs
        pairs = first_row * 2
        seen_by = load_tiles(table, row)
        queries = Queries(
            head_base(q, batch, T, head, c.HEADS, c.D),
            head_base(g, batch, T, head, c.HEADS, c.DV),
            head_base(x_hi_ptr, batch, T, head, c.HEADS, c.D),
            head_base(x_lo_ptr, batch, T, head, c.HEADS, c.D),
            head_base(x_rest_ptr, batch, T, head, c.HEADS, c.D),
            head_base(u_hi_ptr, batch, T, head, c.HEADS, c.D),
            head_base(u_lo_ptr, batch, T, head, c.HEADS, c.D),
            lse_a0_ptr + pairs,
            b0_c0_ptr + pairs,
            rests_ptr + pairs,
            nears_ptr + pairs,
            lse_rest_ptr + first_row,
            origins,
            batch,
            kv_head,
            seen_by,
            visible_to(start, end, query_ids, key_ids, mask, order + row * tl.cdiv(T, c.BM), batch, head, T, S, c),
        )
        care = 0  # the most that some query needs which may see these keys
        if c.PARTS > 1:
            row_base = batch.to(tl.int64) * T * c.HEADS + head
            last = tl.minimum((seen_by.low + seen_by.edges + seen_by.wholes) * c.BM, T)
            if c.MASK:
                last = T
            for first in range(0 if c.MASK else seen_by.low * c.BM, last, CARES):
                care = tl.maximum(care, tl.max(load_rows(care_ptr + row_base, first, T, c.HEADS, CARES, 0), 0))
        if care > 0:
            if c.MOST_CARE == 1:
                dk, dk_u, dv = key_gradients(dk, dk_u, dv, at, queries, 1, c)
            elif care == 1:
                dk, dk_u, dv = key_gradients(dk, dk_u, dv, at, queries, 1, c)
            else:
                dk, dk_u, dv = key_gradients(dk, dk_u, dv, at, queries, 2, c)
        else:
            dk, dk_u, dv = key_gradients(dk, dk_u, dv, at, queries, 0, c)
    store_tile(
        head_base(dk_ptr, batch, S, kv_head, c.KV_HEADS, c.D), dk + dk_u, n0, S, c.KV_HEADS * c.D, c.D, c.BN, c.DP
    )
    store_tile(head_base(dv_ptr, batch, S, kv_head, c.KV_HEADS, c.DV), dv, n0, S, c.KV_HEADS * c.DV, c.DV, c.BN, c.DVP)
