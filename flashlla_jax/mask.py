"""The arguments that hide keys, brought to one boolean mask."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from flashlla_jax.interface import visible_keys


def canonical_mask(
    mask: Any, key_value_seq_lengths: Any, query: Array, key: Array
) -> Bool[Array, "#B #N #T #S"] | None:
    """What is visible, by ``mask`` and ``key_value_seq_lengths`` together; None where neither is given.

    Axes along which the mask does not vary keep size 1, so lengths alone cost (B, 1, 1, S).
    """
    masks = []
    if mask is not None:
        mask = _check_mask(mask, query, key)
        masks.append(mask if query.ndim == 4 else mask[:, None])
    if key_value_seq_lengths is not None:
        lengths = _check_lengths(key_value_seq_lengths, key)
        columns = jnp.arange(key.shape[1], dtype=jnp.int32)
        masks.append((columns[None, :] < lengths[:, None])[:, None, None])
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]


def _check_mask(mask: Any, query: Array, key: Array) -> Array:
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        raise TypeError(f"mask must be a boolean array, got {type(mask).__name__}")
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, True where a key is visible, got dtype {mask.dtype}")
    batch, length, key_length = *query.shape[:2], key.shape[1]
    axes, full = "(B, T, S)", (batch, length, key_length)
    if query.ndim == 4:
        axes, full = "(B, N, T, S)", (batch, query.shape[2], length, key_length)
    if mask.ndim != len(full) or any(n not in (1, m) for n, m in zip(mask.shape, full, strict=True)):
        raise ValueError(f"mask must have the shape {axes} = {full}, or 1 in place of any, got {mask.shape}")
    return jnp.asarray(mask)


def _check_lengths(lengths: Any, key: Array) -> Array:
    name = "key_value_seq_lengths"
    if not hasattr(lengths, "shape") or not hasattr(lengths, "dtype"):
        raise TypeError(f"{name} must be an integer array, got {type(lengths).__name__}")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got dtype {lengths.dtype}")
    if lengths.shape != key.shape[:1]:
        raise ValueError(f"{name} must have the shape (B,) = {key.shape[:1]}, got {lengths.shape}")
    # what is known now is checked now, as the ridge is
    if isinstance(lengths, np.ndarray) and lengths.size and not 0 <= lengths.min() <= lengths.max() <= key.shape[1]:
        raise ValueError(
            f"{name} must lie between 0 and the keys' length {key.shape[1]}, got {lengths.min()} to {lengths.max()}"
        )
    return jnp.asarray(lengths).astype(jnp.int32)


def without_unseen(query: Array, key: Array, value: Array, mask: Array, is_causal: bool) -> tuple[Array, Array]:
    """Key and value (rank 4) with zeros where no query sees them: a NaN there would outlive a weight of 0."""
    seen = mask
    if is_causal and mask.shape[2] > 1:  # else the last query sees what causality lets any query see
        columns = jnp.arange(key.shape[1], dtype=jnp.int32)
        seen = seen & (columns[None, :] < visible_keys(query.shape[1], key.shape[1], True)[:, None])[None, None]
    seen = jnp.any(seen, axis=2)
    if seen.shape[1] > 1:
        seen = jnp.any(seen.reshape(seen.shape[0], key.shape[2], -1, seen.shape[-1]), axis=2)
    seen = jnp.moveaxis(seen, 2, 1)[..., None]
    return jnp.where(seen, key, 0), jnp.where(seen, value, 0)
