"""Conjugate gradients on A_i = Cov_p(k, k) + lambda_i I for the queries of one tile, in registers.

Every step passes once over the visible keys, recomputing their weights: three products of tiles (four with SPLIT). The
search direction is rounded to the inputs' dtype before it is used in the product and in the updates alike, so that x
and r stay consistent (design.md section 2).
"""

import triton
import triton.language as tl

from flashlla_jax.kernels.tiles import as_operand, load_keys, logits, one_column, rounded_product


@triton.jit
def matvec(p, Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, KSTRIDE: tl.constexpr, D: tl.constexpr,
           CAUSAL: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """A p for every row of the tile, p in the products' dtype, and sum_j p_ij kc_ij.p as the weights were rounded."""
    p32 = p.to(tl.float32)
    offset = tl.sum(p32 * kbar, 1)
    acc = tl.zeros((BM, DP), tl.float32)
    sums = tl.zeros((BM, 16), tl.float32)
    for masked in tl.static_range(2):
        low = whole if masked else 0
        high = end if masked else whole
        for n0 in range(low, high, BN):
            K = load_keys(k_base, n0, S, origin, KSTRIDE, D, BN, DP, masked == 1, UPCAST)
            w = tl.math.exp2(logits(Q, K, m0, n0, T, S, SCALE, CAUSAL, masked == 1, BM, BN, PRECISION) - lse[:, None])
            t = w * (tl.dot(p, tl.trans(K), input_precision=PRECISION) - offset[:, None])
            acc, sums = rounded_product(t, K, acc, sums, SPLIT, PRECISION)
    total = one_column(sums)
    return acc - total[:, None] * kbar + lam[:, None] * p32, total


@triton.jit
def inverse_diagonal(Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, KSTRIDE: tl.constexpr,
                     D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """1 / diag(A), the Jacobi preconditioner."""
    squares = tl.zeros((BM, DP), tl.float32)
    for n0 in range(0, end, BN):
        K = load_keys(k_base, n0, S, origin, KSTRIDE, D, BN, DP, True, UPCAST)
        w = tl.math.exp2(logits(Q, K, m0, n0, T, S, SCALE, CAUSAL, True, BM, BN, PRECISION) - lse[:, None])
        squares = tl.dot(w.to(K.dtype), K * K, acc=squares, input_precision=PRECISION)
    # a variance; rounding may leave it just below 0
    return 1.0 / (tl.maximum(squares - kbar * kbar, 0.0) + lam[:, None])


@triton.jit
def solve(rhs, Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, split, KSTRIDE: tl.constexpr,
          D: tl.constexpr, CAUSAL: tl.constexpr, RTOL: tl.constexpr, ATOL: tl.constexpr, MAX_ITERS: tl.constexpr,
          PRECONDITION: tl.constexpr, FINISH: tl.constexpr, SPLIT_BELOW: tl.constexpr, PRECISION: tl.constexpr,
          UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """x = A^-1 rhs, sum_j p_ij kc_ij.x (0 but for kbar's rounding), the steps of each row, and |r|^2.

    The loop ends when every row has |r|^2 <= RTOL max(ATOL, |rhs|^2).

    FINISH: with one more step that takes no product, along the last direction, by the shortest of the row's steps so
    far (so that no error in the span that they have seen grows). It shrinks r about as the steps did: by the worst of
    their factors, it is assumed, and to no less than 1/5; the loop ends when that estimate is below the bound. For
    random keys that is a step fewer where lambda is large, and half the error where it is small.

    A product's weights are carried as hi + lo always where SPLIT_BELOW is inf, never where it is 0, else if ``split``.
    """
    if PRECONDITION:
        scaling = inverse_diagonal(Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, KSTRIDE, D, CAUSAL,
                                   PRECISION, UPCAST, BM, BN, DP)  # fmt: skip
    # where products round their operands, that is more than what kbar's rounding amounts to: no defect then
    EXACT: tl.constexpr = UPCAST and PRECISION != "tf32"
    x = tl.zeros((BM, DP), tl.float32)
    r = rhs
    rr = tl.sum(r * r, 1)
    stop = RTOL * tl.maximum(rr, ATOL)
    if PRECONDITION:
        p = as_operand(r * scaling, Q.dtype, PRECISION)
        rz = tl.sum(r * r * scaling, 1)
    else:
        p = as_operand(r, Q.dtype, PRECISION)
        rz = rr
    defect = tl.zeros((BM,), tl.float32)
    iterations = tl.zeros((BM,), tl.int32)
    shortest = tl.full((BM,), float("inf"), tl.float32)
    factor = tl.full((BM,), 0.04, tl.float32)  # of |r|^2, the worst so far
    live = rr > stop
    step = 0
    going = tl.max(live.to(tl.int32), 0)
    while (step < MAX_ITERS) & (going > 0):
        if (SPLIT_BELOW == 0.0) | (SPLIT_BELOW == float("inf")):
            product, total = matvec(p, Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, KSTRIDE, D,
                                    CAUSAL,
                             SPLIT_BELOW > 0.0, PRECISION, UPCAST, BM, BN, DP)  # fmt: skip
        elif split:
            product, total = matvec(p, Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, KSTRIDE, D,
                                    CAUSAL,
                             True, PRECISION, UPCAST, BM, BN, DP)  # fmt: skip
        else:
            product, total = matvec(p, Q, k_base, origin, kbar, lse, lam, m0, T, S, whole, end, SCALE, KSTRIDE, D,
                                    CAUSAL,
                             False, PRECISION, UPCAST, BM, BN, DP)  # fmt: skip
        p32 = p.to(tl.float32)
        curvature = tl.sum(p32 * product, 1)
        live = live & (curvature > 0)
        # the direction was rounded: its own projection of r, not |r|^2, is what minimises along it
        alpha = tl.where(live, tl.sum(p32 * r, 1) / tl.where(live, curvature, 1.0), 0.0)
        # a row at rest must not pick up 0 * NaN or 0 * inf
        x = tl.where(live[:, None], x + alpha[:, None] * p32, x)
        r = tl.where(live[:, None], r - alpha[:, None] * product, r)
        if EXACT:
            defect += tl.where(live, alpha * total, 0.0)
        rr_new = tl.sum(r * r, 1)
        if FINISH:
            shortest = tl.where(live, tl.minimum(shortest, alpha), shortest)
            factor = tl.where(live, tl.minimum(tl.maximum(factor, rr_new / rr), 1.0), factor)
        rr = rr_new
        if PRECONDITION:
            z = r * scaling
            rz_new = tl.sum(r * z, 1)
        else:
            z = r
            rz_new = rr
        beta = tl.where(live, rz_new / tl.where(live, rz, 1.0), 0.0)
        rz = tl.where(live, rz_new, rz)
        p = as_operand(tl.where(live[:, None], z + beta[:, None] * p32, p32), Q.dtype, PRECISION)
        iterations += live.to(tl.int32)
        if FINISH:
            live = live & (rr * factor > stop)
        else:
            live = live & (rr > stop)
        going = tl.max(live.to(tl.int32), 0)
        step += 1
    if FINISH:
        begun = (iterations > 0) & (shortest > 0)
        x = tl.where(begun[:, None], x + shortest[:, None] * p.to(tl.float32), x)
        rr *= tl.where(begun, factor, 1.0)
    return x, defect, iterations, rr
