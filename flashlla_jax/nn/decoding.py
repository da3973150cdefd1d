"""From projected queries, keys and values and a cache to the heads' output and the cache with the new tokens in it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax.arguments import check_integers
from flashlla_jax.attention import lla_attention
from flashlla_jax.decode import lla_decode, parallax_decode
from flashlla_jax.decode_arguments import MOST_TOKENS
from flashlla_jax.nn.checks import check_positions
from flashlla_jax.nn.core import Positions, Settings, by_probe, operator_options, promoted, rotate_heads, rotated
from flashlla_jax.nn.layout import fold, fold_mask


class Cache(NamedTuple):
    """Keys (rotated, where ``rope`` is on) and values of the first ``filled`` positions, in Flax's layout.

    ``filled`` is one number for all rows, as Flax has it, or one for each.
    """

    key: Float[Array, "*batch S K D"]
    value: Float[Array, "*batch S K D"]
    filled: Int[Array, ""] | Int[Array, "*batch"]


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
        options["mask"] = fold_mask(mask, (*batch, heads, 1, keys))
    o = lla_decode(fold(query), fold(key), fold(value), keys, **options)
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
    """Append T tokens to the cache and attend from them, as a causal forward pass does at their positions.

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
        raise ValueError("decode=True needs is_causal=True: a token cannot see keys that are not in the cache yet")
    query, probe, key, value = promoted(settings, query, probe, key, value)
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
        query, probe = rotated(settings, query, probe, positions)
        key = rotate_heads(settings, key, positions)

    sound = (first >= 0) & (first + new <= capacity)
    # a negative position stays negative: positions before the first were never written
    cache = Cache(
        _append(cache.key, key, first, lengths),
        _append(cache.value, value, first, lengths),
        jnp.where(first < 0, first, first + new),
    )
    if mask is not None:
        mask = fold_mask(mask, (*batch, query.shape[-2], length, capacity))
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
    mask: Bool[Array, "#B #N #T #S"] | None


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
    written = jax.vmap(lambda row, tokens, place: row.at[place].set(tokens, mode="drop"))(fold(cache), fold(new), place)
    return written.reshape(cache.shape)


def _few_tokens(
    settings: Settings, query: Array, probe: Array | None, cache: Cache, ridge_lambda: Any, seen: _Seen
) -> Array:
    """The last tokens of the cache by the exact step; its state is a D x D matrix per token and head."""
    length = query.shape[-3]
    options: dict[str, Any] = {
        "starts": None if seen.starts is None else seen.starts.reshape(-1),
        "mask": seen.mask,
        "local_window_size": settings.local_window_size,
        "qk_scale": settings.qk_scale,
        "precision": settings.precision,
        "implementation": settings.implementation,
    }
    written = (fold(cache.key), fold(cache.value), seen.first.reshape(-1) + length)
    if probe is None:
        o = lla_decode(fold(query), *written, ridge_lambda=ridge_lambda, **options)
    else:
        o = parallax_decode(fold(query), fold(probe), *written, **options)
    return o.reshape(query.shape)


def _many_tokens(
    settings: Settings, query: Array, probe: Array | None, cache: Cache, ridge_lambda: Any, seen: _Seen
) -> Array:
    """The last tokens of the cache by the operator, in linear memory, except for a mask."""
    length, capacity, mask = query.shape[-3], cache.key.shape[-3], seen.mask
    if seen.starts is not None:
        begun = jnp.arange(capacity, dtype=jnp.int32)[None] >= seen.starts.reshape(-1, 1)
        begun = begun[:, None, None]
        mask = begun if mask is None else mask & begun
    new = length if seen.lengths is None else seen.lengths
    options = operator_options(settings, ridge_lambda, is_causal=True, implementation=settings.implementation)
    run: Any = lla_attention if probe is None else partial(by_probe, probe)
    o = run(
        fold(query),
        *(fold(x.astype(query.dtype)) for x in (cache.key, cache.value)),
        mask=mask,
        query_offset=seen.first.reshape(-1),
        query_seq_lengths=None if seen.lengths is None else seen.lengths.reshape(-1),
        key_value_seq_lengths=(seen.first + new).reshape(-1),
        **options,
    )
    return o.reshape(query.shape)
