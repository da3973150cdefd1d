"""The forward kernel: softmax statistics, the solve for x, the output. One program per tile of BM queries of a head."""

import triton
import triton.language as tl

from flashlla_jax.kernels.solver import solve
from flashlla_jax.kernels.tiles import (
    as_operand,
    head_base,
    key_range,
    load_keys,
    load_origin,
    load_rows,
    load_tile,
    logits,
    one_column,
    rounded_product,
    store_rows,
    store_tile,
)


@triton.jit
def key_scale(k_base, whole, S, KSTRIDE: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr, BN: tl.constexpr,
              DP: tl.constexpr):  # fmt: skip
    """The variance of a key's feature: the scale that a ridge is small or large against.

    From the last BN keys that every query of the tile sees,
    so that no query's arithmetic depends on keys hidden from it;
    huge (the careful side, and cheap: the prefix is short) where there are fewer.
    """
    n0 = tl.maximum(whole - BN, 0)
    K = load_tile(k_base, n0, S, KSTRIDE, D, BN, DP, True, UPCAST).to(tl.float32)
    mean = tl.sum(K, 0) * (1.0 / BN)
    centred = tl.where((tl.arange(0, DP) < D)[None, :], K - mean[None, :], 0.0)
    variance = tl.sum(tl.sum(centred * centred, 1), 0) * (1.0 / (BN * D))
    return tl.where(whole >= BN, variance, 1e30)


@triton.jit
def matters(part, scale2, THRESHOLD: tl.constexpr):
    """Whether some row's kc.part, of standard deviation |part| sqrt(scale2), is above THRESHOLD. NaN counts."""
    part = part.to(tl.float32)
    worst = tl.max(tl.sum(part * part, 1), 0) * scale2
    return (worst <= THRESHOLD * THRESHOLD) == 0


