"""Conjugate gradients on A_i = Cov_p(k, k) + lambda_i I for the queries of one tile, in registers.

Every step passes once over the visible keys and computes their weights again: three products of tiles (four if the
weights are hi + lo, five if the direction is too). The search direction is rounded to the inputs' dtype first. The
product and the updates both use the rounded one, so x and r stay consistent (docs/design.md, Numerics).

The directions stay conjugate only as well as they are rounded. If a few keys are far longer than the rest, A has
eigenvalues of 1e5 lambda and more, and a direction of 8 bits brings the error along them back again and again. So in
hard rows the direction is hi + lo, of 16 bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flashlla_jax.kernels.tiles import (
    as_operand,
    as_two_operands,
    load_keys,
    one_column,
    rounded_product,
    rounded_unless,
    some,
    weights,
)
from flashlla_jax.kernels.visible import key_tile

# (eps / 4)^2 of float32: a step that adds this share of x.Ax moves x by less than its rounding
STAGNATION: tl.constexpr = tl.constexpr(1e-15)


class Solve(NamedTuple):
    """The solution, and for each row: steps, |r|, sqrt(|r|^2 / (lambda x.Ax)), and whether the stop was reached."""

    x: tl.tensor
    iterations: tl.tensor
    residual_norm: tl.tensor
    error: tl.tensor
    converged: tl.tensor


@triton.jit
def direction(p, hard, dtype: tl.constexpr, HARD: tl.constexpr, c: tl.constexpr):
    """p as the products take it, in float32: rounded to hi. HARD: to the sum of hi + lo in hard rows.

    In float32 it takes fewer registers around the products than in the operands' dtype.
    """
    rounded = as_operand(p, dtype, c.PRECISION).to(tl.float32)
    if HARD:
        rounded += tl.where(hard[:, None], as_operand(p - rounded, dtype, c.PRECISION).to(tl.float32), 0.0)
    return rounded


@triton.jit
def matvec(p, rows, keys, hard, HARD: tl.constexpr, c: tl.constexpr):
    """A p for every row of the tile, p a ``direction``. HARD: the weights of hard rows are hi + lo too."""
    hi, lo = as_two_operands(p, rows.Q.dtype, c.PRECISION)
    offset = tl.sum(p * rows.kbar, 1)
    acc = tl.zeros((c.BM, c.DP), tl.float32)
    sums = tl.zeros((c.BM, 16), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            products = tl.zeros((c.BM, c.BN), tl.float32)
            if HARD:
                products = tl.dot(lo, tl.trans(K), acc=products, input_precision=c.PRECISION)
            products = tl.dot(hi, tl.trans(K), acc=products, input_precision=c.PRECISION)
            t = w * (products - offset[:, None])
            if HARD:
                t = rounded_unless(hard, t, K.dtype, c)
            acc, sums = rounded_product(t, K, acc, sums, HARD or c.SPLIT_ALL, c.PRECISION)
    total = one_column(sums)
    return acc - total[:, None] * rows.kbar + rows.lam[:, None] * p


@triton.jit
def inverse_diagonal(rows, keys, c: tl.constexpr):
    """1 / diag(A), the Jacobi preconditioner."""
    squares = tl.zeros((c.BM, c.DP), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            squares = tl.dot(w.to(K.dtype), K * K, acc=squares, input_precision=c.PRECISION)
    # a variance; rounding may leave it just below 0
    return 1.0 / (tl.maximum(squares - rows.kbar * rows.kbar, 0.0) + rows.lam[:, None])


@triton.jit
def bound(rtol, scale, c: tl.constexpr):
    """The |r|^2 at which a row stops.

    Below 1e-36 a square has lost its digits: such a right-hand side, a weight of 1e-20, is as good as none.
    """
    return tl.maximum(rtol * tl.maximum(scale, c.ATOL), 1e-36)


@triton.jit
def solve(rhs, rows, keys, hard, c: tl.constexpr):
    """A ``Solve`` of A x = rhs for each row, with more care in the rows that are ``hard`` (HARD_BELOW)."""
    if c.HARD_BELOW == 0.0:
        solved = conjugate_gradients(rhs, rows, keys, hard, False, c)
    elif some(hard):
        solved = conjugate_gradients(rhs, rows, keys, hard, True, c)
    else:
        solved = conjugate_gradients(rhs, rows, keys, hard, False, c)
    return solved


@triton.jit
def conjugate_gradients(rhs, rows, keys, hard, HARD: tl.constexpr, c: tl.constexpr, SLACK: tl.constexpr = 1.0):
    """A ``Solve`` of A x = rhs for each row.

    A row stops when |r|^2 <= RTOL max(ATOL, scale). ENERGY: the scale is lambda E. Here E is x.Ax, to which each step
    adds alpha p.r. No eigenvalue of A is below lambda. So |r|^2 / lambda bounds the square of x's error in the norm of
    A, and E is that of x itself. Else the scale is |rhs|^2, as for ``cg_rtol``. A row also stops if a step adds less to
    E than float32 keeps of x: it has stagnated.

    FINISH: one more step at the end, along the last direction, takes no product. Its length is the shortest of the
    row's steps so far: then no error in the span that they have seen grows. It is assumed to shrink r by the worst of
    the steps' factors, and to no less than 1/5. The loop ends when that estimate is below the bound. For random keys
    this saves a step if lambda is large, and halves the error if it is small.

    HARD: directions and products' weights are hi + lo in the rows that are ``hard``. There HARD_RTOL takes the place
    of RTOL. SLACK is a factor of both. A row's bits do not depend on HARD if it is not ``hard``.
    """
    if c.PRECONDITION:
        scaling = inverse_diagonal(rows, keys, c)
    x = tl.zeros((c.BM, c.DP), tl.float32)
    r = rhs
    rr = tl.sum(r * r, 1)
    energy = tl.zeros((c.BM,), tl.float32)
    rtol = tl.where(hard, c.HARD_RTOL, c.RTOL) * SLACK
    stop = bound(rtol, energy if c.ENERGY else rr, c)
    if c.PRECONDITION:
        p = direction(r * scaling, hard, rows.Q.dtype, HARD, c)
        rz = tl.sum(r * r * scaling, 1)
    else:
        p = direction(r, hard, rows.Q.dtype, HARD, c)
        rz = rr
    iterations = tl.zeros((c.BM,), tl.int32)
    shortest = tl.full((c.BM,), float("inf"), tl.float32)
    factor = tl.full((c.BM,), 0.04, tl.float32)  # of |r|^2, the worst so far
    live = rr > stop
    step = 0
    going = tl.max(live.to(tl.int32), 0)
    while (step < c.MAX_ITERS) & (going > 0):
        product = tl.zeros((c.BM, c.DP), tl.float32)
        if keys.tiles.wholes + keys.tiles.edges > 0:  # without a branch Triton 3.6 does not compile this for Blackwell
            product = matvec(p, rows, keys, hard, HARD, c)
        curvature = tl.sum(p * product, 1)
        live = live & (curvature > 0)
        # the direction was rounded: its own projection of r, not |r|^2, gives the minimum along it
        along = tl.sum(p * r, 1)
        alpha = tl.where(live, along / tl.where(live, curvature, 1.0), 0.0)
        energy += alpha * along
        # a row at rest must not pick up 0 * NaN or 0 * inf
        x = tl.where(live[:, None], x + alpha[:, None] * p, x)
        r = tl.where(live[:, None], r - alpha[:, None] * product, r)
        rr_new = tl.sum(r * r, 1)
        if c.FINISH:
            shortest = tl.where(live, tl.minimum(shortest, alpha), shortest)
            factor = tl.where(live, tl.minimum(tl.maximum(factor, rr_new / rr), 1.0), factor)
        rr = rr_new
        if c.PRECONDITION:
            z = r * scaling
            rz_new = tl.sum(r * z, 1)
        else:
            z = r
            rz_new = rr
        beta = tl.where(live, rz_new / tl.where(live, rz, 1.0), 0.0)
        rz = tl.where(live, rz_new, rz)
        p = direction(tl.where(live[:, None], z + beta[:, None] * p, p), hard, rows.Q.dtype, HARD, c)
        iterations += live.to(tl.int32)
        if c.ENERGY:
            stop = bound(rtol, rows.lam * energy, c)
        live = live & (alpha * along > energy * STAGNATION)
        if c.FINISH:
            live = live & (rr * factor > stop)
        else:
            live = live & (rr > stop)
        going = tl.max(live.to(tl.int32), 0)
        step += 1
    if c.FINISH:
        begun = (iterations > 0) & (shortest > 0)
        x = tl.where(begun[:, None], x + shortest[:, None] * p, x)
        rr *= tl.where(begun, factor, 1.0)
    # 0 if there was nothing to do, and 1 if no step was made
    error = tl.sqrt(rr / tl.where(energy > 0.0, rows.lam * energy, tl.where(rr > 0.0, rr, 1.0)))
    return Solve(x, iterations, tl.sqrt(rr), tl.where(rr <= 1e-36, 0.0, error), (rr <= stop).to(tl.int32))
