"""The backward kernels: a program per tile of queries solves for u and forms dq, one per tile of keys forms dk and dv.

Everything but dq and dlambda is kept per unit of the cotangent as it came: the damping of ``delta_eps`` is a factor of
each row that enters once, through ``weight_lse`` = lse - log2(damping). x and u are kept negated, so that a_ij and b_ij
are what the accumulators hold plus one number per row.
"""

import triton
import triton.language as tl

from flashlla_jax.kernels.forward import key_scale
from flashlla_jax.kernels.solver import solve
from flashlla_jax.kernels.tiles import (
    as_operand,
    head_base,
    key_range,
    load_first,
    load_keys,
    load_origin,
    load_pairs,
    load_rows,
    load_tile,
    logits,
    one_column,
    rounded_product,
    store_pairs,
    store_rows,
    store_tile,
)


@triton.jit
def right_hand_side(Q, G, g0, lse, k_base, origin, v_base, m0, T, S, whole, end, SCALE, refine, parts,
                    KSTRIDE: tl.constexpr,
                    VSTRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
                    SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr):  # fmt: skip
    """kbar again (cheaper than keeping it), y = sum_j p_ij (gamma_ij - gbar_i) kc_ij, and gbar.

    y's weights are rounded like gamma - g0,
    so g0 ought to be near gbar: the first ``refine`` (0 or 1) passes find it. The
    last ``parts`` (1 or 2) gather y: its weights as rounded to bfloat16, and what that left of them. (A choice between
    two loops would be faster than two passes, but makes ptxas serialise the wgmma of both, its C7515.)
    """
    acc_k = tl.zeros((BM, DP), tl.float32)
    sums_k = tl.zeros((BM, 16), tl.float32)
    acc_y = tl.zeros((BM, DP), tl.float32)
    sums_y = tl.zeros((BM, 16), tl.float32)
    excess = tl.zeros((BM,), tl.float32)
    for part in range(refine + parts):
        gathered = tl.where(part > refine, 1.0, 0.0)  # what an earlier part of y has gathered is kept
        g0 += excess * (1.0 - gathered)
        excess *= gathered
        acc_y *= gathered
        sums_y *= gathered
        for masked in tl.static_range(2):
            low = whole if masked else 0
            high = end if masked else whole
            for n0 in range(low, high, BN):
                K = load_keys(k_base, n0, S, origin, KSTRIDE, D, BN, DP, masked == 1, UPCAST)
                V = load_tile(v_base, n0, S, VSTRIDE, DV, BN, DVP, masked == 1, UPCAST)
                s = logits(Q, K, m0, n0, T, S, SCALE, CAUSAL, masked == 1, BM, BN, PRECISION)
                w = tl.math.exp2(s - lse[:, None])
                t = w * (tl.dot(G, tl.trans(V), input_precision=PRECISION) - g0[:, None])
                excess += tl.sum(t, 1)
                if not UPCAST and not SPLIT:
                    if K.dtype == tl.bfloat16:
                        # rounded by hand, to the nearest: the conversion there and back runs at the rate of exp2
                        near = ((t.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)
                    else:
                        near = t.to(K.dtype).to(tl.float32)
                    t = tl.where(part > refine, t - near, near)
                acc_k, sums_k = rounded_product(w, K, acc_k, sums_k, SPLIT, PRECISION)
                acc_y, sums_y = rounded_product(t, K, acc_y, sums_y, SPLIT, PRECISION)
    kbar = acc_k / one_column(sums_k)[:, None]
    excess = excess / parts
    # excess * 0: a NaN, which rounding by hand may lose
    return kbar, acc_y - one_column(sums_y)[:, None] * kbar + (excess * 0.0)[:, None], g0 + excess


@triton.jit
def query_gradient(Q, G, x_hi, x_lo, u_hi, u_lo, a0, b0, c0, lse, kbar, k_base, origin, v_base, m0, T, S, whole, end,
                   SCALE, KSTRIDE: tl.constexpr, VSTRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                   CAUSAL: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr):  # fmt: skip
    """sum_j ds_ij k_j, the ds_ij summing to 0. x and u come negated: a = a0 + x.k, b = b0 + g.v + u.k."""
    acc = tl.zeros((BM, DP), tl.float32)
    sums = tl.zeros((BM, 16), tl.float32)
    for masked in tl.static_range(2):
        low = whole if masked else 0
        high = end if masked else whole
        for n0 in range(low, high, BN):
            K = load_keys(k_base, n0, S, origin, KSTRIDE, D, BN, DP, masked == 1, UPCAST)
            V = load_tile(v_base, n0, S, VSTRIDE, DV, BN, DVP, masked == 1, UPCAST)
            w = tl.math.exp2(logits(Q, K, m0, n0, T, S, SCALE, CAUSAL, masked == 1, BM, BN, PRECISION) - lse[:, None])
            a = tl.zeros((BM, BN), tl.float32)
            b = tl.dot(G, tl.trans(V), input_precision=PRECISION)
            if LOW:  # before the large halves, as in the forward pass
                a = tl.dot(x_lo, tl.trans(K), acc=a, input_precision=PRECISION)
                b = tl.dot(u_lo, tl.trans(K), acc=b, input_precision=PRECISION)
            a = tl.dot(x_hi, tl.trans(K), acc=a, input_precision=PRECISION)
            b = tl.dot(u_hi, tl.trans(K), acc=b, input_precision=PRECISION)
            ds = w * ((a + a0[:, None]) * (b + b0[:, None]) + c0[:, None])
            acc, sums = rounded_product(ds, K, acc, sums, False, PRECISION)
    return acc - one_column(sums)[:, None] * kbar


@triton.jit
def query_kernel(
    q, k, v, lam_ptr, x_hi_ptr, x_lo_ptr, lse_ptr, defect_ptr, damping_ptr, g, T, S,
    dq, dlam_ptr, u_hi_ptr, u_lo_ptr, lse_a0_ptr, b0_c0_ptr, low_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, QK_SCALE: tl.constexpr, RTOL: tl.constexpr,
    ATOL: tl.constexpr, MAX_ITERS: tl.constexpr, PRECONDITION: tl.constexpr, FINISH: tl.constexpr,
    HALVES: tl.constexpr, SPLIT_BELOW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq, dlambda, and what the key kernel needs of each row: u, and four numbers in two pairs.

    The pairs are the lse of its weights with a0 (a = a0 - x.k), and b0 (b = gamma + b0 - u.k) with c0 = lambda u.x;
    they have a place for every row of the last tile.
    """
    tiles = tl.cdiv(T, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest prefixes first
    head = tl.program_id(0) // tiles % HEADS
    batch = tl.program_id(0) // tiles // HEADS
    m0 = tile * BM
    QSTRIDE: tl.constexpr = HEADS * D
    KSTRIDE: tl.constexpr = KV_HEADS * D
    VSTRIDE: tl.constexpr = KV_HEADS * DV
    OSTRIDE: tl.constexpr = HEADS * DV
    kv_head = head // (HEADS // KV_HEADS)
    k_base = head_base(k, batch, S, kv_head, KV_HEADS, D)
    v_base = head_base(v, batch, S, kv_head, KV_HEADS, DV)
    row_base = batch.to(tl.int64) * T * HEADS + head
    Q = load_tile(head_base(q, batch, T, head, HEADS, D), m0, T, QSTRIDE, D, BM, DP, True, UPCAST)
    G = load_tile(head_base(g, batch, T, head, HEADS, DV), m0, T, OSTRIDE, DV, BM, DVP, True, UPCAST)
    lam = load_rows(lam_ptr + row_base, m0, T, HEADS, BM, 1.0)
    lse = load_rows(lse_ptr + row_base, m0, T, HEADS, BM, 0.0)
    damping = load_rows(damping_ptr + row_base, m0, T, HEADS, BM, 1.0)
    whole, end = key_range(m0, T, S, CAUSAL, BM, BN)
    origin = load_origin(k_base, m0, T, S, KSTRIDE, D, BM, DP, CAUSAL, UPCAST)
    scale2 = key_scale(k_base, whole, S, KSTRIDE, D, UPCAST, BN, DP)
    split = tl.min(lam, 0) < SPLIT_BELOW * scale2

    # gamma relative to that of a value that every query of the tile sees, the mean of the first ones where they all do
    centre = load_first(v_base, DV, DVP)
    if whole >= BN:
        centre = tl.sum(load_tile(v_base, 0, S, VSTRIDE, DV, BN, DVP, True, True), 0) * (1.0 / BN)
    g0 = tl.sum(G.to(tl.float32) * centre[None, :], 1)
    parts = 1
    if UPCAST:
        refine = 1
    else:  # exactly, where the prefix is so short that this is cheap
        refine = (end <= 4 * BN).to(tl.int32)
        if SPLIT_BELOW != float("inf"):  # else both parts of y are gathered at once
            parts = 1 + split.to(tl.int32)
    kbar, y, gbar = right_hand_side(Q, G, g0, lse, k_base, origin, v_base, m0, T, S, whole, end, SCALE, refine,
                                    parts, KSTRIDE, VSTRIDE, D, DV, CAUSAL, SPLIT_BELOW == float("inf"), PRECISION,
                                    UPCAST, BM, BN, DP, DVP)  # fmt: skip
    u, u_defect, _, _ = solve(y, Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, split, KSTRIDE, D,
                              CAUSAL, RTOL, ATOL, MAX_ITERS, PRECONDITION, FINISH, SPLIT_BELOW, PRECISION, UPCAST,
                              BM, BN, DP)  # fmt: skip

    x_hi = load_tile(head_base(x_hi_ptr, batch, T, head, HEADS, D), m0, T, QSTRIDE, D, BM, DP, True, UPCAST)
    u_hi = as_operand(-u, Q.dtype, PRECISION)
    store_tile(head_base(u_hi_ptr, batch, T, head, HEADS, D), u_hi, m0, T, QSTRIDE, D, BM, DP)
    x_used = x_hi.to(tl.float32)
    u_used = u_hi.to(tl.float32)
    x_lo = x_hi
    u_lo = u_hi
    with_low = False
    if HALVES:
        x_lo = load_tile(head_base(x_lo_ptr, batch, T, head, HEADS, D), m0, T, QSTRIDE, D, BM, DP, True, UPCAST)
        x_used += x_lo.to(tl.float32)
        # u goes with x: where the forward pass left x's low half at 0, u's is left out too. NaN counts as a low half.
        with_low = (tl.max(tl.sum(tl.abs(x_lo.to(tl.float32)), 1), 0) <= 0.0) == 0
        u_lo = as_operand(tl.where(with_low, -u - u_used, 0.0), Q.dtype, PRECISION)
        store_tile(head_base(u_lo_ptr, batch, T, head, HEADS, D), u_lo, m0, T, QSTRIDE, D, BM, DP)
        u_used += u_lo.to(tl.float32)
        store_rows(low_ptr + row_base, tl.zeros((BM,), tl.int32) + with_low.to(tl.int32), m0, T, HEADS, BM)
    a0 = 1.0 - tl.sum(x_used * kbar, 1)
    b0 = -tl.sum(u_used * kbar, 1) - gbar
    if UPCAST and PRECISION != "tf32":
        a0 += load_rows(defect_ptr + row_base, m0, T, HEADS, BM, 0.0)
        b0 += u_defect
    dlam = -tl.sum(u * x_used, 1)
    c0 = lam * dlam
    store_rows(dlam_ptr + row_base, dlam * damping, m0, T, HEADS, BM)
    valid = m0 + tl.arange(0, BM) < T  # the key kernel reads the other rows of the tile too: of weight zero
    weight_lse = tl.where(valid, lse - tl.math.log2(damping), float("inf"))
    pairs = (batch.to(tl.int64) * HEADS + head) * tiles * BM * 2
    store_pairs(lse_a0_ptr + pairs, weight_lse, tl.where(valid, a0, 0.0), m0, BM)
    store_pairs(b0_c0_ptr + pairs, tl.where(valid, b0, 0.0), tl.where(valid, c0, 0.0), m0, BM)

    if with_low:
        acc = query_gradient(Q, G, x_hi, x_lo, u_hi, u_lo, a0, b0, c0, lse, kbar, k_base, origin, v_base, m0, T, S,
                             whole, end, SCALE, KSTRIDE, VSTRIDE, D, DV, CAUSAL, HALVES, PRECISION, UPCAST, BM, BN, DP,
                             DVP)  # fmt: skip
    else:
        acc = query_gradient(Q, G, x_hi, x_lo, u_hi, u_lo, a0, b0, c0, lse, kbar, k_base, origin, v_base, m0, T, S,
                             whole, end, SCALE, KSTRIDE, VSTRIDE, D, DV, CAUSAL, False, PRECISION, UPCAST, BM, BN, DP,
                             DVP)  # fmt: skip
    out = (QK_SCALE * acc + u) * damping[:, None]
    store_tile(head_base(dq, batch, T, head, HEADS, D), out, m0, T, QSTRIDE, D, BM, DP)


@triton.jit
def key_gradients(dk, dk_u, dv, keys, V, k_base, n0, low, high, head, batch, T, S, q, x_hi_ptr, x_lo_ptr, u_hi_ptr,
                  u_lo_ptr, g, lse_a0_ptr, b0_c0_ptr, TP, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
                  DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
                  LOW: tl.constexpr, SCALE: tl.constexpr, QK_SCALE: tl.constexpr, PRECISION: tl.constexpr,
                  UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """dk, the part of it that u makes, and dv, with the share of the queries low .. high of one head added.

    Tiles are (BN, BM), keys by queries: the weights are then the left operand of the products that gather dk and dv, as
    they lie in registers. EDGE: the tiles may be hidden in part, or reach past the last query (where all is zero).
    """
    QSTRIDE: tl.constexpr = HEADS * D
    OSTRIDE: tl.constexpr = HEADS * DV
    pairs = (batch.to(tl.int64) * HEADS + head) * TP * 2
    q_base = head_base(q, batch, T, head, HEADS, D)
    g_base = head_base(g, batch, T, head, HEADS, DV)
    x_hi = head_base(x_hi_ptr, batch, T, head, HEADS, D)
    u_hi = head_base(u_hi_ptr, batch, T, head, HEADS, D)
    x_lo = head_base(x_lo_ptr, batch, T, head, HEADS, D)
    u_lo = head_base(u_lo_ptr, batch, T, head, HEADS, D)
    for m0 in range(low, high, BM):
        Q = load_tile(q_base, m0, T, QSTRIDE, D, BM, DP, EDGE, UPCAST)
        X = load_tile(x_hi, m0, T, QSTRIDE, D, BM, DP, EDGE, UPCAST)
        U = load_tile(u_hi, m0, T, QSTRIDE, D, BM, DP, EDGE, UPCAST)
        G = load_tile(g_base, m0, T, OSTRIDE, DV, BM, DVP, EDGE, UPCAST)
        K = keys
        if UPCAST:
            origin = load_origin(k_base, m0, T, S, KV_HEADS * D, D, BM, DP, CAUSAL, UPCAST)
            K -= origin[None, :]
        lse, a0 = load_pairs(lse_a0_ptr + pairs, m0, BM)
        b0, c0 = load_pairs(b0_c0_ptr + pairs, m0, BM)
        s = tl.dot(K, tl.trans(Q), input_precision=PRECISION)
        a = tl.dot(K, tl.trans(X), input_precision=PRECISION)
        b = tl.dot(V, tl.trans(G), input_precision=PRECISION)
        b = tl.dot(K, tl.trans(U), acc=b, input_precision=PRECISION)
        if LOW:  # not before the large halves, as elsewhere: three times the spills in float32
            X_lo = load_tile(x_lo, m0, T, QSTRIDE, D, BM, DP, EDGE, UPCAST)
            U_lo = load_tile(u_lo, m0, T, QSTRIDE, D, BM, DP, EDGE, UPCAST)
            a = tl.dot(K, tl.trans(X_lo), acc=a, input_precision=PRECISION)
            b = tl.dot(K, tl.trans(U_lo), acc=b, input_precision=PRECISION)
        s = s * SCALE - lse[None, :]
        if EDGE and CAUSAL:
            seen = (n0 + tl.arange(0, BN))[:, None] <= (m0 + S - T + tl.arange(0, BM))[None, :]
            s = tl.where(seen, s, -float("inf"))
        w = tl.math.exp2(s)
        a += a0[None, :]
        pa = (w * a).to(K.dtype)
        dv = tl.dot(pa, G, acc=dv, input_precision=PRECISION)
        if DP <= 64:  # a sum of its own, so that no product of this tile waits for another; wider ones lack registers
            dk_u = tl.dot(pa, U, acc=dk_u, input_precision=PRECISION)
        else:
            dk = tl.dot(pa, U, acc=dk, input_precision=PRECISION)
        pb = w * (b + b0[None, :])
        ds = QK_SCALE * (a * pb + w * c0[None, :])
        dk = tl.dot(pb.to(K.dtype), X, acc=dk, input_precision=PRECISION)
        dk = tl.dot(ds.to(K.dtype), Q, acc=dk, input_precision=PRECISION)
    return dk, dk_u, dv


@triton.jit
def head_gradients(dk, dk_u, dv, keys, V, k_base, n0, first, whole, head, batch, T, S, q, x_hi_ptr, x_lo_ptr, u_hi_ptr,
                   u_lo_ptr, g, lse_a0_ptr, b0_c0_ptr, TP, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
                   DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, CAUSAL: tl.constexpr, LOW: tl.constexpr,
                   SCALE: tl.constexpr, QK_SCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The same with the share of a whole head added: the tiles at the edges, then those in between."""
    tail = T // BM * BM
    for edge in range(2):  # the partly hidden ones, then the one that reaches past the last query
        low = tl.where(edge == 0, first, tl.maximum(whole, tail))
        high = tl.where(edge == 0, whole, T)
        dk, dk_u, dv = key_gradients(dk, dk_u, dv, keys, V, k_base, n0, low, high, head, batch, T, S, q, x_hi_ptr,
                                     x_lo_ptr, u_hi_ptr, u_lo_ptr, g, lse_a0_ptr, b0_c0_ptr, TP, HEADS, KV_HEADS, D, DV,
                                     DP, DVP, CAUSAL, True, LOW, SCALE, QK_SCALE, PRECISION, UPCAST, BM,
                                     BN)  # fmt: skip
    return key_gradients(dk, dk_u, dv, keys, V, k_base, n0, whole, tail, head, batch, T, S, q, x_hi_ptr, x_lo_ptr,
                         u_hi_ptr, u_lo_ptr, g, lse_a0_ptr, b0_c0_ptr, TP, HEADS, KV_HEADS, D, DV, DP, DVP, CAUSAL,
                         False, LOW, SCALE, QK_SCALE, PRECISION, UPCAST, BM, BN)  # fmt: skip


@triton.jit
def key_kernel(
    q, k, v, x_hi_ptr, x_lo_ptr, u_hi_ptr, u_lo_ptr, g, lse_a0_ptr, b0_c0_ptr, low_ptr, T, S,
    dk_ptr, dv_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, QK_SCALE: tl.constexpr, HALVES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QUERY_BM: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of BN keys, summed in float32 over the query heads that share it."""
    tiles = tl.cdiv(S, BN)
    tile = tl.program_id(0) % tiles  # the first keys are seen by the most queries
    kv_head = tl.program_id(0) // tiles % KV_HEADS
    batch = tl.program_id(0) // tiles // KV_HEADS
    n0 = tile * BN
    KSTRIDE: tl.constexpr = KV_HEADS * D
    VSTRIDE: tl.constexpr = KV_HEADS * DV
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TP = tl.cdiv(T, QUERY_BM) * QUERY_BM
    k_base = head_base(k, batch, S, kv_head, KV_HEADS, D)
    v_base = head_base(v, batch, S, kv_head, KV_HEADS, DV)
    keys = load_tile(k_base, n0, S, KSTRIDE, D, BN, DP, True, UPCAST)
    V = load_tile(v_base, n0, S, VSTRIDE, DV, BN, DVP, True, UPCAST)
    dk = tl.zeros((BN, DP), tl.float32)
    dk_u = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DVP), tl.float32)

    if CAUSAL:  # key j is seen by the queries from j + T - S on; the tile's last key by all from ``whole`` on
        first = tl.maximum(n0 + T - S, 0) // BM * BM
        whole = tl.minimum(tl.cdiv(tl.maximum(n0 + BN - 1 + T - S, 0), BM) * BM, tl.cdiv(T, BM) * BM)
    else:
        first = 0
        whole = 0
    for member in range(GROUP):
        head = kv_head * GROUP + member
        flagged = 0  # whether some query that sees these keys has a low half of x
        if HALVES:
            row_base = batch.to(tl.int64) * T * HEADS + head
            for start in range(first, T, FLAGS):
                flagged = tl.maximum(flagged, tl.max(load_rows(low_ptr + row_base, start, T, HEADS, FLAGS, 0), 0))
        if flagged > 0:
            dk, dk_u, dv = head_gradients(dk, dk_u, dv, keys, V, k_base, n0, first, whole, head, batch, T, S, q,
                                          x_hi_ptr, x_lo_ptr, u_hi_ptr, u_lo_ptr, g, lse_a0_ptr, b0_c0_ptr, TP, HEADS,
                                          KV_HEADS, D, DV, DP, DVP, CAUSAL, HALVES, SCALE, QK_SCALE, PRECISION, UPCAST,
                                          BM, BN)  # fmt: skip
        else:
            dk, dk_u, dv = head_gradients(dk, dk_u, dv, keys, V, k_base, n0, first, whole, head, batch, T, S, q,
                                          x_hi_ptr, x_lo_ptr, u_hi_ptr, u_lo_ptr, g, lse_a0_ptr, b0_c0_ptr, TP, HEADS,
                                          KV_HEADS, D, DV, DP, DVP, CAUSAL, False, SCALE, QK_SCALE, PRECISION, UPCAST,
                                          BM, BN)  # fmt: skip
    store_tile(head_base(dk_ptr, batch, S, kv_head, KV_HEADS, D), dk + dk_u, n0, S, KSTRIDE, D, BN, DP)
    store_tile(head_base(dv_ptr, batch, S, kv_head, KV_HEADS, DV), dv, n0, S, VSTRIDE, DV, BN, DVP)
