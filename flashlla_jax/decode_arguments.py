"""Checks of the arguments of ``lla_decode``. arguments.py has the checks that ``lla_attention`` needs too."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flashlla_jax.arguments import check_groups, check_integers

# The state of a query is a D x D matrix. A longer prompt goes through lla_attention, which takes linear memory.
MOST_TOKENS = 8

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_CACHE_DTYPES = (*_DTYPES, "float8_e4m3fn", "float8_e5m2")


def check_cache(query: Any, key: Any, value: Any) -> tuple[Array, Array, Array]:
    """The three as JAX arrays whose shapes fit."""
    given = {"query": query, "key_cache": key, "value_cache": value}
    for name, x in given.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        allowed = _DTYPES if name == "query" else _CACHE_DTYPES
        if str(x.dtype) not in allowed:  # the given dtype: without x64 JAX would make it float32
            raise TypeError(f"{name} has dtype {x.dtype}; allowed are {', '.join(allowed)}")
        if len(x.shape) != 4:
            axes = "(B, T, N, D)" if name == "query" else "(B, S, K, D)"
            raise ValueError(f"{name} must have rank 4, {axes}, got shape {x.shape}; use jax.vmap for more axes")
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must not be empty in its length, heads or dimension, got shape {x.shape}")
    query, key, value = (jnp.asarray(x) for x in given.values())
    if key.dtype != value.dtype:
        raise TypeError(f"key_cache and value_cache must have one dtype, got {key.dtype} and {value.dtype}")
    _check_shapes(query, key, value)
    return query, key, value


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    shapes = f"query {query.shape}, key_cache {key.shape}, value_cache {value.shape}"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key_cache and value_cache must have the same batch size (first axis), got {shapes}")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"key_cache and value_cache must have the same length and heads, got {shapes}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"query and key_cache must have the same head dimension (last axis), got {shapes}")
    check_groups(query, key, shapes)
    if query.shape[1] > MOST_TOKENS:
        raise ValueError(
            f"query must have 1 to {MOST_TOKENS} tokens (second axis), got {query.shape}; more go through "
            "lla_attention with query_offset and key_value_seq_lengths"
        )


def check_lengths(lengths: Any, query: Array, key: Array) -> Any:
    """``lengths`` as int32, a scalar or ``(B,)``; a known value out of range is refused."""
    name, capacity = "lengths", key.shape[1]
    if isinstance(lengths, int) and not isinstance(lengths, bool):
        lengths = np.asarray(operator.index(lengths))
    lengths = check_integers(name, lengths, "an int, or an integer array")
    if lengths.shape not in ((), query.shape[:1]):
        raise ValueError(f"{name} must be a scalar or have the shape (B,) = {query.shape[:1]}, got {lengths.shape}")
    if isinstance(lengths, np.ndarray | np.generic) and lengths.size:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > capacity:
            raise ValueError(f"{name} must lie between 0 and the cache's {capacity} positions, got {low} to {high}")
    return _as_int32(lengths, -1, capacity + 1)


def check_starts(starts: Any, query: Array) -> Any:
    """``starts`` as int32, ``(B,)``."""
    starts = check_integers("starts", starts, "an integer array")
    if starts.shape != query.shape[:1]:
        raise ValueError(f"starts must have the shape (B,) = {query.shape[:1]}, got {starts.shape}")
    return _as_int32(starts, 0, np.iinfo(np.int32).max)


def _as_int32(x: Any, least: int, most: int) -> Any:
    """Cuts at bounds beyond which nothing changes. The integers' own dtype may not hold these bounds."""
    limits = np.iinfo(x.dtype)
    least, most = max(least, int(limits.min)), min(most, int(limits.max))
    if isinstance(x, jax.Array):
        return jnp.clip(x, least, most).astype(jnp.int32)
    return np.clip(x, least, most).astype(np.int32)