@triton.jit
def forward_kernel(
    q, k, v, lam_ptr, T, S,
    o, x_hi, x_lo, lse_ptr, defect_ptr, damping_ptr, omega_ptr, logsumexp_ptr, iterations_ptr, residual_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, DELTA_EPS: tl.constexpr, RTOL: tl.constexpr,
    ATOL: tl.constexpr, MAX_ITERS: tl.constexpr, PRECONDITION: tl.constexpr, FINISH: tl.constexpr, HALVES: tl.constexpr,
    SPLIT_BELOW: tl.constexpr, LOW_ABOVE: tl.constexpr, CAREFUL_ABOVE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """HALVES: x is carried as hi + lo. SPLIT_BELOW: the matvec's weights too, where lambda < SPLIT_BELOW key_scale.

    LOW_ABOVE: the low half is used where it moves some kc.x by more than this. CAREFUL_ABOVE (inf: never): what the
    halves leave of x is used, and the a_ij are made to sum to 1, where that does.
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
    Q = load_tile(head_base(q, batch, T, head, HEADS, D), m0, T, QSTRIDE, D, BM, DP, True, UPCAST)
    row_base = batch.to(tl.int64) * T * HEADS + head
    lam = load_rows(lam_ptr + row_base, m0, T, HEADS, BM, 1.0)
    whole, end = key_range(m0, T, S, CAUSAL, BM, BN)
    origin = load_origin(k_base, m0, T, S, KSTRIDE, D, BM, DP, CAUSAL, UPCAST)

    # softmax statistics and kbar
    top = tl.full((BM,), -float("inf"), tl.float32)
    omega = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, 16), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    for masked in tl.static_range(2):
        low = whole if masked else 0
        high = end if masked else whole
        for n0 in range(low, high, BN):
            K = load_keys(k_base, n0, S, origin, KSTRIDE, D, BN, DP, masked == 1, UPCAST)
            s = logits(Q, K, m0, n0, T, S, SCALE, CAUSAL, masked == 1, BM, BN, PRECISION)
            new_top = tl.maximum(top, tl.max(s, 1))
            w = tl.math.exp2(s - new_top[:, None])
            shrink = tl.math.exp2(top - new_top)
            omega = omega * shrink + tl.sum(w, 1)
            acc, sums = rounded_product(w, K, acc * shrink[:, None], sums * shrink[:, None],
                                        SPLIT_BELOW == float("inf"), PRECISION)  # fmt: skip
            top = new_top
    lse = top + tl.math.log2(omega)
    kbar = acc / one_column(sums)[:, None]  # by the sum of the weights as they were rounded: see rounded_product

    m = kbar - (Q.to(tl.float32) - origin[None, :])
    scale2 = key_scale(k_base, whole, S, KSTRIDE, D, UPCAST, BN, DP)
    split = tl.min(lam, 0) < SPLIT_BELOW * scale2
    x, defect, iterations, rr = solve(m, Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, split,
                                      KSTRIDE, D, CAUSAL, RTOL, ATOL, MAX_ITERS, PRECONDITION, FINISH, SPLIT_BELOW,
                                      PRECISION, UPCAST, BM, BN, DP)  # fmt: skip
    x = tl.where((lam == lam)[:, None], x, float("nan"))  # a bad ridge never gives a plausible number

    hi = as_operand(-x, Q.dtype, PRECISION)
    store_tile(head_base(x_hi, batch, T, head, HEADS, D), hi, m0, T, QSTRIDE, D, BM, DP)
    used = hi.to(tl.float32)
    lo = as_operand(-x - used, Q.dtype, PRECISION)
    with_low = False
    if HALVES:
        # a low half that does not matter is stored as 0, so that the backward pass uses the same x
        with_low = matters(lo, scale2, LOW_ABOVE)
        lo = tl.where(with_low, lo, 0.0).to(Q.dtype)
        store_tile(head_base(x_lo, batch, T, head, HEADS, D), lo, m0, T, QSTRIDE, D, BM, DP)
        used += lo.to(tl.float32)
    rest = lo
    careful = False
    if CAREFUL_ABOVE < float("inf"):
        rest = as_operand(-x - used, Q.dtype, PRECISION)
        careful = matters(rest, scale2, CAREFUL_ABOVE)
        used += tl.where(careful, rest.to(tl.float32), 0.0)
    a0 = 1.0 - tl.sum(used * kbar, 1)
    if UPCAST and PRECISION != "tf32":
        a0 += defect
    damping = omega / (omega + DELTA_EPS * (1.0 + tl.sum(m * x, 1)))

    store_rows(lse_ptr + row_base, lse, m0, T, HEADS, BM)
    logsumexp = lse + SCALE * tl.sum(Q.to(tl.float32) * origin[None, :], 1)
    store_rows(logsumexp_ptr + row_base, logsumexp * 0.6931471805599453, m0, T, HEADS, BM)  # ln 2
    if UPCAST and PRECISION != "tf32":
        store_rows(defect_ptr + row_base, defect, m0, T, HEADS, BM)
    store_rows(damping_ptr + row_base, damping, m0, T, HEADS, BM)
    store_rows(omega_ptr + row_base, omega, m0, T, HEADS, BM)
    store_rows(iterations_ptr + row_base, iterations, m0, T, HEADS, BM)
    store_rows(residual_ptr + row_base, tl.sqrt(rr), m0, T, HEADS, BM)

    if careful:
        a0 += missing_weight(Q, hi, lo, rest, a0, lse, k_base, origin, m0, T, S, whole, end, SCALE, KSTRIDE, D, CAUSAL,
                             PRECISION, UPCAST, BM, BN, DP)  # fmt: skip
        out = output(Q, hi, lo, rest, a0, lse, k_base, origin, v_base, m0, T, S, whole, end, SCALE, KSTRIDE, VSTRIDE, D,
                     DV, CAUSAL, HALVES, CAREFUL_ABOVE < float("inf"), PRECISION, UPCAST, BM, BN, DP, DVP)  # fmt: skip
    elif with_low:
        out = output(Q, hi, lo, rest, a0, lse, k_base, origin, v_base, m0, T, S, whole, end, SCALE, KSTRIDE, VSTRIDE, D,
                     DV, CAUSAL, HALVES, False, PRECISION, UPCAST, BM, BN, DP, DVP)  # fmt: skip
    else:
        out = output(Q, hi, lo, rest, a0, lse, k_base, origin, v_base, m0, T, S, whole, end, SCALE, KSTRIDE, VSTRIDE, D,
                     DV, CAUSAL, False, False, PRECISION, UPCAST, BM, BN, DP, DVP)  # fmt: skip
    store_tile(head_base(o, batch, T, head, HEADS, DV), out * damping[:, None], m0, T, OSTRIDE, DV, BM, DVP)


@triton.jit
def x_dot_k(hi, lo, rest, K, LOW: tl.constexpr, REST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """(hi + lo + rest).k_j; the smallest first: what is added to a large sum is cut to what that keeps."""
    a = tl.zeros((BM, BN), tl.float32)
    if REST:
        a = tl.dot(rest, tl.trans(K), acc=a, input_precision=PRECISION)
    if LOW:
        a = tl.dot(lo, tl.trans(K), acc=a, input_precision=PRECISION)
    return tl.dot(hi, tl.trans(K), acc=a, input_precision=PRECISION)


@triton.jit
def missing_weight(Q, hi, lo, rest, a0, lse, k_base, origin, m0, T, S, whole, end, SCALE, KSTRIDE: tl.constexpr,
                   D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """1 - sum_j p_ij a_ij, which is 0 but for rounding.

    Where A is nearly singular, x.k and a0 are large numbers of which little is left. What rounding did to them, and to
    kbar before, is mostly the same for all keys that count, as a0 is.
    """
    total = tl.zeros((BM,), tl.float32)
    for masked in tl.static_range(2):
        low = whole if masked else 0
        high = end if masked else whole
        for n0 in range(low, high, BN):
            K = load_keys(k_base, n0, S, origin, KSTRIDE, D, BN, DP, masked == 1, UPCAST)
            w = tl.math.exp2(logits(Q, K, m0, n0, T, S, SCALE, CAUSAL, masked == 1, BM, BN, PRECISION) - lse[:, None])
            a = x_dot_k(hi, lo, rest, K, True, True, BM, BN, PRECISION)
            total += tl.sum(w * (a + a0[:, None]), 1)
    return 1.0 - total


@triton.jit
def output(Q, hi, lo, rest, a0, lse, k_base, origin, v_base, m0, T, S, whole, end, SCALE, KSTRIDE: tl.constexpr,
           VSTRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, LOW: tl.constexpr,
           REST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           DP: tl.constexpr, DVP: tl.constexpr):  # fmt: skip
    """sum_j p_ij a_ij v_j, with a_ij = a0_i + (hi + lo + rest).k_j: x comes negated."""
    acc = tl.zeros((BM, DVP), tl.float32)
    for masked in tl.static_range(2):
        low = whole if masked else 0
        high = end if masked else whole
        for n0 in range(low, high, BN):
            K = load_keys(k_base, n0, S, origin, KSTRIDE, D, BN, DP, masked == 1, UPCAST)
            V = load_tile(v_base, n0, S, VSTRIDE, DV, BN, DVP, masked == 1, UPCAST)
            w = tl.math.exp2(logits(Q, K, m0, n0, T, S, SCALE, CAUSAL, masked == 1, BM, BN, PRECISION) - lse[:, None])
            a = x_dot_k(hi, lo, rest, K, LOW, REST, BM, BN, PRECISION)
            pa = w * (a + a0[:, None])
            acc = tl.dot(pa.to(V.dtype), V, acc=acc, input_precision=PRECISION)
    return acc
