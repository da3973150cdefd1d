"""The decode step: Local Linear Attention of a few queries over a key/value cache, solved exactly, in one pass.

For query i and the keys j that it sees, p_ij being the softmax weights (design.md section 1; the symbols are the same):

    kbar = sum_j p_j k_j,  vbar = sum_j p_j v_j
    o = vbar + Cov_p(v, k) (Cov_p(k, k) + lambda I)^-1 (q - kbar)

which is the operator's centred form with the regression written out. A few queries leave nothing to share a
conjugate-gradient step between, while the covariances of each need the cache only once.

The cache is read in blocks. Each block's means and covariances, centred on the block's own mean, are merged with what
came before by the update of Chan, Golub and LeVeque (1979), so nothing is lost to the cancellation of ``E[kk] -
E[k]E[k]`` where a few keys hold the weight.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax.interface import accumulation_dtype, usable_ridge

# Numbers in the largest temporary, the centred keys and values of one block for every query: 16 MiB in float32. But a
# block has D keys at least, when it is as large as the covariances: shorter ones would mostly read and write those.
_BLOCK_SIZE = 2**22


class _Moments(NamedTuple):
    """The running statistics; K key heads, R = tokens times the G queries that share a key head."""

    top: Float[Array, "B K R"]  # largest logit
    omega: Float[Array, "B K R"]  # sum of exp(logit - top)
    mean: Float[Array, "B K R E"]  # of keys and values side by side, E = D + Dv
    covariance: Float[Array, "B K R D E"]  # of the keys with both


def decode_step(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    ridge_lambda: Float[Array, " N"],
    index: Int[Array, ""],
    *,
    qk_scale: float,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
) -> Float[Array, "B T N Dv"]:
    """Attention of T new tokens, the first at position ``index``, over a cache that already holds them.

    Token t sees the positions up to ``index + t``, less what ``mask`` hides; a query that sees none gives zero. What no
    query sees is never used, even where it is NaN, and gets a gradient of zero. The cache is widened block by block,
    never as a whole; all arithmetic is in the accumulation dtype (float32; float64 for float64). Differentiable in
    reverse mode in ``query``, ``key``, ``value`` and ``ridge_lambda``.

    Returns:
        The output in the accumulation dtype. NaN where the ridge is not positive.
    """
    batch, tokens, heads, dim = query.shape
    kv_heads = key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    query = query.astype(dtype)
    lam = usable_ridge(ridge_lambda.astype(dtype)).reshape(1, heads, 1)
    lam = _by_row(jnp.broadcast_to(lam, (batch, heads, tokens)), kv_heads)

    moments: Any = _moments(qk_scale, query, key, value, index, mask)
    eye = jnp.eye(dim, dtype=dtype).reshape(1, 1, 1, dim, dim)
    factor = jnp.linalg.cholesky(moments.covariance[..., :dim] + lam[..., None, None] * eye)
    m = _by_row(jnp.moveaxis(query, 1, 2), kv_heads) - moments.mean[..., :dim]
    x = jax.scipy.linalg.cho_solve((factor, True), m[..., None])[..., 0]
    o = moments.mean[..., dim:] + jnp.einsum("bkrd,bkrde->bkre", x, moments.covariance[..., dim:], precision="highest")
    return jnp.moveaxis(o.reshape(batch, heads, tokens, value.shape[-1]), 1, 2)


def _by_row(x: Array, kv_heads: int) -> Array:
    """(B, N, T, ...) -> (B, K, R, ...)."""
    batch, heads, tokens, *rest = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * tokens, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moments(qk_scale: float, query: Array, key: Array, value: Array, index: Array, mask: Array | None) -> _Moments:
    """The statistics of what each query sees, by a loop that ends with the filled part of the cache."""
    return _accumulate(qk_scale, query, key, value, index, mask, reversible=False)


def _moments_fwd(qk_scale: float, *arguments: Any) -> tuple[_Moments, tuple[Any, ...]]:
    return _moments(qk_scale, *arguments), arguments


def _moments_bwd(qk_scale: float, arguments: tuple[Any, ...], cotangents: _Moments) -> tuple[Any, ...]:
    query, key, value, index, mask = arguments
    loop = partial(_accumulate, qk_scale, index=index, mask=mask, reversible=True)
    return *jax.vjp(loop, query, key, value)[1](cotangents), None, None


_moments.defvjp(_moments_fwd, _moments_bwd)


def _accumulate(
    qk_scale: float, query: Array, key: Array, value: Array, index: Array, mask: Array | None, *, reversible: bool
) -> _Moments:
    """``_moments`` by a loop of unknown length, or by a longer one that JAX can reverse."""
    batch, tokens, heads, dim = query.shape
    capacity, kv_heads, value_dim = value.shape[1:]
    rows = tokens * (heads // kv_heads)
    dtype = query.dtype
    numbers_per_key = batch * kv_heads * rows * (dim + value_dim)
    block = min(capacity, max(dim, _BLOCK_SIZE // max(1, numbers_per_key)))  # an empty batch has no numbers
    q = _by_row(jnp.moveaxis(query, 1, 2), kv_heads)
    last = index + jnp.arange(tokens, dtype=jnp.int32)  # the last position that each token sees

    def load(j: Array) -> tuple[Array, Array]:
        """Block j: which rows see which of its keys, and keys and values side by side, zero where none does."""
        start = jnp.minimum(j * block, capacity - block)  # the last block reaches back rather than over the end
        columns = start + jnp.arange(block, dtype=jnp.int32)
        seen = (columns >= j * block)[None, :] & (columns[None, :] <= last[:, None])
        seen = jnp.broadcast_to(seen[None, None], (batch, heads, tokens, block))
        if mask is not None:
            part = mask if mask.shape[3] == 1 else lax.dynamic_slice_in_dim(mask, start, block, axis=3)
            seen = seen & part
        seen = _by_row(seen, kv_heads)
        pair = [lax.dynamic_slice_in_dim(x, start, block, axis=1).astype(dtype) for x in (key, value)]
        kv = jnp.moveaxis(jnp.concatenate(pair, axis=-1), 1, 2)
        return seen, jnp.where(jnp.any(seen, axis=2)[..., None], kv, 0)

    # Logits relative to the first key: a common offset of the keys then costs them no digits. The result does not
    # depend on it, nor on the largest logit below: neither has a gradient.
    origin = lax.stop_gradient(load(jnp.int32(0))[1][:, :, :1, :dim])

    def merge(j: Array, so_far: _Moments) -> _Moments:
        seen, kv = load(j)
        logits = qk_scale * jnp.einsum("bkrd,bkcd->bkrc", q, kv[..., :dim] - origin, precision="highest")
        logits = jnp.where(seen, logits, -jnp.inf)
        top = jnp.maximum(so_far.top, jnp.max(lax.stop_gradient(logits), axis=-1))
        shift = jnp.where(top == -jnp.inf, 0, top)  # nothing seen so far: every weight is exp(-inf) = 0
        w = jnp.exp(logits - shift[..., None])
        omega_here = jnp.sum(w, axis=-1)
        omega = so_far.omega * jnp.exp(so_far.top - shift) + omega_here

        p = w / jnp.where(omega_here > 0, omega_here, 1)[..., None]
        mean_here = jnp.einsum("bkrc,bkce->bkre", p, kv, precision="highest")
        centred = kv[:, :, None] - mean_here[:, :, :, None]  # (B, K, R, C, E)
        covariance_here = jnp.einsum(
            "bkrcd,bkrce->bkrde", p[..., None] * centred[..., :dim], centred, precision="highest"
        )
        share = (omega_here / jnp.where(omega > 0, omega, 1))[..., None]
        step = mean_here - so_far.mean
        between = (1 - share)[..., None] * step[..., :dim, None] * step[..., None, :]
        return _Moments(
            top,
            omega,
            so_far.mean + share * step,
            so_far.covariance + share[..., None] * (covariance_here - so_far.covariance + between),
        )

    shape = (batch, kv_heads, rows)
    start = _Moments(
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape, dim + value_dim), dtype),
        jnp.zeros((*shape, dim, dim + value_dim), dtype),
    )
    most = math.ceil(capacity / block)
    blocks = jnp.minimum((index + tokens + block - 1) // block, most)
    if not reversible:
        return lax.fori_loop(0, blocks, merge, start)

    # Over all blocks, those beyond the filled ones as they are. Only the statistics before each block are kept.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(so_far: _Moments, j: Array) -> tuple[_Moments, None]:
        return lax.cond(j < blocks, merge, lambda _, same: same, j, so_far), None

    return lax.scan(step, start, jnp.arange(most, dtype=jnp.int32))[0]
