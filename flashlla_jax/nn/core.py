"""From projected queries, keys and values to the heads' output: the part that the NNX and the Linen module share.

A module makes its projections and parameters. It hands them to ``forward``, or with a cache to ``decode`` of
decoding.py, with its ``Settings``. This file promotes and rotates them, folds the batch axes, and calls the operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float, Int

from flashlla_jax.arguments import Implementation
from flashlla_jax.attention import lla_attention
from flashlla_jax.interface import accumulation_dtype
from flashlla_jax.nn.checks import check_operator, check_positions
from flashlla_jax.nn.layout import fold, fold_batch, fold_mask, fold_segments
from flashlla_jax.nn.rope import rotate
from flashlla_jax.parallax import parallax_attention

Segments = Int[Array, "*batch L"] | tuple[Int[Array, "*batch T"], Int[Array, "*batch S"]]
Lengths = Int[Array, "*batch"]
Positions = Int[Array, "*#batch T"] | Float[Array, "*#batch T"]
Sow = Callable[[Any], Any]


@dataclass(frozen=True)
class Settings:
    """The static side of a module's attention; the arguments of ``lla_attention`` have its names and meaning.

    Parallax has no use for ``cg_*``.

    Attributes:
        dtype: The dtype to which query, key and value are promoted; None to infer it from them.
        rope: Base of the rotary position embedding, or None for none.
        local_window_size: (left, right), or None for no window.
    """

    dtype: Any
    rope: float | None
    qk_scale: float | None
    precision: Any
    implementation: Implementation | None
    local_window_size: tuple[int, int] | None
    cg_atol: float | None = None
    cg_rtol: float | None = None
    cg_max_iters: int | None = None
    cg_use_preconditioner: bool = False

    def check(self, head_dim: int) -> None:
        """Refuse now, when a module is built, settings that would fail in its first call."""
        check_operator(self.cg_max_iters, self.implementation)
        if isinstance(self.rope, bool) or (self.rope is not None and not self.rope > 0):
            raise ValueError(f"rope must be None or the base of the rotary embedding, > 0, got {self.rope!r}")
        if self.rope is not None and head_dim % 2:
            raise ValueError(f"rope turns pairs of features: it needs an even head dimension, got {head_dim}")


def keys_and_values(inputs_q: Array, inputs_k: Array | None, inputs_v: Array | None) -> tuple[Array, Array]:
    """The inputs of keys and values, by Flax's defaults."""
    if inputs_k is None and inputs_v is not None:
        raise ValueError("inputs_v needs inputs_k; keys and values from one array are inputs_k alone")
    inputs_k = inputs_q if inputs_k is None else inputs_k
    inputs_v = inputs_k if inputs_v is None else inputs_v
    for name, x in {"inputs_q": inputs_q, "inputs_k": inputs_k, "inputs_v": inputs_v}.items():
        if np.ndim(x) < 2:
            raise ValueError(f"{name} must be [batch..., length, features], got shape {np.shape(x)}")
    return inputs_k, inputs_v


def raw_ridge(ridge_lambda: float, ridge_floor: float) -> float:
    """The parameter that ``learned_ridge`` turns into ``ridge_lambda``."""
    excess = ridge_lambda - ridge_floor
    return excess + math.log(-math.expm1(-excess))


def learned_ridge(raw: Float[Array, " N"], ridge_floor: float) -> Float[Array, " N"]:
    """``ridge_floor + softplus(raw)``, in float32 at least: above the floor whatever an optimiser makes of ``raw``."""
    raw = raw.astype(accumulation_dtype(raw.dtype))
    return ridge_floor + jax.nn.softplus(raw)


