"""Conjugate gradients on A_i = Cov_p(k, k) + lambda_i I for the queries of one tile, in registers.

Every step passes once over the visible keys and computes their weights again: three products of tiles (four with
SPLIT). The search direction is rounded to the inputs' dtype first. The product and the updates both use the rounded
one, so x and r stay consistent (docs/design.md, Numerics).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flashlla_jax.kernels.tiles import (
    as_operand,
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
def matvec(p, rows, keys, hard, SPLIT: tl.constexpr, c: tl.constexpr):
    """A p for every row of the tile, p in the products' dtype. SPLIT: the weights of hard rows are hi + lo."""
    p32 = p.to(tl.float32)
    offset = tl.sum(p32 * rows.kbar, 1)
    acc = tl.zeros((c.BM, c.DP), tl.float32)
    sums = tl.zeros((c.BM, 16), tl.float32)
    for edge in tl.static_range(2):
        count = keys.tiles.edges if edge else keys.tiles.wholes
        for i in tl.range(0, count, num_stages=c.EDGE_STAGES if edge else c.STAGES):
            n0 = key_tile(keys, i, edge == 1, c)
            K = load_keys(keys, n0, edge == 1, c)
            w = weights(rows, K, n0, keys, edge == 1, c)
            t = w * (tl.dot(p, tl.trans(K), input_precision=c.PRECISION) - offset[:, None])
            if SPLIT:
                t = rounded_unless(hard, t, K.dtype, c)
            acc, sums = rounded_product(t, K, acc, sums, SPLIT, c.PRECISION)
    total = one_column(sums)
    return acc - total[:, None] * rows.kbar + rows.lam[:, None] * p32


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
def solve(rhs, rows, keys, hard, c: tl.constexpr, SLACK: tl.constexpr = 1.0):
    """A ``Solve`` of A x = rhs for each row.

    A row stops when |r|^2 <= RTOL max(ATOL, scale). ENERGY: the scale is lambda E. Here E is x.Ax, to which each step
    adds alpha p.r. No eigenvalue of A is below lambda. So |r|^2 / lambda bounds the square of x's error in the norm of
    A, and E is that of x itself. Else the scale is |rhs|^2, as for ``cg_rtol``. A row also stops if a step adds less to
    E than float32 keeps of x: it has stagnated.

    FINISH: one more step at the end, along the last direction, takes no product. Its length is the shortest of the
    row's steps so far: then no error in the span that they have seen grows. It is assumed to shrink r by the worst of
    the steps' factors, and to no less than 1/5. The loop ends when that estimate is below the bound. For random keys
    this saves a step if lambda is large, and halves the error if it is small.

    A product's weights are carried as hi + lo always where SPLIT_BELOW is inf, never where it is 0, else in the rows
    that are ``hard``. There HARD_RTOL takes the place of RTOL. SLACK is a factor of both.
    """
    if c.PRECONDITION:
        scaling = inverse_diagonal(rows, keys, c)
    x = tl.zeros((c.BM, c.DP), tl.float32)
    r = rhs
    rr = tl.sum(r * r, 1)
    energy = tl.zeros((c.BM,), tl.float32)
    rtol = tl.where(hard, c.HARD_RTOL, c.RTOL) * SLACK
    split = some(hard)
    stop = bound(rtol, energy if c.ENERGY else rr, c)
    if c.PRECONDITION:
        p = as_operand(r * scaling, rows.Q.dtype, c.PRECISION)
        rz = tl.sum(r * r * scaling, 1)
    else:
        p = as_operand(r, rows.Q.dtype, c.PRECISION)
        rz = rr
    iterations = tl.zeros((c.BM,), tl.int32)
    shortest = tl.full((c.BM,), float("inf"), tl.float32)
    factor = tl.full((c.BM,), 0.04, tl.float32)  # of |r|^2, the worst so far
    live = rr > stop
    step = 0
    going = tl.max(live.to(tl.int32), 0)
    while (step < c.MAX_ITERS) & (going > 0):
        if (c.SPLIT_BELOW == 0.0) or (c.SPLIT_BELOW == float("inf")):
            product = matvec(p, rows, keys, hard, c.SPLIT_BELOW > 0.0, c)
        elif split:
            product = matvec(p, rows, keys, hard, True, c)
        else:
            product = matvec(p, rows, keys, hard, False, c)
        p32 = p.to(tl.float32)
        curvature = tl.sum(p32 * product, 1)
        live = live & (curvature > 0)
        # the direction was rounded: its own projection of r, not |r|^2, gives the minimum along it
        along = tl.sum(p32 * r, 1)
        alpha = tl.where(live, along / tl.where(live, curvature, 1.0), 0.0)
        energy += alpha * along
        # a row at rest must not pick up 0 * NaN or 0 * inf
        x = tl.where(live[:, None], x + alpha[:, None] * p32, x)
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
        p = as_operand(tl.where(live[:, None], z + beta[:, None] * p32, p32), rows.Q.dtype, c.PRECISION)
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
        x = tl.where(begun[:, None], x + shortest[:, None] * p.to(tl.float32), x)
        rr *= tl.where(begun, factor, 1.0)
    # 0 if there was nothing to do, and 1 if no step was made
    error = tl.sqrt(rr / tl.where(energy > 0.0, rows.lam * energy, tl.where(rr > 0.0, rr, 1.0)))
    return Solve(x, iterations, tl.sqrt(rr), tl.where(rr <= 1e-36, 0.0, error), (rr <= stop).to(tl.int32))
