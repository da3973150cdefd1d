"""Local Linear Attention in blocks of queries and keys, in plain XLA: any platform, O(S D) memory.

The centred form and its gradient (docs/design.md, with the same symbols):

    p_ij = softmax_j(qk_scale q_i.k_j),  kbar_i = sum_j p_ij k_j,  kc_ij = k_j - kbar_i,  m_i = kbar_i - q_i
    A_i = sum_j p_ij kc_ij kc_ij^T + lambda_i I,  x_i = A_i^-1 m_i,  a_ij = 1 - kc_ij.x_i,  o_i = sum_j p_ij a_ij v_j

    gamma_ij = g_i.v_j,  gbar_i = sum_j p_ij gamma_ij,  y_i = sum_j p_ij (gamma_ij - gbar_i) kc_ij,  u_i = A_i^-1 y_i
    b_ij = gamma_ij - gbar_i - kc_ij.u_i,  ds_ij = p_ij (a_ij b_ij + lambda_i u_i.x_i)
    dq_i = qk_scale sum_j ds_ij k_j + u_i
    dk_j = sum_i (qk_scale ds_ij q_i - p_ij b_ij x_i - p_ij a_ij u_i),  dv_j = sum_i p_ij a_ij g_i,  dlambda_i = u_i.x_i

blocks.py cuts the call into blocks. A block of queries keeps its softmax weights against the keys that it can
see, so a conjugate-gradient step costs two products.

The mean of a_ij under p is 1 by definition, and that of b_ij is 0. So both are products less their mean under p. A
product of 1e5 is good to 1e-2 in float32, and its mean would be no better. So kbar.x, which is about as large, is
subtracted first. If one key holds all the weight, or the products are huge, the large parts then cancel exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flashlla_jax import conjugate_gradient
from flashlla_jax.blocks import (
    Keys,
    Queries,
    Strips,
    add_up,
    backward_by_blocks,
    forward_by_blocks,
    keys_by_features,
    logits,
    normalised,
    product_precision,
    rows_by_features,
    rows_by_keys,
)
from flashlla_jax.interface import Options, Residuals
from flashlla_jax.visibility import Visibility


class Saved(NamedTuple):
    """Kept from the forward pass for the backward pass; relative to the origin of the query's block."""

    top: Float[Array, "B T N"]  # the largest logit
    kbar: Float[Array, "B T N D"]
    x: Float[Array, "B T N D"]
    damping: Float[Array, "B T N"]


class _Tolerances(NamedTuple):
    stop: conjugate_gradient.Stop
    dot: lax.Precision


def _tolerances(dtype: jnp.dtype, options: Options) -> _Tolerances:
    """The solver's stop and the precision of its products, by input dtype.

    x is good to the square root of tau in the norm of A: to 1e-4 for 16-bit inputs, well below their rounding, and for
    wider ones near what their own rounding lets conjugate gradients reach.
    """
    solver = options.solver
    tau = {4: 1e-13, 8: 1e-24}.get(dtype.itemsize, 1e-8)
    stop = conjugate_gradient.Stop(
        rtol=tau if solver.rtol is None else solver.rtol,
        atol=0.0 if solver.atol is None else solver.atol,
        of_rhs=solver.rtol is not None,
        max_iters=solver.max_iters,
    )
    return _Tolerances(stop, product_precision(dtype, options.precision))


class _Block(NamedTuple):
    """One query block, ready for solves."""

    strips: Strips
    first: Int[Array, ""]
    stop: Int[Array, ""]
    kbar: Float[Array, "H R D"]
    lam: Float[Array, "H R"]


