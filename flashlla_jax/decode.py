"""``lla_decode`` and ``parallax_decode``: the last few tokens of every row of a key/value cache."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax import decode_xla, reference
from flashlla_jax.arguments import (
    Implementation,
    check_mask,
    check_precision,
    check_probe,
    check_ridge,
    check_scale,
    check_window,
    explains_names_from_elsewhere,
)
from flashlla_jax.attention import Ridge, choose
from flashlla_jax.decode_arguments import check_cache, check_lengths, check_starts
from flashlla_jax.interface import Options, ParallaxOptions, SolverOptions
from flashlla_jax.kernels import decode_call, parallax_decode_call
from flashlla_jax.operator import folded
from flashlla_jax.sharding import by_shard, divisible, varying_like
from flashlla_jax.visibility import LARGEST_POSITION, Visibility, dense, first_and_last


@explains_names_from_elsewhere
def lla_decode(
    query: Float[Array, "B T N D"],
    key_cache: Float[Array, "B S K D"],
    value_cache: Float[Array, "B S K Dv"],
    lengths: int | Int[Array, ""] | Int[Array, " B"],
    *,
    starts: Int[Array, " B"] | None = None,
    mask: Bool[Array, "#B #T #S"] | Bool[Array, "#B #N #T #S"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    ridge_lambda: Ridge = 10.0,
    qk_scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N Dv"]:
    """Local Linear Attention of the last 1 to 8 tokens of every row of a cache: one step of generation.

    The result is that of causal :func:`~flashlla_jax.lla_attention` over the written part of the cache, for these
    tokens. The solve is exact, in one pass over the visible keys. Write the tokens' own keys and values to the cache
    before the call: query t of row b has position ``lengths[b] - T + t``. It sees the keys at positions from
    ``starts[b]`` to its own that the window and the mask do not hide. A query that sees no key has output zero and no
    gradient. Positions of the cache that no query sees may hold NaN.

    The function can be differentiated once, in reverse mode, in query, caches and ridge. XLA computes the gradient on
    every platform. ``jax.jit``, ``jax.vmap``, ``jax.lax.scan`` and ``jax.shard_map`` work. So do meshes that divide
    cache and tokens along the batch or the heads.

    Example::

        o = lla_decode(q, key_cache, value_cache, lengths)  # q: (B, 1, N, D), each row's last token

    Args:
        query: ``(B, T, N, D)``, T from 1 to 8. bfloat16, float16, float32 or float64.
        key_cache: ``(B, S, K, D)``, K divides N: each key/value head serves N / K query heads, and is read once for
            them. A dtype of the query's list, the same or another, or float8_e4m3fn or float8_e5m2.
        value_cache: ``(B, S, K, Dv)``, in the dtype of ``key_cache``.
        lengths: How many positions of each row are written, the tokens included: an int or an integer scalar for all
            rows, or ``(B,)``. From 0 to S. A value outside is an error if it is known (Python or NumPy), else the
            row's output is NaN. If it is less than T, the first queries have positions below 0 and see no key.
        starts: ``(B,)`` integers, the first position of each row, for prompts that are padded on the left; None for 0.
        mask: Boolean, True where a key is visible: ``(B, T, S)`` or ``(B, N, T, S)``, with 1 in place of any axis.
            It takes its own memory, and the kernel searches it. Prefer lengths, starts and window if they can say it.
        local_window_size: As in :func:`~flashlla_jax.lla_attention`.
        ridge_lambda: As in :func:`~flashlla_jax.lla_attention`; broadcasts to ``(B, T, N)``.
        qk_scale: As in :func:`~flashlla_jax.lla_attention`.
        precision: As in :func:`~flashlla_jax.lla_attention`, for the Triton kernels. XLA and the reference are exact.
        implementation: ``"triton"``, ``"xla"``, ``"reference"`` or None, as in :func:`~flashlla_jax.lla_attention`.

    Returns:
        The output in the query's dtype, ``(B, T, N, Dv)``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape does not fit, or a number is out of range.
        NotImplementedError: The named implementation cannot serve this call here, or an array is sharded along its
            length or its last axis, or the key/value heads do not divide among the devices.
    """
    query, key, value = check_cache(query, key_cache, value_cache)
    window = None if local_window_size is None else check_window(local_window_size)
    hiding = _check_hiding(query, key, lengths, starts, mask)
    lam = check_ridge(ridge_lambda, query)
    scale = check_scale(qk_scale, query)
    chosen = choose("lla_decode", implementation, decode_call.refusal(query, key, value))
    static = _Static(False, window, scale, check_precision(precision), chosen)
    return _run(static, query, key, value, lam, hiding)


def parallax_decode(
    query: Float[Array, "B T N D"],
    probe: Float[Array, "B T N D"],
    key_cache: Float[Array, "B S K D"],
    value_cache: Float[Array, "B S K Dv"],
    lengths: int | Int[Array, ""] | Int[Array, " B"],
    *,
    starts: Int[Array, " B"] | None = None,
    mask: Bool[Array, "#B #T #S"] | Bool[Array, "#B #N #T #S"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    qk_scale: float | None = None,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N Dv"]:
    """Parallax of the last 1 to 8 tokens of every row of a cache: one step of generation.

    Equals causal :func:`~flashlla_jax.parallax_attention` over the written part of the cache for these tokens. The
    arguments are those of :func:`lla_decode` without the ridge.

    Args:
        query: As in :func:`lla_decode`.
        probe: In the shape and the dtype of ``query``.
        key_cache: As in :func:`lla_decode`, and so are the following.
        value_cache: See :func:`lla_decode`.
        lengths: See :func:`lla_decode`.
        starts: See :func:`lla_decode`.
        mask: See :func:`lla_decode`.
        local_window_size: See :func:`lla_decode`.
        qk_scale: See :func:`lla_decode`.
        precision: See :func:`lla_decode`.
        implementation: See :func:`lla_decode`.

    Returns:
        The output in the query's dtype, ``(B, T, N, Dv)``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape does not fit, or a number is out of range.
        NotImplementedError: As in :func:`lla_decode`.
    """
    query, key, value = check_cache(query, key_cache, value_cache)
    probe = check_probe(probe, query)
    window = None if local_window_size is None else check_window(local_window_size)
    hiding = _check_hiding(query, key, lengths, starts, mask)
    chosen = choose("parallax_decode", implementation, decode_call.refusal(query, key, value))
    static = _Static(True, window, check_scale(qk_scale, query), check_precision(precision), chosen)
    return _run(static, query, key, value, probe, hiding)


def _check_hiding(query: Array, key: Array, lengths: Any, starts: Any, mask: Any) -> dict[str, Any]:
    """The given arguments that hide keys, as arrays."""
    batch, tokens, heads, _ = query.shape
    masks = {"(B, T, S)": (batch, tokens, key.shape[1]), "(B, N, T, S)": (batch, heads, tokens, key.shape[1])}
    hiding = {
        "lengths": check_lengths(lengths, query, key),
        "starts": None if starts is None else check_starts(starts, query),
        "mask": None if mask is None else check_mask(mask, masks),
    }
    return {name: x for name, x in hiding.items() if x is not None}


class _Static(NamedTuple):
    """The part of a call that is known when it is traced."""

    parallax: bool  # else it is Local Linear Attention
    window: tuple[int, int] | None
    qk_scale: float
    precision: lax.Precision
    implementation: Implementation | None  # None: Triton or XLA, by platform


class _Call(NamedTuple):
    """The arrays of a call, on the canonical layout."""

    query: Float[Array, "B T N D"]
    key: Float[Array, "B S K D"]
    value: Float[Array, "B S K Dv"]
    own: Float[Array, "B T N"] | Float[Array, "B T N D"]  # the ridge, or the probe
    seen: Visibility
    first: Int[Array, "B T N"]  # position of the first key that a query sees


@partial(jax.jit, static_argnums=0)  # so that a call outside of any jit is compiled once
def _run(static: _Static, query: Array, key: Array, value: Array, own: Array, hiding: dict[str, Any]) -> Array:
    return by_shard(partial(_attend, static), query, key, value, own, hiding)[0]


def _attend(
    static: _Static, query: Array, key: Array, value: Array, own: Array, hiding: dict[str, Any]
) -> tuple[Array, tuple[()]]:
    batch, tokens, heads, _ = query.shape
    capacity = key.shape[1]
    lengths = jnp.broadcast_to(hiding["lengths"], (batch,))
    seen = _visibility(static.window, lengths, hiding.get("starts"), hiding.get("mask"), tokens, capacity)
    o: Any
    if static.implementation == "reference":
        o = _reference(static, query, key, value, own, seen)
    else:
        o = _decode(static, _Call(query, key, value, own, seen, _first_seen(seen, heads, capacity)))
    valid = (lengths >= 0) & (lengths <= capacity)
    return jnp.where(valid[:, None, None, None], o, jnp.nan), ()


def _reference(static: _Static, query: Array, key: Array, value: Array, own: Array, seen: Visibility) -> Array:
    if static.parallax:
        options = ParallaxOptions(static.qk_scale, static.precision)
        return reference.parallax(query, key, value, own, seen, options)[0]
    options = Options(static.qk_scale, 0.0, SolverOptions(None, None, 1, False), static.precision)
    return reference.attention(query, key, value, own, seen, options)[0]


def _visibility(
    window: tuple[int, int] | None, lengths: Array, starts: Array | None, mask: Array | None, tokens: int, keys: int
) -> Visibility:
    """One interval for each query, ``(B, T)``. The mask counts inside it."""
    position = lengths[:, None] - tokens + jnp.arange(tokens, dtype=jnp.int32)[None]
    start, end = jnp.zeros_like(position), jnp.clip(position + 1, 0, keys)
    if window is not None:
        start = jnp.maximum(start, position - min(window[0], LARGEST_POSITION))
    if starts is not None:
        start = jnp.maximum(start, starts[:, None])
    some = start < end
    seen = Visibility(jnp.where(some, start, 0), jnp.where(some, end, 0), None, None, None, mask, False, False)
    if mask is None:
        return seen
    start, end = first_and_last(jnp.any(dense(seen, keys), axis=1))
    return Visibility(start, end, None, None, None, mask, False, False)


def _first_seen(seen: Visibility, heads: int, keys: int) -> Array:
    shape = (*seen.start.shape, heads)
    if seen.mask is None or seen.mask.shape[1] == 1:
        return jnp.broadcast_to(seen.start[..., None], shape)
    return jnp.broadcast_to(jnp.moveaxis(jnp.argmax(dense(seen, keys), axis=3), 1, 2).astype(jnp.int32), shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(static: _Static, call: _Call) -> Array:
    return _folding(static)(call)


def _decode_fwd(static: _Static, call: _Call) -> tuple[Array, _Call]:
    return _decode(static, call), call


def _decode_bwd(static: _Static, call: _Call, g: Array) -> tuple[_Call]:
    of_blocks = decode_xla.parallax if static.parallax else decode_xla.decode

    def run(query: Array, key: Array, value: Array, own: Array) -> Array:
        return of_blocks(query, key, value, own, call.seen, call.first, static.qk_scale, reversible=True)

    gradients = jax.vjp(run, *call[:4])[1](g)
    return (_Call(*gradients, None, None),)  # type: ignore[arg-type]


_decode.defvjp(_decode_fwd, _decode_bwd)


def _folding(static: _Static) -> Any:
    """The call of an implementation; an axis that ``jax.vmap`` maps is folded into the batch."""

    @custom_vmap
    def run(call: _Call) -> Array:
        return _implementation(static, call)

    @run.def_vmap
    def _mapped(size: int, arguments_mapped: list[_Call], call: _Call) -> tuple[Array, bool]:
        (mapped,) = arguments_mapped
        batch = call.query.shape[1 if mapped.query else 0]

        o = run(jax.tree.map(partial(folded, size, batch), call, mapped))
        return o.reshape(size, batch, *o.shape[1:]), True

    return run


def _implementation(static: _Static, call: _Call) -> Array:
    of_blocks = decode_xla.parallax if static.parallax else decode_xla.decode
    kernels: Any = parallax_decode_call if static.parallax else decode_call

    def xla(*call: Any) -> Array:
        return varying_like(of_blocks(*_Call(*call), static.qk_scale), call)

    def triton(*call: Any) -> Array:
        run = divisible(partial(kernels.decode, qk_scale=static.qk_scale, precision=static.precision))
        return varying_like(run(*call), call)

    if static.implementation is None:
        return lax.platform_dependent(*call, cuda=triton, default=xla)
    return (triton if static.implementation == "triton" else xla)(*call)
