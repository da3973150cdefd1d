"""What every implementation is given and gives back.

An implementation is a function ``(query, key, value, ridge_lambda, options, mask) -> (o, Residuals)`` on the canonical
layout: query ``(B, T, N, D)``, key ``(B, S, K, D)``, value ``(B, S, K, Dv)``, ridge_lambda ``(B, T, N)`` in the
accumulation dtype, with K dividing N. mask is None, or boolean, ``(B, N, T, S)`` or 1 in place of any of them, True
where a key is visible; a query that sees no key has output zero and no gradient. ``attention.py`` has checked the
arguments before any of them is called, and has zeroed the keys and values that no query sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Options:
    """The static options of one call, hashable so that they can ride through ``jax.custom_vjp``."""

    is_causal: bool
    qk_scale: float
    delta_eps: float
    cg_atol: float | None
    cg_rtol: float | None
    cg_max_iters: int
    cg_use_preconditioner: bool
    precision: jax.lax.Precision


class Residuals(NamedTuple):
    """What the forward pass knows beside its output, one number per query and head; constants under differentiation.

    The arrays have shape ``(B, S)`` for rank-3 inputs and ``(B, T, N)`` for rank-4 inputs. Floating ones are float32
    (float64 for float64 inputs).

    Attributes:
        omega: ``sum_j exp(qk_scale q.k_j - max_j)`` over the visible keys, the normaliser that ``flashlla`` returns.
        logsumexp: ``log sum_j exp(qk_scale q.k_j)``, natural logarithm.
        iterations: int32, conjugate-gradient steps that this query's solve took (0 for the dense reference).
        residual_norm: Euclidean norm of ``m - A x`` at the end of the solve, as the solver tracks it. Large beside
            ``cg_rtol`` where ``cg_max_iters`` ended the loop.
    """

    omega: jax.Array
    logsumexp: jax.Array
    iterations: jax.Array
    residual_norm: jax.Array


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation whose passes these are, paired in a ``jax.custom_vjp``; the residuals count as constants.

    Both passes are given a mask after the options where there is one, so passes that take none need not name it.

    Args:
        forward: ``(query, key, value, ridge_lambda, options[, mask]) -> ((o, residuals), saved)``.
        backward: ``(query, key, value, ridge_lambda, saved, g, options[, mask]) -> (dquery, dkey, dvalue,
            dridge_lambda)``, g being the cotangent of o.
    """

    def given(mask: Any) -> tuple[Any, ...]:
        return () if mask is None else (mask,)

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def attention(query: Any, key: Any, value: Any, ridge_lambda: Any, options: Options, mask: Any = None) -> Any:
        return forward(query, key, value, ridge_lambda, options, *given(mask))[0]

    def attention_fwd(query: Any, key: Any, value: Any, ridge_lambda: Any, options: Options, mask: Any = None) -> Any:
        out, saved = forward(query, key, value, ridge_lambda, options, *given(mask))
        return out, (query, key, value, ridge_lambda, mask, saved)

    def attention_bwd(options: Options, kept: Any, cotangents: Any) -> Any:
        query, key, value, ridge_lambda, mask, saved = kept
        g, _ = cotangents
        return *backward(query, key, value, ridge_lambda, saved, g, options, *given(mask)), None

    attention.defvjp(attention_fwd, attention_bwd)
    return attention


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def visible_keys(query_length: int, key_length: int, is_causal: bool) -> jax.Array:
    """How many leading keys each query sees, int32 ``(T,)``: all, or the prefix that is aligned at the end."""
    if not is_causal:
        return jnp.full(query_length, key_length, jnp.int32)
    return jnp.arange(query_length, dtype=jnp.int32) + (key_length - query_length + 1)


# Beyond this the solution of (A + lambda I) x = m is below the rounding of 1 - kc.x, and lambda |p|^2 might overflow;
# a larger (or infinite) ridge gives the same result as this one: softmax attention.
_LARGEST_RIDGE = 1e15


def usable_ridge(ridge_lambda: jax.Array) -> jax.Array:
    """The ridge that an iterative solve works with: NaN where it is not positive, and finite where it is infinite."""
    return jnp.minimum(jnp.where(ridge_lambda > 0, ridge_lambda, jnp.nan), _LARGEST_RIDGE)
