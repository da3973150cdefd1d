"""Refuses arguments that neither the NNX nor the Linen module can serve. The error names them."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax.numpy as jnp

from flashlla_jax.arguments import check_count, check_flag, check_implementation, check_window


def check_operator(cg_max_iters: Any, implementation: Any) -> None:
    """Refuse settings that every call of ``lla_attention`` would refuse."""
    if cg_max_iters is not None:
        check_count("cg_max_iters", cg_max_iters)
    check_implementation(implementation)


def check_local_window_size(window: Any) -> tuple[int, int] | None:
    return None if window is None else check_window(window)


def check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        check_flag(name, flag)


def check_dropout(dropout_rate: float) -> None:
    if dropout_rate:
        raise NotImplementedError(
            f"dropout_rate must be 0, got {dropout_rate!r}: the weights of Local Linear Attention come out of a solve "
            "and cannot be dropped one by one. Apply Dropout to the module's output instead"
        )


def check_attention_fn(attention_fn: Any) -> None:
    if attention_fn is not None:
        raise NotImplementedError(
            "attention_fn must be None: this module is its own attention function; Flax's own module takes another one"
        )


def check_einsums(*einsums: Any) -> None:
    if any(einsum is not None for einsum in einsums):
        raise NotImplementedError(
            "qk_attn_weights_einsum and attn_weights_value_einsum must be None: "
            "Local Linear Attention has other products than softmax attention"
        )


def check_sow_weights(sow_weights: bool) -> None:
    if sow_weights:
        raise NotImplementedError(
            "sow_weights must be False: the attention weights are never formed. "
            "LLAttention(sow_residuals=True) shows how each query's solve went"
        )


def hiding(segment_ids: Any, query_seq_lengths: Any, key_value_seq_lengths: Any, decode: bool) -> dict[str, Any]:
    """The arguments that hide keys, by name; without meaning for a cache.

    The tokens of a cache continue one document, and nothing of it is missing.
    """
    given = {
        "segment_ids": segment_ids,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    for name, x in given.items():
        if decode and x is not None:
            raise NotImplementedError(
                f"decode=True takes no {name}: the tokens continue what is in the cache. "
                "Hide the cache's positions by mask, and give each document its own batch entry"
            )
    return given


def rows_of_cache(decode_starts: Any, decode_lengths: Any, decode: bool) -> dict[str, Any]:
    """Where the rows of a cache begin and end, as ``decoding.decode`` takes it; without meaning if there is none."""
    for name, x in {"decode_starts": decode_starts, "decode_lengths": decode_lengths}.items():
        if not decode and x is not None:
            raise ValueError(f"{name} is for calls with a cache; without one use mask")
    return {"starts": decode_starts, "lengths": decode_lengths}


def check_positions(positions: Any, rope: float | None) -> None:
    """``input_positions``: None, or for ``rope`` an array of real numbers; its shape is checked where it is used."""
    if positions is None:
        return
    allowed = "an array of integers or real floating numbers"
    if not hasattr(positions, "shape") or not hasattr(positions, "dtype"):
        raise TypeError(f"input_positions must be {allowed}, got {type(positions).__name__}")
    if not any(jnp.issubdtype(positions.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError(f"input_positions must be {allowed}, got dtype {positions.dtype}")
    if rope is None:
        raise ValueError("input_positions are for the rotary embedding, and rope is None")


def check_ridge(ridge_lambda: Any, ridge_floor: float | None) -> float:
    """The ridge of a module: a number, > 0; a learned one starts above its floor, > 0."""
    if isinstance(ridge_lambda, bool) or not isinstance(ridge_lambda, numbers.Real):
        raise TypeError(
            f"ridge_lambda must be a Python number, got {type(ridge_lambda).__name__}; "
            "learn_ridge=True learns one per head"
        )
    ridge = float(ridge_lambda)
    if ridge_floor is not None and not 0 < ridge_floor < math.inf:
        raise ValueError(f"ridge_floor must be finite and > 0, got {ridge_floor!r}")
    if not ridge > (ridge_floor or 0):
        raise ValueError(f"ridge_lambda must be > {ridge_floor or 0:g}, got {ridge!r}")
    if ridge_floor is not None and ridge == math.inf:
        raise ValueError("ridge_lambda must be finite if it is learned, got inf")
    return ridge


def check_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """The number of key/value heads."""
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {kv_heads} for {num_heads}")
    return kv_heads
