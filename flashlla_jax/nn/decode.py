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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax.interface import accumulation_dtype, usable_ridge

# Numbers in the largest temporary, the centred keys and values of one block for every query: 16 MiB in float32.
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
    query sees is never used, even where it is NaN. The cache is widened block by block, never as a whole; all
    arithmetic is in the accumulation dtype (float32; float64 for float64).

    Returns:
        The output in the accumulation dtype. NaN where the ridge is not positive.
    """
    batch, tokens, heads, dim = query.shape
    capacity, kv_heads, value_dim = value.shape[1:]
    group = heads // kv_heads
    rows = tokens * group
    dtype = accumulation_dtype(query.dtype)
    block = max(1, min(capacity, _BLOCK_SIZE // (batch * kv_heads * rows * (dim + value_dim))))

    def by_row(x: Array) -> Array:
        """(B, N, T, ...) -> (B, K, R, ...)."""
        return x.reshape(batch, kv_heads, rows, *x.shape[3:])

    q = by_row(jnp.moveaxis(query, 1, 2).astype(dtype))
    lam = usable_ridge(ridge_lambda.astype(dtype)).reshape(1, heads, 1)
    lam = by_row(jnp.broadcast_to(lam, (batch, heads, tokens)))
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
        seen = by_row(seen)
        pair = [lax.dynamic_slice_in_dim(x, start, block, axis=1).astype(dtype) for x in (key, value)]
        kv = jnp.moveaxis(jnp.concatenate(pair, axis=-1), 1, 2)
        return seen, jnp.where(jnp.any(seen, axis=2)[..., None], kv, 0)

    # Logits relative to the first key: a common offset of the keys then costs them no digits.
    origin = load(jnp.int32(0))[1][:, :, :1, :dim]

    def merge(j: Array, so_far: _Moments) -> _Moments:
        seen, kv = load(j)
        logits = qk_scale * jnp.einsum("bkrd,bkcd->bkrc", q, kv[..., :dim] - origin, precision="highest")
        logits = jnp.where(seen, logits, -jnp.inf)
        top = jnp.maximum(so_far.top, jnp.max(logits, axis=-1))
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
    moments = _Moments(
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape, dim + value_dim), dtype),
        jnp.zeros((*shape, dim, dim + value_dim), dtype),
    )
    blocks = jnp.minimum((index + tokens + block - 1) // block, math.ceil(capacity / block))
    moments = lax.fori_loop(0, blocks, merge, moments)

    eye = jnp.eye(dim, dtype=dtype).reshape(1, 1, 1, dim, dim)
    factor = jnp.linalg.cholesky(moments.covariance[..., :dim] + lam[..., None, None] * eye)
    x = jax.scipy.linalg.cho_solve((factor, True), (q - moments.mean[..., :dim])[..., None])[..., 0]
    o = moments.mean[..., dim:] + jnp.einsum("bkrd,bkrde->bkre", x, moments.covariance[..., dim:], precision="highest")
    return jnp.moveaxis(o.reshape(batch, heads, tokens, value_dim), 1, 2)
