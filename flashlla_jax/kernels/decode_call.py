"""A decode step by Triton kernels: the shapes that they take, their constants, and the two launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flashlla_jax.interface import usable_ridge
from flashlla_jax.kernels import launch
from flashlla_jax.kernels import plan as planning
from flashlla_jax.kernels.plan import padded
from flashlla_jax.visibility import Visibility

_LOG2_E = math.log2(math.e)
# The fewest blocks of a split: with fewer, its moments, D times (D + Dv) numbers, cost more than reading its keys.
_BLOCKS_PER_SPLIT = 4
# The most splits of a row: one program reads them all.
_MOST_SPLITS = 128


class DecodeLaunch(NamedTuple):
    """Keys per block, features per program, warps per program, depth of the software pipeline, and programs at once.

    The last one is how many programs the 132 SMs of an H100 hold at once, by their registers and shared memory.
    """

    BN: int
    BD: int
    num_warps: int
    num_stages: int
    at_once: int = 2 * 132


class DecodePlan(NamedTuple):
    """How ``moments_kernel`` and ``solve_kernel`` compute a step, or Parallax's two kernels in their place."""

    upcast: bool  # the cache becomes float32 after loading; else it is bfloat16, or float8 that becomes bfloat16
    precision: str  # of a float32 product
    tolerance: float  # of the solve, see kernels/decode.py
    moments: DecodeLaunch
    solve: DecodeLaunch


@dataclass(frozen=True)
class DecodeConstants:
    """The constants of the kernels.

    Attributes:
        HEADS, KV_HEADS: query heads, and key/value heads.
        D, DV: head dimensions of keys and of values.
        DP, DVP: the same padded to powers of two, 16 at least.
        BN, BD: keys of a block, and features of a program (of Parallax: all).
        STAGES: depth of the software pipeline.
        SPLITS, SPLITS_PADDED: the number of parts of the cache, and the same padded to a power of two.
        SCALE: factor of the logits, in units of log 2.
        UPCAST, PRECISION: the products are of float32, at this precision.
        WIDEN: the cache is float8.
        MASK: there is a boolean mask.
        MASK_B, MASK_N, MASK_T, MASK_S: 1 for the axes that the mask has; the others are of size 1.
        ROUNDING: added to the scaled matrix's diagonal.
        TOLERANCE, MAX_STEPS: how the solve stops.
    """

    HEADS: int
    KV_HEADS: int
    D: int
    DV: int
    DP: int
    DVP: int
    BN: int
    BD: int
    STAGES: int
    SPLITS: int
    SPLITS_PADDED: int
    SCALE: float
    UPCAST: bool
    PRECISION: str
    WIDEN: bool
    MASK: bool
    MASK_B: int
    MASK_N: int
    MASK_T: int
    MASK_S: int
    ROUNDING: float
    TOLERANCE: float
    MAX_STEPS: int


# The first kernel, by the least compute capability, bytes of a product's operand, and padded head dimension, the larger
# of the key's and the value's. bfloat16 up to 128 on Hopper: the best of two dozen on an H100. There 128 keys take 12 %
# less time than 64 at D = 128. The others were chosen by register spills.
_MOMENTS = {
    90: {
        2: {
            64: DecodeLaunch(64, 64, 4, 3),
            128: DecodeLaunch(128, 128, 8, 3, 132),
            256: DecodeLaunch(32, 32, 8, 2),
        }
    },
    80: {
        2: {64: DecodeLaunch(32, 64, 4, 3), 128: DecodeLaunch(16, 64, 8, 2), 256: DecodeLaunch(32, 32, 8, 1)},
        4: {64: DecodeLaunch(16, 64, 8, 2), 128: DecodeLaunch(16, 64, 8, 1), 256: DecodeLaunch(16, 32, 8, 1)},
    },
}
# Triton from 3.7 on keeps the halves of the weighted keys in shared memory too. Then 128 keys do not fit.
_MOMENTS_128_LATER = DecodeLaunch(64, 128, 8, 3, 132)
# Warps of the second kernel, by padded head dimension. It holds the matrix of a row in registers.
_SOLVE = {64: 4, 128: 8, 256: 16}


def plan_for(key: Any, value: Any, precision: lax.Precision, capability: int | None = None) -> DecodePlan:
    """The plan for a cache of these dtypes and dimensions; ``capability`` is 90 for 9.0, None the default device's."""
    upcast = key.dtype in (jnp.float32, jnp.float16) or precision == lax.Precision.HIGHEST
    widest = max(64, padded(key.shape[-1]), padded(value.shape[-1]))
    capability = planning.capability_here() if capability is None else capability
    shape = _moments(4 if upcast else 2, widest, capability)
    return DecodePlan(
        upcast,
        "ieee" if precision == lax.Precision.HIGHEST else "tf32x3",
        # of the square of a relative error; bfloat16 rounds to 2^-9
        1e-12 if upcast else 1e-7,
        shape._replace(BD=min(shape.BD, padded(key.shape[-1]))),
        DecodeLaunch(0, 0, _SOLVE[widest], 1),
    )


