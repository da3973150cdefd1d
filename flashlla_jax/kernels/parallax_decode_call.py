"""A decode step of Parallax by Triton: the forward kernel, on parts of the cache, whose results are merged.

A part of the cache is a batch entry to the kernel, so there is work for the whole GPU at any batch size, and each part
has its own mean t of k.r. With the shares p_s of the parts in the softmax, the whole's is t = sum_s p_s t_s, and a_ij
is t - t_s more in every term of a part's output than it was:

    vbar = sum_s p_s vbar_s,  o = sum_s p_s (o_s + (t - t_s) vbar_s)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flashlla_jax.interface import ParallaxOptions
from flashlla_jax.kernels import parallax_passes
from flashlla_jax.kernels import plan as planning
from flashlla_jax.kernels.passes import ORIGIN_ROWS
from flashlla_jax.kernels.plan import PARALLAX_TABLE, Launch, Plan, padded, plan_for
from flashlla_jax.origin import origins
from flashlla_jax.visibility import Visibility

# Programs that fill a GPU: four rounds for the 132 SMs of an H100.
_PROGRAMS = 4 * 132
# Keys of a part at least: below that its start costs more than its keys.
_LEAST_KEYS = 256
# The forward kernel's, by bytes of a product's operand and padded head dimension. The rows are one head's few tokens:
# as few as a product takes, unless that spills. Chosen by register spills.
_LAUNCHES = {
    2: {64: Launch(16, 32, 4, 3), 128: Launch(64, 64, 8, 3), 256: Launch(16, 32, 4, 2)},
    4: {64: Launch(16, 32, 4, 2), 128: Launch(16, 32, 4, 2), 256: Launch(16, 16, 4, 1)},
}


def refusal(query: Any, key: Any, value: Any) -> str | None:
    """Why this cannot serve a call, or None."""
    if key.dtype != query.dtype:
        return f"for Parallax it needs a cache of the query's dtype, {query.dtype}, got {key.dtype}"
    return planning.refusal(query, value)


def decode(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    probe: Float[Array, "B T N D"],
    seen: Visibility,
    first: Int[Array, "B T N"],
    *,
    qk_scale: float,
    precision: lax.Precision,
) -> Float[Array, "B T N Dv"]:
    """``decode_xla.parallax`` by the forward kernel."""
    del first  # the kernel has origins of its own where it needs them
    batch, _, heads, _ = query.shape
    capacity = key.shape[1]
    parts = _parts(batch * heads, capacity)
    options = ParallaxOptions(qk_scale, precision)
    plan = step_plan(query, value, precision)

    def of_queries(x: Array) -> Array:
        return jnp.repeat(x, parts, axis=0)

    def of_keys(x: Array) -> Array:
        return x.reshape(batch * parts, capacity // parts, *x.shape[2:])

    queries, keys = of_queries(query), of_keys(key)
    probes = of_queries(probe)
    of_parts = _seen_of_parts(seen, batch, parts, capacity // parts)
    _, saved, residuals = parallax_passes.forward(
        queries, keys, of_keys(value), probes, of_parts, options, plan, unwritten=True
    )
    t = saved.t
    if plan.arithmetic.upcast:  # of the keys as they are, no more relative to their part's origin
        origin = jnp.repeat(origins(keys, of_parts, ORIGIN_ROWS), heads // key.shape[2], axis=2)
        t = t + jnp.einsum("btnd,bpnd->btn", probes.astype(jnp.float32), origin, precision="highest")
    results = (residuals.omega, residuals.logsumexp, t, saved.vbar, saved.excess)
    return _merged(*(x.reshape(batch, parts, *x.shape[1:]).astype(jnp.float32) for x in results)).astype(query.dtype)


def step_plan(query: Any, value: Any, precision: lax.Precision, capability: int | None = None) -> Plan:
    """The plan of a step; the backward kernels' part of it is not used."""
    plan = plan_for(query, value, precision, capability, table=PARALLAX_TABLE)
    operand_bytes = 4 if plan.arithmetic.upcast else query.dtype.itemsize
    widest = max(64, padded(query.shape[-1]), padded(value.shape[-1]))
    return plan._replace(forward=_LAUNCHES[operand_bytes][widest])


def _parts(rows: int, capacity: int) -> int:
    """How many equal parts of the cache, for that many programs of a part."""
    wanted = max(1, min(-(-_PROGRAMS // max(1, rows)), capacity // _LEAST_KEYS))
    return next(parts for parts in range(wanted, 0, -1) if capacity % parts == 0)


def _seen_of_parts(seen: Visibility, batch: int, parts: int, length: int) -> Visibility:
    """The visibility of every part, as that of a batch entry."""
    begin = length * jnp.arange(parts, dtype=jnp.int32)[None, :, None]

    def inside(x: Array) -> Array:
        x = jnp.broadcast_to(x, (batch, x.shape[1]))
        return jnp.clip(x[:, None] - begin, 0, length).reshape(batch * parts, -1)

    start, end = inside(seen.start), inside(seen.end)
    some = start < end
    mask = seen.mask
    if mask is not None:
        mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
        cut = mask.shape[3] > 1
        mask = mask.reshape(*mask.shape[:3], parts, length) if cut else jnp.repeat(mask[..., None], parts, axis=3)
        mask = jnp.moveaxis(mask, 3, 1).reshape(batch * parts, *mask.shape[1:3], -1)
    return Visibility(jnp.where(some, start, 0), jnp.where(some, end, 0), None, None, None, mask, False, False)


def _merged(
    omega: Float[Array, "B P T N"],
    logsumexp: Float[Array, "B P T N"],
    t: Float[Array, "B P T N"],
    vbar: Float[Array, "B P T N Dv"],
    excess: Float[Array, "B P T N Dv"],
) -> Float[Array, "B T N Dv"]:
    """The output of the whole; 0 where no part has a key."""
    logsumexp = jnp.where(omega == 0, -jnp.inf, logsumexp)
    top = jnp.max(logsumexp, axis=1, keepdims=True)
    share = jnp.exp(logsumexp - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(share, axis=1, keepdims=True)
    share = share / jnp.where(total == 0, 1, total)
    t = jnp.where(omega == 0, 0, t)
    moved = jnp.sum(share * t, axis=1, keepdims=True) - t
    return jnp.sum(share[..., None] * ((1 + moved)[..., None] * vbar + excess), axis=1)
