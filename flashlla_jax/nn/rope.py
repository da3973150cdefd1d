"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flashlla_jax.interface import accumulation_dtype


def rotate(
    x: Float[Array, "*batch L H D"], positions: Int[Array, "*#batch L"] | Float[Array, "*#batch L"], base: float
) -> Float[Array, "*batch L H D"]:
    """Feature pair (i, i + D/2) of the token at position t, turned by the angle ``t base^(-2 i / D)``.

    The pairing is that of ``flax.nnx.RoPE``. Angles, sines and cosines are float32 (float64 for float64 inputs)
    whatever the dtype of x, in which the result is returned. D is even.
    """
    dtype = accumulation_dtype(x.dtype)
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=dtype) / half)
    positions = positions.reshape((1,) * (x.ndim - 2 - positions.ndim) + positions.shape)
    angles = positions[..., None, None].astype(dtype) * frequencies.reshape((1,) * (x.ndim - 1) + (half,))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