def attend(
    query: Float[Array, "*batch T N D"],
    key: Float[Array, "*batch S K D"],
    value: Float[Array, "*batch S K Dv"],
    *,
    probe: Float[Array, "*batch T N D"] | None = None,
    mask: Any = None,
    segment_ids: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    sow: Sow | None = None,
    **options: Any,
) -> Float[Array, "*batch T N Dv"]:
    """``lla_attention`` in Flax's layout: any number of batch axes, and masks as Flax makes them.

    With a probe it is ``parallax_attention``.

    Args:
        query: Any number of batch axes, none included.
        key: The same batch axes as the query.
        value: The same batch axes as the query.
        probe: Shaped as the query, or None.
        mask: Broadcastable to ``[*batch, N, T, S]``; nonzero is visible.
        segment_ids: ``[*batch, L]`` where T = S = L, or a pair of a ``[*batch, T]`` and a ``[*batch, S]`` array.
        query_seq_lengths: ``[*batch]``.
        key_value_seq_lengths: ``[*batch]``.
        sow: Is given the residuals, arrays ``[*batch, T, N]``. Without it they are not asked for. Not with a probe.
        options: The other arguments of ``lla_attention``, or of ``parallax_attention``.
    """
    batch = query.shape[:-3]
    if not batch == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(
            "query, key and value must have the same batch axes, got shapes "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if mask is not None:
        options["mask"] = fold_mask(mask, (*batch, query.shape[-2], query.shape[-3], key.shape[-3]))
    if segment_ids is not None:
        options["segment_ids"] = fold_segments(segment_ids, batch, query.shape[-3], key.shape[-3])
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    for name, given in lengths.items():
        if given is not None:
            options[name] = fold_batch(name, given, batch)
    arrays = (fold(query), fold(key), fold(value))
    if probe is not None:
        o = by_probe(probe, *arrays, **options)
    elif sow is None:
        o = lla_attention(*arrays, **options)
    else:
        o, residuals = lla_attention(*arrays, **options, return_residuals=True)
        sow(jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), residuals))
    return o.reshape(*batch, *o.shape[1:])


def by_probe(probe: Array, query: Array, key: Array, value: Array, **options: Any) -> Array:
    return parallax_attention(query, fold(probe), key, value, **options)


def forward(
    settings: Settings,
    query: Float[Array, "*batch T N D"],
    key: Float[Array, "*batch S K D"],
    value: Float[Array, "*batch S K D"],
    *,
    ridge_lambda: Any = None,
    probe: Float[Array, "*batch T N D"] | None = None,
    is_causal: bool,
    mask: Any,
    positions: Positions | None,
    **others: Any,
) -> Float[Array, "*batch T N D"]:
    """Attention without a cache, with a ridge or a probe; ``others``: the segments, lengths and sow of ``attend``.

    The probe meets the rotated keys, so it is rotated as the queries are: then only differences of positions matter.
    Positions for ``rope`` count from 0; with ``is_causal`` and more keys than queries the queries are the last ones, as
    they are in ``lla_attention``.
    """
    query, probe, key, value = promoted(settings, query, probe, key, value)
    length, key_length = query.shape[-3], key.shape[-3]
    check_positions(positions, settings.rope)
    if settings.rope is not None:
        first = key_length - length if is_causal else 0
        of_queries = first + jnp.arange(length, dtype=jnp.int32) if positions is None else positions
        query, probe = rotated(settings, query, probe, of_queries)
        key = rotate_heads(settings, key, jnp.arange(key_length, dtype=jnp.int32) if positions is None else positions)
    options = operator_options(settings, ridge_lambda, is_causal=is_causal, implementation=settings.implementation)
    return attend(query, key, value, probe=probe, mask=mask, **others, **options)


def promoted(settings: Settings, query: Array, probe: Array | None, key: Array, value: Array) -> Any:
    """The four in one dtype; a probe that is None stays it."""
    if probe is None:
        query, key, value = promote_dtype((query, key, value), dtype=settings.dtype)
        return query, None, key, value
    return promote_dtype((query, probe, key, value), dtype=settings.dtype)


def rotated(settings: Settings, query: Array, probe: Array | None, positions: Positions) -> tuple[Array, Array | None]:
    query = rotate_heads(settings, query, positions)
    return query, None if probe is None else rotate_heads(settings, probe, positions)


def operator_options(settings: Settings, ridge_lambda: Any, **options: Any) -> dict[str, Any]:
    names = ("qk_scale", "precision", "local_window_size")
    if ridge_lambda is not None:
        names = (*names, "cg_atol", "cg_rtol", "cg_max_iters", "cg_use_preconditioner")
        options["ridge_lambda"] = ridge_lambda
    return {name: getattr(settings, name) for name in names} | options


def rotate_heads(settings: Settings, x: Array, positions: Positions) -> Array:
    assert settings.rope is not None
    expected = x.shape[:-2]
    try:
        fits = np.broadcast_shapes(positions.shape, expected) == expected
    except ValueError:
        fits = False
    if not fits or positions.shape[-1:] != (x.shape[-3],):
        raise ValueError(f"input_positions must broadcast to [batch..., length] = {expected}, got {positions.shape}")
    return rotate(x, positions, settings.rope)
