"""From projected queries, keys and values to the heads' output: the part that the NNX and the Linen module share.

A module makes its projections and parameters. It hands them to ``forward``, or with a cache to ``decode``, with its
``Settings``. This file promotes and rotates them, folds the batch axes, and calls the operator or the decode step. The
``check_*`` functions refuse the arguments that neither module can serve.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from flashlla_jax.arguments import (
    Implementation,
    check_count,
    check_flag,
    check_implementation,
    check_integers,
    check_window,
)
from flashlla_jax.attention import lla_attention
from flashlla_jax.decode import lla_decode, parallax_decode
from flashlla_jax.decode_arguments import MOST_TOKENS
from flashlla_jax.interface import accumulation_dtype
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


class Cache(NamedTuple):
    """Keys (rotated, where ``rope`` is on) and values of the first ``filled`` positions, in Flax's layout.

    ``filled`` is one number for all rows, as Flax has it, or one for each.
    """

    key: Float[Array, "*batch S K D"]
    value: Float[Array, "*batch S K D"]
    filled: Int[Array, ""] | Int[Array, "*batch"]


def check_operator(cg_max_iters: Any, implementation: Any) -> None:
    """Settings that ``lla_attention`` refuses in every call."""
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


def check_no_cache(**given: Any) -> None:
    for name, x in given.items():
        if x is not None:
            raise ValueError(f"{name} is for calls with a cache; without one use mask")


def check_hiding_with_cache(**hiding: Any) -> None:
    """Refuse arguments without meaning for a cache: its tokens continue one document, and nothing of it is missing."""
    for name, given in hiding.items():
        if given is not None:
            raise NotImplementedError(
                f"decode=True takes no {name}: the tokens continue what is in the cache. "
                "Hide the cache's positions by mask, and give each document a batch entry of its own"
            )


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
        raise ValueError("ridge_lambda must be finite where it is learned, got inf")
    return ridge


def check_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """The number of key/value heads."""
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {kv_heads} for {num_heads}")
    return kv_heads


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
        options["mask"] = _fold_mask(mask, (*batch, query.shape[-2], query.shape[-3], key.shape[-3]))
    if segment_ids is not None:
        options["segment_ids"] = _fold_segments(segment_ids, batch, query.shape[-3], key.shape[-3])
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    for name, given in lengths.items():
        if given is not None:
            options[name] = _fold_batch(name, given, batch)
    arrays = (_fold(query), _fold(key), _fold(value))
    if probe is not None:
        o = _by_probe(probe, *arrays, **options)
    elif sow is None:
        o = lla_attention(*arrays, **options)
    else:
        o, residuals = lla_attention(*arrays, **options, return_residuals=True)
        sow(jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), residuals))
    return o.reshape(*batch, *o.shape[1:])


def _by_probe(probe: Array, query: Array, key: Array, value: Array, **options: Any) -> Array:
    return parallax_attention(query, _fold(probe), key, value, **options)


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
    query, probe, key, value = _promoted(settings, query, probe, key, value)
    length, key_length = query.shape[-3], key.shape[-3]
    check_positions(positions, settings.rope)
    if settings.rope is not None:
        first = key_length - length if is_causal else 0
        of_queries = first + jnp.arange(length, dtype=jnp.int32) if positions is None else positions
        query, probe = _rotated(settings, query, probe, of_queries)
        key = _rotate(settings, key, jnp.arange(key_length, dtype=jnp.int32) if positions is None else positions)
    options = _operator_options(settings, ridge_lambda, is_causal=is_causal, implementation=settings.implementation)
    return attend(query, key, value, probe=probe, mask=mask, **others, **options)


def _promoted(settings: Settings, query: Array, probe: Array | None, key: Array, value: Array) -> Any:
    """The four in one dtype; a probe that is None stays it."""
    if probe is None:
        query, key, value = promote_dtype((query, key, value), dtype=settings.dtype)
        return query, None, key, value
    return promote_dtype((query, probe, key, value), dtype=settings.dtype)


def _rotated(settings: Settings, query: Array, probe: Array | None, positions: Positions) -> tuple[Array, Array | None]:
    query = _rotate(settings, query, positions)
    return query, None if probe is None else _rotate(settings, probe, positions)


def attend_one(
    query: Float[Array, "*batch 1 N D"],
    key: Float[Array, "*batch S K D"],
    value: Float[Array, "*batch S K Dv"],
    *,
    mask: Any,
    **options: Any,
) -> Float[Array, "*batch 1 N Dv"]:
    """``attend`` of a single query, which sees all that the mask shows, by the exact decode step."""
    batch, heads, keys = query.shape[:-3], query.shape[-2], key.shape[-3]
    if mask is not None:
        options["mask"] = _fold_mask(mask, (*batch, heads, 1, keys))
    o = lla_decode(_fold(query), _fold(key), _fold(value), keys, **options)
    return o.reshape(*batch, *o.shape[1:])


def decode(
    settings: Settings,
    query: Float[Array, "*batch T N D"],
    key: Float[Array, "*batch T K D"],
    value: Float[Array, "*batch T K D"],
    cache: Cache,
    *,
    ridge_lambda: Any = None,
    probe: Float[Array, "*batch T N D"] | None = None,
    is_causal: bool,
    mask: Any,
    positions: Positions | None,
    starts: Any = None,
    lengths: Any = None,
) -> tuple[Float[Array, "*batch T N D"], Cache]:
    """Append T tokens to the cache and attend from them. Gives what a causal forward pass gives at their positions.

    Few tokens take ``lla_decode``, to which ``cg_*`` do not apply; more, or ``lengths``, take ``lla_attention``. With a
    probe these are ``parallax_decode`` and ``parallax_attention``.

    Args:
        settings: The module's.
        query: The new tokens'.
        key: The new tokens'.
        value: The new tokens'.
        cache: The cache before them.
        ridge_lambda: As in ``lla_attention``; None with a probe.
        probe: The new tokens', or None.
        is_causal: Must be True.
        mask: Broadcastable to ``[*batch, N, T, S]``, S being the cache's capacity.
        positions: For ``rope``; None to count from ``cache.filled``.
        starts: ``[*batch]``, the first position of each row, or None for 0.
        lengths: ``[*batch]``, how many of the T tokens each row has, the others being padding on the right: they are
            not written, and their output is zero. The cache returned then counts by row. None for T.

    Returns:
        The output and the cache with the tokens in it. Where the tokens overrun the cache, or ``cache.filled`` is
        negative, and that is traced, so that no error can be raised, the row's output is NaN, now and in later calls.

    Raises:
        ValueError: The tokens overrun the cache, or do not fit it in shape; or the module is not causal.
    """
    if not is_causal:
        raise ValueError("decode=True needs is_causal=True: a token cannot see what is not in the cache yet")
    query, probe, key, value = _promoted(settings, query, probe, key, value)
    _check_tokens(query, key, value, cache)
    length, capacity = query.shape[-3], cache.key.shape[-3]
    batch = query.shape[:-3]
    starts = _per_row("decode_starts", starts, batch)
    lengths = _per_row("decode_lengths", lengths, batch)
    new = length if lengths is None else jnp.clip(lengths, 0, length)
    _check_room(cache, new, length)

    first = cache.filled
    check_positions(positions, settings.rope)
    if settings.rope is not None:
        if positions is None:
            positions = first[..., None] + jnp.arange(length, dtype=jnp.int32).reshape((1,) * first.ndim + (length,))
        query, probe = _rotated(settings, query, probe, positions)
        key = _rotate(settings, key, positions)

    sound = (first >= 0) & (first + new <= capacity)
    # a negative position stays negative: positions before the first were never written
    cache = Cache(
        _append(cache.key, key, first, lengths),
        _append(cache.value, value, first, lengths),
        jnp.where(first < 0, first, first + new),
    )
    seen = _Seen(jnp.broadcast_to(first, batch), lengths, starts, mask)
    if length <= MOST_TOKENS and lengths is None:
        o = _few_tokens(settings, query, probe, cache, ridge_lambda, seen)
    else:
        o = _many_tokens(settings, query, probe, cache, ridge_lambda, seen)
    return jnp.where(jnp.broadcast_to(sound, batch)[..., None, None, None], o, jnp.nan), cache


class _Seen(NamedTuple):
    """Everything that decides which keys the tokens of a call with a cache see."""

    first: Int[Array, "*batch"]  # the position of the first token
    lengths: Int[Array, "*batch"] | None
    starts: Int[Array, "*batch"] | None
    mask: Any


def _check_tokens(query: Array, key: Array, value: Array, cache: Cache) -> None:
    *batch, _, kv_heads, dim = cache.key.shape
    length = query.shape[-3]
    if length == 0:
        raise ValueError(f"decode=True needs one token at least, got a query of shape {query.shape}")
    expected = (*batch, length, kv_heads, dim)
    if key.shape != expected or value.shape != expected or query.shape[:-3] != tuple(batch):
        raise ValueError(
            f"with a cache of shape {cache.key.shape}, {length} new tokens must have keys and values of shape "
            f"{expected}, got query {query.shape}, key {key.shape} and value {value.shape}"
        )
    if cache.filled.shape not in ((), tuple(batch)):
        raise ValueError(
            f"cache_index must be a scalar or have the cache's batch axes, {tuple(batch)}, got {cache.filled.shape}"
        )


def _check_room(cache: Cache, new: Any, length: int) -> None:
    """Refuse tokens that are known to overrun the cache."""
    capacity = cache.key.shape[-3]
    known = not isinstance(cache.filled, Tracer)
    used = np.asarray(cache.filled) if known else np.zeros((), np.int32)
    if used.size and used.min() < 0:
        raise ValueError(f"cache_index must be >= 0, got {used.min()}")
    more = np.asarray(new) if not isinstance(new, Tracer) else np.zeros((), np.int32)
    total = used + more
    if (total.size and total.max() > capacity) or (length > capacity and not isinstance(new, Array)):
        raise ValueError(
            f"the cache has room for {capacity} positions; {used.max()} are used and {more.max()} more were given: "
            "make a longer one (init_cache)"
        )


def _per_row(name: str, x: Any, batch: tuple[int, ...]) -> Array | None:
    """Integers, one for each row."""
    if x is None:
        return None
    x = check_integers(name, x, "an integer array")
    if x.shape != batch:
        raise ValueError(f"{name} must have the batch axes, {batch}, got {x.shape}")
    return jnp.asarray(x).astype(jnp.int32)


def _append(
    cache: Float[Array, "*batch S K D"],
    new: Float[Array, "*batch T K D"],
    first: Int[Array, "*#batch"],
    lengths: Int[Array, "*batch"] | None,
) -> Float[Array, "*batch S K D"]:
    """The cache with the new tokens at positions ``first`` on."""
    new = new.astype(cache.dtype)
    batch, capacity, length = cache.shape[:-3], cache.shape[-3], new.shape[-3]
    if first.ndim == 0 and lengths is None:
        zero = jnp.zeros((), first.dtype)
        return lax.dynamic_update_slice(cache, new, (*(zero for _ in batch), first, zero, zero))
    tokens = jnp.arange(length, dtype=jnp.int32)[None]
    first = jnp.broadcast_to(first, batch).reshape(-1, 1)
    place = first + tokens
    if lengths is not None:
        place = jnp.where(tokens < lengths.reshape(-1, 1), place, capacity)
    place = jnp.where(first >= 0, place, capacity)  # beyond the end, where it is dropped
    # row by row, by vmap: so XLA sees that no row needs another's
    written = jax.vmap(lambda row, tokens, place: row.at[place].set(tokens, mode="drop"))(
        _fold(cache), _fold(new), place
    )
    return written.reshape(cache.shape)


def _few_tokens(
    settings: Settings, query: Array, probe: Array | None, cache: Cache, ridge_lambda: Any, seen: _Seen
) -> Array:
    """The last tokens of the cache by the exact step; its state is a D x D matrix per token and head."""
    *batch, length, heads, _ = query.shape
    capacity = cache.key.shape[-3]
    mask = None if seen.mask is None else _fold_mask(seen.mask, (*batch, heads, length, capacity))
    options: dict[str, Any] = {
        "starts": None if seen.starts is None else seen.starts.reshape(-1),
        "mask": mask,
        "local_window_size": settings.local_window_size,
        "qk_scale": settings.qk_scale,
        "precision": settings.precision,
        "implementation": settings.implementation,
    }
    written = (_fold(cache.key), _fold(cache.value), seen.first.reshape(-1) + length)
    if probe is None:
        o = lla_decode(_fold(query), *written, ridge_lambda=ridge_lambda, **options)
    else:
        o = parallax_decode(_fold(query), _fold(probe), *written, **options)
    return o.reshape(query.shape)


def _many_tokens(
    settings: Settings, query: Array, probe: Array | None, cache: Cache, ridge_lambda: Any, seen: _Seen
) -> Array:
    """The last tokens of the cache by the operator, in linear memory, except for a mask."""
    *batch, length, heads, _ = query.shape
    capacity = cache.key.shape[-3]
    mask = None if seen.mask is None else _fold_mask(seen.mask, (*batch, heads, length, capacity))
    if seen.starts is not None:
        begun = jnp.arange(capacity, dtype=jnp.int32)[None] >= seen.starts.reshape(-1, 1)
        begun = begun[:, None, None]
        mask = begun if mask is None else mask & begun
    new = length if seen.lengths is None else seen.lengths
    options = _operator_options(settings, ridge_lambda, is_causal=True, implementation=settings.implementation)
    run: Any = lla_attention if probe is None else partial(_by_probe, probe)
    o = run(
        _fold(query),
        *(_fold(x.astype(query.dtype)) for x in (cache.key, cache.value)),
        mask=mask,
        query_offset=seen.first.reshape(-1),
        query_seq_lengths=None if seen.lengths is None else seen.lengths.reshape(-1),
        key_value_seq_lengths=(seen.first + new).reshape(-1),
        **options,
    )
    return o.reshape(query.shape)


def _operator_options(settings: Settings, ridge_lambda: Any, **options: Any) -> dict[str, Any]:
    names = ("qk_scale", "precision", "local_window_size")
    if ridge_lambda is not None:
        names = (*names, "cg_atol", "cg_rtol", "cg_max_iters", "cg_use_preconditioner")
        options["ridge_lambda"] = ridge_lambda
    return {name: getattr(settings, name) for name in names} | options


def _rotate(settings: Settings, x: Array, positions: Positions) -> Array:
    assert settings.rope is not None
    expected = x.shape[:-2]
    try:
        fits = np.broadcast_shapes(positions.shape, expected) == expected
    except ValueError:
        fits = False
    if not fits or positions.shape[-1:] != (x.shape[-3],):
        raise ValueError(f"input_positions must broadcast to [batch..., length] = {expected}, got {positions.shape}")
    return rotate(x, positions, settings.rope)


def _fold(x: Array) -> Array:
    """[*batch, L, H, D] -> (B, L, H, D)."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _fold_batch(name: str, x: Any, batch: tuple[int, ...], *length: int) -> Any:
    """[*batch] -> (B,), or with a length [*batch, L] -> (B, L). NumPy arrays stay so: their values are checked."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return x  # refused by lla_attention
    if x.shape != (*batch, *length):
        axes = "[batch..., length]" if length else "[batch...]"
        raise ValueError(f"{name} must have the shape {axes} = {(*batch, *length)}, got {x.shape}")
    return x.reshape(math.prod(batch), *length)


def _fold_segments(segment_ids: Any, batch: tuple[int, ...], queries: int, keys: int) -> Any:
    name = "segment_ids"
    if isinstance(segment_ids, tuple | list):
        if len(segment_ids) != 2:
            return segment_ids  # refused by lla_attention, and so is one array for two lengths
        return tuple(_fold_batch(name, x, batch, n) for x, n in zip(segment_ids, (queries, keys), strict=True))
    return _fold_batch(name, segment_ids, batch, queries) if queries == keys else segment_ids


def _visible(mask: Any) -> Array:
    """A boolean mask from one of Flax's. Flax's mask makers give float32 zeros and ones."""
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        raise TypeError(f"mask must be an array, got {type(mask).__name__}")
    mask = jnp.asarray(mask)
    if not any(jnp.issubdtype(mask.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        raise TypeError(f"mask must be boolean, or numbers of which nonzero means visible, got dtype {mask.dtype}")
    # a mask that is added to logits, taken for a boolean one, would show the keys that it hides
    known = mask.dtype != jnp.bool_ and not isinstance(mask, Tracer) and mask.is_fully_addressable
    if known and bool((mask < 0).any()):
        raise ValueError(
            "mask must be boolean, or numbers of which nonzero means visible, got negative numbers. For a mask that is "
            "added to the logits, with 0 where a key is visible, pass mask == 0"
        )
    return mask.astype(bool)


def _fold_mask(mask: Any, shape: tuple[int, ...]) -> Array:
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