def _solve(block: _Block, rhs: Array, options: Options, tol: _Tolerances) -> conjugate_gradient.Solution:
    """x = A^-1 rhs for every row of the block."""
    k, weights = block.strips.k, block.strips.weights

    def matvec(p: Array) -> Array:
        offset = jnp.sum(block.kbar * p, axis=-1)[..., None]

        def term(j: Array) -> tuple[Array, Array]:
            t = weights[j] * (rows_by_keys(p, k[j], tol.dot) - offset)
            return rows_by_features(t, k[j], tol.dot), jnp.sum(t, axis=-1)

        product, t_sum = add_up(block, (jnp.zeros_like(p), jnp.zeros_like(block.lam)), term)
        return product - t_sum[..., None] * block.kbar + block.lam[..., None] * p

    inverse_diagonal = None
    if options.solver.use_preconditioner:
        squares = add_up(block, jnp.zeros_like(rhs), lambda j: rows_by_features(weights[j], jnp.square(k[j]), tol.dot))
        # the variance of a key coordinate; rounding may leave it just below 0
        inverse_diagonal = 1 / (jnp.maximum(squares - jnp.square(block.kbar), 0) + block.lam[..., None])
    return conjugate_gradient.solve(matvec, rhs, block.lam, tol.stop, inverse_diagonal)


