"""Parallax in blocks of queries and keys, in plain XLA: any platform, O(S D) memory.

For query i with the probe r_i over its visible keys j (parallax.py says what it is and where it comes from):

    p_ij = softmax_j(qk_scale q_i.k_j),  t_i = sum_j p_ij k_j.r_i,  a_ij = 1 + t_i - k_j.r_i,  o_i = sum_j p_ij a_ij v_j

Its gradient, for the cotangent g_i of o_i. That of a_ij is p_ij gamma_ij, and t_i passes sum_j p_ij gamma_ij = gbar_i
back to every k_j.r_i and to the weights:

    gamma_ij = g_i.v_j,  gbar_i = sum_j p_ij gamma_ij,  b_ij = gamma_ij - gbar_i
    ds_ij = p_ij (a_ij b_ij + c_i),  c_i = -sum_j p_ij a_ij b_ij            (gradient of the scaled logits)
    dq_i = qk_scale sum_j ds_ij k_j,  dr_i = -sum_j p_ij b_ij k_j
    dk_j = sum_i (qk_scale ds_ij q_i - p_ij b_ij r_i),  dv_j = sum_i p_ij a_ij g_i

It is Local Linear Attention's for u = 0, with c_i in place of lambda u.x: both make the ds_ij of a query sum to 0.

Every sum over the keys of ds_ij and of p_ij b_ij is 0, so keys may be taken relative to a block's origin (blocks.py)
throughout. A mean under p is taken twice, of the products and of what is left of them: a product of 1e5 is good to 1e-2
in float32, and so is its mean; where one key holds all the weight the second one finds what the first was off by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

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
from flashlla_jax.interface import ParallaxOptions, ParallaxResiduals
from flashlla_jax.visibility import Visibility


class Saved(NamedTuple):
    """Kept from the forward pass for the backward pass; relative to the block's origin."""

    top: Float[Array, "B T N"]  # the largest logit


def _mean(strips: Strips, queries: Queries, of: Array) -> Array:
    """Under p, of a strip."""

    def mean(about: Array) -> Array:
        zeros = jnp.zeros_like(queries.q[..., 0])
        return add_up(queries, zeros, lambda j: jnp.sum(strips.weights[j] * (of[j] - about[..., None]), axis=-1))

    first = mean(jnp.zeros_like(queries.q[..., 0]))
    return first + mean(first)


def _weighted(
    strips: Strips, queries: Queries, keys: Keys, top: Array, g: Array | None, dot: lax.Precision
) -> tuple[Strips, Array]:
    """With p_ij in place of the logits, the products k.r and, of a cotangent, gamma; and the sum of the weights."""

    def term(j: Array, carry: tuple[Strips, Array]) -> tuple[Strips, Array]:
        strips, omega = carry
        w = jnp.exp(strips.weights[j] - top[..., None])
        kr = rows_by_keys(queries.own, strips.k[j], dot)
        strips = strips._replace(weights=strips.weights.at[j].set(w), kx=strips.kx.at[j].set(kr))
        if g is not None and strips.gamma is not None:
            strips = strips._replace(gamma=strips.gamma.at[j].set(rows_by_keys(g, keys.v[j], dot)))
        return strips, omega + jnp.sum(w, axis=-1)

    strips, omega = lax.fori_loop(queries.first, queries.stop, term, (strips, jnp.zeros_like(top)))
    strips, _ = normalised(strips, queries, omega)
    return strips, omega


def _forward_block(
    strips: Strips,
    queries: Queries,
    keys: Keys,
    visible: Callable[[Array], Array],
    options: ParallaxOptions,
    dot: lax.Precision,
) -> tuple[Strips, tuple[Array, Saved, ParallaxResiduals]]:
    q, v = queries.q, keys.v
    strips, top = logits(strips, queries, keys, visible, options.qk_scale, dot)
    top = jnp.where(top == -jnp.inf, 0, top)  # a query that sees no key: its weights are exp(-inf - 0)
    strips, omega = _weighted(strips, queries, keys, top, None, dot)
    t = _mean(strips, queries, strips.kx)[..., None]
    o = add_up(
        queries,
        jnp.zeros_like(q, shape=(*q.shape[:2], v.shape[-1])),
        lambda j: rows_by_features(strips.weights[j] * (1 + (t - strips.kx[j])), v[j], dot),
    )
    logsumexp = top + jnp.log(jnp.where(omega > 0, omega, 1)) + options.qk_scale * queries.taken_off()
    return strips, (o, Saved(top), ParallaxResiduals(omega, logsumexp))


def _backward_block(
    carry: tuple[Strips, Keys],
    queries: Queries,
    keys: Keys,
    visible: Callable[[Array], Array],
    saved: Saved,
    g: Array,
    options: ParallaxOptions,
    dot: lax.Precision,
) -> tuple[tuple[Strips, Keys], tuple[Array, Array]]:
    """dk and dv with the block's share added, and dq and dr of the block."""
    strips, grads = carry
    q, r = queries.q, queries.own
    strips, _ = logits(strips, queries, keys, visible, options.qk_scale, dot)
    strips, _ = _weighted(strips, queries, keys, saved.top, g, dot)
    k, p, kr, gamma = strips
    assert gamma is not None
    t, gbar = (_mean(strips, queries, x)[..., None] for x in (kr, gamma))

    def a_and_b(j: Array) -> tuple[Array, Array]:
        return 1 + (t - kr[j]), gamma[j] - gbar

    def product(j: Array) -> Array:
        a, b = a_and_b(j)
        return jnp.sum(p[j] * a * b, axis=-1)

    c = -add_up(queries, jnp.zeros_like(q[..., 0]), product)[..., None]

    def gradients(j: Array, sums: tuple[Array, Array, Keys]) -> tuple[Array, Array, Keys]:
        dq, dr, (dk, dv) = sums
        a, b = a_and_b(j)
        pb, ds = p[j] * b, options.qk_scale * p[j] * (a * b + c)
        dk_j = keys_by_features(ds, q, dot) - keys_by_features(pb, r, dot)
        dq, dr = dq + rows_by_features(ds, k[j], dot), dr - rows_by_features(pb, k[j], dot)
        return dq, dr, Keys(dk.at[j].add(dk_j), dv.at[j].add(keys_by_features(p[j] * a, g, dot)))

    start = (jnp.zeros_like(q), jnp.zeros_like(q), grads)
    dq, dr, grads = lax.fori_loop(queries.first, queries.stop, gradients, start)
    return (strips, grads), (dq, dr)


def forward(
    query: Array, key: Array, value: Array, probe: Array, seen: Visibility, options: ParallaxOptions
) -> tuple[Array, Saved, ParallaxResiduals]:
    """The output, ``Saved`` for ``backward``, and the residuals."""
    dot = product_precision(query.dtype, options.precision)
    step = partial(_forward_block, options=options, dot=dot)
    return forward_by_blocks(step, query, key, value, probe, seen)


def backward(
    query: Array,
    key: Array,
    value: Array,
    probe: Array,
    seen: Visibility,
    saved: Saved,
    g: Array,
    options: ParallaxOptions,
) -> tuple[Array, Array, Array, Array]:
    """``(dquery, dkey, dvalue, dprobe)`` for the cotangent g of the output."""
    dot = product_precision(query.dtype, options.precision)
    step = partial(_backward_block, options=options, dot=dot)
    return backward_by_blocks(step, query, key, value, probe, seen, saved, g)
