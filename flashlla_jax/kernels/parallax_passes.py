"""The forward and the backward pass of Parallax by Triton kernels, on the canonical layout."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flashlla_jax.interface import ParallaxOptions, ParallaxResiduals
from flashlla_jax.kernels import launch
from flashlla_jax.kernels.passes import Problem
from flashlla_jax.kernels.plan import Plan
from flashlla_jax.kernels.tables import by_key_tiles
from flashlla_jax.visibility import Visibility


class Saved(NamedTuple):
    """What the backward pass needs beside the inputs."""

    vbar: Array  # the mean of the values; float32, since gbar = g.vbar must cancel with some g.v_j
    excess: Array  # o - vbar, in the products' dtype
    lse: Array  # log2 of the softmax normaliser, of the keys relative to their origin (kernels/tiles.py, Rows)
    lse_rest: Array  # only where products keep all of float32
    t: Array  # the mean of k.r


def forward(
    query: Array,
    key: Array,
    value: Array,
    probe: Array,
    seen: Visibility,
    options: ParallaxOptions,
    plan: Plan,
) -> tuple[Array, Saved, ParallaxResiduals]:
    """``(o, saved, residuals)``: the forward pass, and what ``backward`` needs of it."""
    from flashlla_jax.kernels.parallax import forward_kernel

    problem = Problem.of(query, key, value, seen, options, plan)
    batch, T, S, heads, _, _, value_dim = problem.shape
    shape = plan.forward
    table, programs = problem.by_queries(shape)
    out = (batch, T, heads, value_dim)
    o, vbar, excess, lse, lse_rest, t, omega, logsumexp = launch.call(
        forward_kernel,
        programs,
        (query, problem.key, value, probe, *problem.visible(table), problem.origins(), problem.anchors()),
        (T, S),
        (
            jax.ShapeDtypeStruct(out, query.dtype),
            jax.ShapeDtypeStruct(out, jnp.float32),
            jax.ShapeDtypeStruct(out, problem.wide),
            problem.row(),
            problem.exact_row(),
            problem.row(),
            problem.row(),
            problem.row(),
        ),
        shape,
        problem.constants(shape, table, (0.0, 0.0)),
    )
    return o, Saved(vbar, excess, lse, lse_rest, t), ParallaxResiduals(omega, logsumexp)


def backward(
    query: Array,
    key: Array,
    value: Array,
    probe: Array,
    seen: Visibility,
    saved: Saved,
    g: Array,
    options: ParallaxOptions,
    plan: Plan,
) -> tuple[Array, Array, Array, Array]:
    """``(dquery, dkey, dvalue, dprobe)`` for the cotangent g of the output."""
    from flashlla_jax.kernels.parallax import key_kernel, query_kernel

    problem = Problem.of(query, key, value, seen, options, plan)
    batch, T, S, heads, kv_heads, _, _ = problem.shape
    origin = problem.origins()
    shape = plan.query
    table, programs = problem.by_queries(shape)
    tiles = -(-T // shape.BM)
    pairs = jax.ShapeDtypeStruct((batch, heads, tiles * shape.BM, 2), jnp.float32)
    rests = jax.ShapeDtypeStruct(pairs.shape[:3] if plan.arithmetic.exact else (1, 1, 1), jnp.float32)
    dq, dr, lse_t, gbar_c, rest = launch.call(
        query_kernel,
        programs,
        (query, problem.key, value, probe, *problem.visible(table), origin, *saved, g),
        (T, S),
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(probe.shape, probe.dtype),
            pairs,
            pairs,
            rests,
        ),
        shape,
        problem.constants(shape, table, (0.0, 0.0)),
    )
    shape = plan.key
    table = by_key_tiles(seen, S, shape.BM, shape.BN)
    dk, dv = launch.call(
        key_kernel,
        -(-S // shape.BN) * batch * kv_heads,
        (query, problem.key, value, probe, *problem.visible(table), origin, g, lse_t, gbar_c, rest),
        (T, S),
        (jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)),
        shape,
        problem.constants(shape, table),
    )
    return dq, dk, dv, dr
