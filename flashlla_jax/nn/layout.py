"""From Flax's layout, with any number of batch axes and masks as Flax makes them, to that of ``lla_attention``."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array


def fold(x: Array) -> Array:
    """[*batch, L, H, D] -> (B, L, H, D)."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def fold_batch(name: str, x: Any, batch: tuple[int, ...], *length: int) -> Any:
    """[*batch] -> (B,), or with a length [*batch, L] -> (B, L). NumPy arrays stay so: their values are checked."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return x  # refused by lla_attention
    if x.shape != (*batch, *length):
        axes = "[batch..., length]" if length else "[batch...]"
        raise ValueError(f"{name} must have the shape {axes} = {(*batch, *length)}, got {x.shape}")
    return x.reshape(math.prod(batch), *length)


def fold_segments(segment_ids: Any, batch: tuple[int, ...], queries: int, keys: int) -> Any:
    name = "segment_ids"
    if isinstance(segment_ids, tuple | list):
        if len(segment_ids) != 2:
            return segment_ids  # refused by lla_attention, and so is one array for two lengths
        return tuple(fold_batch(name, x, batch, n) for x, n in zip(segment_ids, (queries, keys), strict=True))
    return fold_batch(name, segment_ids, batch, queries) if queries == keys else segment_ids


def _visible(mask: Any) -> Array:
    """A boolean mask from one of Flax's. Flax's mask makers give float32 zeros and ones."""
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        raise TypeError(f"mask must be an array, got {type(mask).__name__}")
    mask = jnp.asarray(mask)
    if not any(jnp.issubdtype(mask.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        raise TypeError(f"mask must be boolean, or numbers, nonzero where a key is visible, got dtype {mask.dtype}")
    # a mask that is added to logits, taken for a boolean one, would show the keys that it hides
    known = mask.dtype != jnp.bool_ and not isinstance(mask, Tracer) and mask.is_fully_addressable
    if known and bool((mask < 0).any()):
        raise ValueError(
            "mask must be boolean, or numbers, nonzero where a key is visible, got negative numbers. "
            "For a mask that is added to the logits, with 0 where a key is visible, pass mask == 0"
        )
    return mask.astype(bool)


def fold_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    """A mask broadcastable to ``shape`` = [*batch, N, T, S] -> (B | 1, N | 1, T | 1, S | 1)."""
    mask = _visible(mask)
    try:
        fits = np.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"mask must broadcast to [batch..., heads, queries, keys] = {shape}, got shape {mask.shape}")
    mask = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    if math.prod(mask.shape[:-3]) > 1:
        mask = jnp.broadcast_to(mask, (*shape[:-3], *mask.shape[-3:]))
    return mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])
