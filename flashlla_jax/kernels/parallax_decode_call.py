"""A decode step of Parallax by Triton kernels: what they are compiled for, and the two launches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flashlla_jax.kernels import decode_call, launch
from flashlla_jax.kernels.decode_call import DecodeLaunch, DecodePlan, constants, visible
from flashlla_jax.kernels.plan import padded
from flashlla_jax.visibility import Visibility

# The first kernel, by bytes of a product's operand, and padded head dimension, the larger of the key's and the value's.
# A block of the cache is 32 KiB at most, so that three of them and more than one program fit an SM. Features are not
# divided among programs.
_GATHER = {
    2: {64: DecodeLaunch(128, 0, 4, 3), 128: DecodeLaunch(64, 0, 4, 3), 256: DecodeLaunch(32, 0, 4, 3)},
    4: {64: DecodeLaunch(64, 0, 4, 2), 128: DecodeLaunch(32, 0, 4, 2), 256: DecodeLaunch(16, 0, 4, 2)},
}


def plan_for(key: Any, value: Any, precision: lax.Precision, capability: int | None = None) -> DecodePlan:
    """As of ``lla_decode``, but for the launches."""
    plan = decode_call.plan_for(key, value, precision, capability)
    widest = max(64, padded(key.shape[-1]), padded(value.shape[-1]))
    gather = _GATHER[4 if plan.upcast else 2][widest]
    return plan._replace(moments=gather._replace(BD=padded(key.shape[-1])), solve=DecodeLaunch(0, 0, 4, 1))


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
    plan: DecodePlan | None = None,
) -> Float[Array, "B T N Dv"]:
    """``decode_xla.parallax`` by two kernels; ``plan`` is None for that of the default device."""
    from flashlla_jax.kernels.parallax_decode import gather_kernel, merge_kernel

    batch, tokens, heads, _ = query.shape
    capacity, _, value_dim = value.shape[1:]
    plan = plan_for(key, value, precision) if plan is None else plan
    rows = batch * tokens * heads
    c = constants(query, key, value, seen, qk_scale, plan)
    of_split = jax.ShapeDtypeStruct((rows, c.SPLITS), jnp.float32)
    partials = launch.call(
        gather_kernel,
        rows * c.SPLITS,
        (query, key, value, probe, *visible(seen, first, tokens, c)),
        (tokens, capacity),
        (of_split, of_split, of_split, jax.ShapeDtypeStruct((rows, c.SPLITS, 2 * c.DVP), jnp.float32)),
        plan.moments,
        c,
    )
    (o,) = launch.call(
        merge_kernel,
        rows,
        partials,
        (tokens, capacity),
        (jax.ShapeDtypeStruct((batch, tokens, heads, value_dim), query.dtype),),
        plan.solve,
        c,
    )
    return o