def _forward_block(
    strips: Strips,
    queries: Queries,
    keys: Keys,
    visible: Callable[[Array], Array],
    options: Options,
    tol: _Tolerances,
) -> tuple[Strips, tuple[Array, Saved, Residuals]]:
    q, lam, v = queries.q, queries.own, keys.v
    strips, top = logits(strips, queries, keys, visible, options.qk_scale, tol.dot)
    top = jnp.where(top == -jnp.inf, 0, top)  # a query that sees no key: its weights are exp(-inf - 0)

    def weights_and_sums(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, omega, kbar = carry
        w = jnp.exp(weights[j] - top[..., None])
        return weights.at[j].set(w), omega + jnp.sum(w, axis=-1), kbar + rows_by_features(w, strips.k[j], tol.dot)

    start = (strips.weights, jnp.zeros_like(lam), jnp.zeros_like(q))
    weights, omega, kbar = lax.fori_loop(queries.first, queries.stop, weights_and_sums, start)
    strips, total = normalised(strips._replace(weights=weights), queries, omega)
    kbar = kbar / total[..., None]

    m = jnp.where((omega > 0)[..., None], kbar - queries.relative(), 0)
    block = _Block(strips, queries.first, queries.stop, kbar, lam)
    solution = _solve(block, m, options, tol)
    x = jnp.where(jnp.isnan(lam)[..., None], jnp.nan, solution.x)  # a bad ridge never gives a plausible number

    near = jnp.sum(kbar * x, axis=-1)[..., None]

    def products(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kx, mean = carry
        product = rows_by_keys(x, strips.k[j], tol.dot) - near
        return kx.at[j].set(product), mean + jnp.sum(strips.weights[j] * product, axis=-1)

    kx, mean = lax.fori_loop(queries.first, queries.stop, products, (strips.kx, jnp.zeros_like(lam)))
    o = add_up(
        queries,
        jnp.zeros_like(q, shape=(*q.shape[:2], v.shape[-1])),
        lambda j: rows_by_features(strips.weights[j] * (1 + (mean[..., None] - kx[j])), v[j], tol.dot),
    )
    damping = total / (total + options.delta_eps * (1 + jnp.sum(m * x, axis=-1)))
    logsumexp = top + jnp.log(total) + options.qk_scale * queries.taken_off()
    residuals = Residuals(omega, logsumexp, *solution[1:])
    return strips._replace(kx=kx), (o * damping[..., None], Saved(top, kbar, x, damping), residuals)


def _backward_block(
    carry: tuple[Strips, Keys],
    queries: Queries,
    keys: Keys,
    visible: Callable[[Array], Array],
    saved: Saved,
    g: Array,
    options: Options,
    tol: _Tolerances,
) -> tuple[tuple[Strips, Keys], tuple[Array, Array]]:
    """dk and dv with the block's share added, and dq and dlambda of the block."""
    strips, grads = carry
    q, lam, v = queries.q, queries.own, keys.v
    x = saved.x
    g = g * saved.damping[..., None]
    loop = partial(lax.fori_loop, queries.first, queries.stop)
    strips, _ = logits(strips, queries, keys, visible, options.qk_scale, tol.dot)
    k = strips.k

    near_x = jnp.sum(saved.kbar * x, axis=-1)[..., None]

    def weights_and_products(j: Array, carry: tuple[Strips, Array]) -> tuple[Strips, Array]:
        strips, omega = carry
        assert strips.kx is not None
        assert strips.gamma is not None
        w = jnp.exp(strips.weights[j] - saved.top[..., None])
        kx, gamma = rows_by_keys(x, k[j], tol.dot) - near_x, rows_by_keys(g, v[j], tol.dot)
        strips = strips._replace(
            weights=strips.weights.at[j].set(w), kx=strips.kx.at[j].set(kx), gamma=strips.gamma.at[j].set(gamma)
        )
        return strips, omega + jnp.sum(w, axis=-1)

    strips, omega = loop(weights_and_products, (strips, jnp.zeros_like(lam)))
    strips, _ = normalised(strips, queries, omega)  # anew: if logits are huge, top is good to its rounding only
    weights, kx, gamma = strips.weights, strips.kx, strips.gamma
    assert kx is not None
    assert gamma is not None
    zeros = jnp.zeros_like(lam)
    kx_mean, gbar = add_up(
        queries,
        (zeros, zeros),
        lambda j: (jnp.sum(weights[j] * kx[j], axis=-1), jnp.sum(weights[j] * gamma[j], axis=-1)),
    )

    def rhs(j: Array) -> tuple[Array, Array]:
        t = weights[j] * (gamma[j] - gbar[..., None])
        return rows_by_features(t, k[j], tol.dot), jnp.sum(t, axis=-1)

    y, t_sum = add_up(queries, (jnp.zeros_like(q), zeros), rhs)
    y = y - t_sum[..., None] * saved.kbar
    block = _Block(strips, queries.first, queries.stop, saved.kbar, lam)
    u = _solve(block, y, options, tol).x
    near_u = jnp.sum(saved.kbar * u, axis=-1)[..., None]

    def slopes(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """gamma - k.u in gamma's place, and its mean: b_ij is the one less the other."""
        gamma, mean = carry
        left = gamma[j] - (rows_by_keys(u, k[j], tol.dot) - near_u)
        return gamma.at[j].set(left), mean + jnp.sum(weights[j] * left, axis=-1)

    left, left_mean = loop(slopes, (gamma, zeros))
    dlam = jnp.sum(u * x, axis=-1)
    ridge_term = (lam * dlam)[..., None]

    def gradients(j: Array, carry: tuple[Array, Keys]) -> tuple[Array, Keys]:
        dq, (dk, dv) = carry
        p = weights[j]
        pa, b = p * (1 + (kx_mean[..., None] - kx[j])), left[j] - left_mean[..., None]
        ds = options.qk_scale * (pa * b + p * ridge_term)
        dk_j = keys_by_features(ds, q, tol.dot) - keys_by_features(p * b, x, tol.dot)
        dk_j = dk_j - keys_by_features(pa, u, tol.dot)
        dq = dq + rows_by_features(ds, k[j], tol.dot)
        return dq, Keys(dk.at[j].add(dk_j), dv.at[j].add(keys_by_features(pa, g, tol.dot)))

    dq, grads = loop(gradients, (u, grads))
    return (strips._replace(gamma=left), grads), (dq, dlam)


def forward(
    query: Array, key: Array, value: Array, lam: Array, seen: Visibility, options: Options
) -> tuple[Array, Saved, Residuals]:
    """The output, ``Saved`` for ``backward``, and the residuals; lam is a usable ridge (interface.py)."""
    tol = _tolerances(query.dtype, options)
    step = partial(_forward_block, options=options, tol=tol)
    return forward_by_blocks(step, query, key, value, lam, seen)


def backward(
    query: Array, key: Array, value: Array, lam: Array, seen: Visibility, saved: Saved, g: Array, options: Options
) -> tuple[Array, Array, Array, Array]:
    """``(dquery, dkey, dvalue, dlam)`` for the cotangent g of the output."""
    tol = _tolerances(query.dtype, options)
    step = partial(_backward_block, options=options, tol=tol)
    return backward_by_blocks(step, query, key, value, lam, seen, saved, g)