def _moments(operand_bytes: int, widest: int, capability: int) -> DecodeLaunch:
    if (operand_bytes, widest) == (2, 128) and capability >= 90 and _triton_version() >= (3, 7):
        return _MOMENTS_128_LATER
    return planning.newest(_MOMENTS, operand_bytes, capability)[widest]


def _triton_version() -> tuple[int, ...]:
    """(0,) without Triton: then no kernel is launched, and a plan is only read."""
    try:
        return tuple(map(int, metadata.version("triton").split(".")[:2]))
    except metadata.PackageNotFoundError:
        return (0,)


def refusal(query: Any, key: Any, value: Any) -> str | None:
    """Why these kernels cannot serve this call, or None."""
    reason = planning.refusal(query, value) or planning.refusal(key, value)
    if reason:
        return reason
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if key.dtype.itemsize == 1 and float(capability) < 9.0:
        return f"a float8 cache needs compute capability 9.0, this GPU has {capability}"
    return None


def decode(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    lam: Float[Array, "B T N"],
    seen: Visibility,
    first: Int[Array, "B T N"],
    *,
    qk_scale: float,
    precision: lax.Precision,
    plan: DecodePlan | None = None,
) -> Float[Array, "B T N Dv"]:
    """``decode_xla.decode`` by two kernels; ``plan`` is None for that of the default device."""
    from flashlla_jax.kernels.decode import moments_kernel, solve_kernel
    from flashlla_jax.kernels.decode_float32 import float32_moments_kernel

    batch, tokens, heads, _ = query.shape
    capacity, _, value_dim = value.shape[1:]
    plan = plan_for(key, value, precision) if plan is None else plan
    rows = batch * tokens * heads
    c = constants(query, key, value, seen, qk_scale, plan)
    intervals, first, mask = visible(seen, first, tokens, c)

    def partial_result(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, c.SPLITS, *shape), jnp.float32)

    partials = launch.call(
        float32_moments_kernel if c.UPCAST else moments_kernel,
        rows * c.SPLITS * (c.DP // c.BD),
        (query, key, value, intervals, first, mask),
        (tokens, capacity),
        (
            partial_result(),
            partial_result(),
            partial_result(c.DP + c.DVP),
            partial_result(c.DP, c.DP + c.DVP),
        ),
        plan.moments,
        c,
    )
    (o,) = launch.call(
        solve_kernel,
        rows,
        (query, key, usable_ridge(lam), intervals, first, *partials),
        (tokens, capacity),
        (jax.ShapeDtypeStruct((batch, tokens, heads, value_dim), query.dtype),),
        plan.solve,
        c,
    )
    return o


def visible(
    seen: Visibility, first: Int[Array, "B T N"], tokens: int, c: DecodeConstants
) -> tuple[Array, Array, Array]:
    """The intervals, the first keys seen, and the mask, as the kernels take them.

    If the intervals say all, they also stand for the other two: making an array costs a step more time than its bytes.
    """
    rows = (first.shape[0], tokens)
    intervals = jnp.stack([jnp.broadcast_to(x, rows) for x in (seen.start, seen.end)], axis=-1)
    mask = intervals if seen.mask is None else seen.mask.astype(jnp.int8)
    return intervals, first if c.MASK_N else intervals, mask


def _splits(programs: int, at_once: int, most: int) -> int:
    """Into how many parts the cache is cut; each part takes ``programs`` programs.

    Programs run in rounds, and a last round that is not full takes as long as any other. These are the fewest parts
    that come within 5 % of the shortest time, since the moments of every part have to be written and merged.
    """
    times = [-(-programs * parts // at_once) / parts for parts in range(1, most + 1)]
    enough = 1.05 * min(times)
    return 1 + next(i for i, time in enumerate(times) if time <= enough)


def constants(query: Any, key: Any, value: Any, seen: Visibility, qk_scale: float, plan: DecodePlan) -> DecodeConstants:
    batch, tokens, heads, dim = query.shape
    capacity, kv_heads, value_dim = value.shape[1:]
    shape = plan.moments
    programs = max(1, batch * tokens * heads * (padded(dim) // shape.BD))
    most = min(-(-capacity // (_BLOCKS_PER_SPLIT * shape.BN)), _MOST_SPLITS)
    splits = _splits(programs, shape.at_once, most)
    axes = (1, 1, 1, 1) if seen.mask is None else seen.mask.shape
    return DecodeConstants(
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=dim,
        DV=value_dim,
        DP=padded(dim),
        DVP=padded(value_dim),
        BN=shape.BN,
        BD=shape.BD,
        STAGES=shape.num_stages,
        SPLITS=splits,
        SPLITS_PADDED=1 << (splits - 1).bit_length(),
        SCALE=qk_scale * _LOG2_E,
        UPCAST=plan.upcast,
        PRECISION=plan.precision,
        WIDEN=key.dtype.itemsize == 1,
        MASK=seen.mask is not None,
        **dict(zip(("MASK_B", "MASK_N", "MASK_T", "MASK_S"), (int(n > 1) for n in axes), strict=True)),
        ROUNDING=2 * dim * float(jnp.finfo(jnp.float32).eps),
        TOLERANCE=plan.tolerance,
        MAX_STEPS=4 * dim + 32,
    )
