"""Decoding by XLA: a few queries over a cache, in one pass over it. Local Linear Attention is solved exactly.

For a query and the keys j that it sees, with softmax weights p_j:

    kbar = sum_j p_j k_j,  vbar = sum_j p_j v_j
    o = vbar + Cov_p(v, k) (Cov_p(k, k) + lambda I)^-1 (q - kbar)

This is the operator's centred form with the regression written out. A conjugate-gradient step would read the cache for
a few queries only. The covariances of a query need the cache only once in all.

The cache is read in blocks, from the first that some query sees to the last. The covariances of a block are centred on
its own mean. The update of Chan, Golub and LeVeque (1979) merges them with the blocks before. So ``E[kk] - E[k]E[k]``
does not cancel if a few keys hold the weight. Keys are taken relative to one of them, so that a large common offset
costs no digits either.

Parallax has a probe r in place of the solution, and needs no covariance. The running mean t of k.r, and the sums of the
values by p and by p a are enough (kernels/parallax.py says how they are kept).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flashlla_jax.interface import accumulation_dtype, usable_ridge
from flashlla_jax.sharding import varying_like
from flashlla_jax.visibility import Visibility

# Numbers in the largest temporary, the centred keys and values of one block for every query: 16 MiB in float32. A block
# has at least D keys, and is then as large as the covariances. Shorter blocks would mostly read and write those.
_BLOCK_SIZE = 2**22


_State = TypeVar("_State")  # running statistics


class _Moments(NamedTuple):
    """The running statistics; K key heads, R = tokens times the G queries that share a key head."""

    top: Float[Array, "B K R"]  # largest logit
    omega: Float[Array, "B K R"]  # sum of exp(logit - top)
    mean: Float[Array, "B K R E"]  # of keys, relative to their origin, and values side by side, E = D + Dv
    covariance: Float[Array, "B K R D E"]  # of the keys with both


def decode(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    ridge_lambda: Float[Array, "B T N"],
    seen: Visibility,
    first: Int[Array, "B T N"],
    qk_scale: float,
    *,
    reversible: bool = False,
) -> Float[Array, "B T N Dv"]:
    """Attention of T tokens over a cache that already holds them; zero for a query that sees no key.

    The cache is widened block by block, never as a whole; all arithmetic is in the query's accumulation dtype. Keys
    and values that no query sees are never used, even if they are NaN.

    Args:
        query: The tokens' queries.
        key: The cache, in any floating dtype.
        value: The cache, in any floating dtype.
        ridge_lambda: In the accumulation dtype. A ridge that is not positive gives NaN.
        seen: Which keys a query sees; only intervals and mask are looked at.
        first: Position of the first key that a query sees; any number if it sees none.
        qk_scale: Factor of the logits.
        reversible: Whether JAX must be able to differentiate this, which takes a loop over the whole cache.

    Returns:
        The output in the query's dtype.
    """
    batch, tokens, heads, _ = query.shape
    kv_heads, dim = key.shape[2:]
    dtype = accumulation_dtype(query.dtype)
    q, lam = (_by_row(jnp.moveaxis(x.astype(dtype), 1, 2), kv_heads) for x in (query, ridge_lambda))
    first = _by_row(jnp.moveaxis(first, 1, 2), kv_heads)
    origin = _origin(key, first, dtype)
    moments = _moments(qk_scale, q, key, value, origin, seen, tokens, reversible=reversible)

    sees = moments.omega != 0  # true for NaN: a bad key that is seen must show
    lam = jnp.where(sees, usable_ridge(lam), 1)
    m = (q - origin[:, :, None]) - moments.mean[..., :dim]
    x = solve(moments.covariance[..., :dim], lam, m)
    o = moments.mean[..., dim:] + jnp.einsum("bkrd,bkrde->bkre", x, moments.covariance[..., dim:], precision="highest")
    o = jnp.where(sees[..., None], o, 0)
    return jnp.moveaxis(o.reshape(batch, heads, tokens, value.shape[-1]), 1, 2).astype(query.dtype)


class _Sums(NamedTuple):
    """Parallax's running statistics."""

    top: Float[Array, "B K R"]  # largest logit
    omega: Float[Array, "B K R"]  # sum of exp(logit - top)
    t: Float[Array, "B K R"]  # the mean of k.r, of keys relative to their origin
    p: Float[Array, "B K R Dv"]  # sum of exp(logit - top) v
    pa: Float[Array, "B K R Dv"]  # and the same times a = 1 + t - k.r


def parallax(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    probe: Float[Array, "B T N D"],
    seen: Visibility,
    first: Int[Array, "B T N"],
    qk_scale: float,
    *,
    reversible: bool = False,
) -> Float[Array, "B T N Dv"]:
    """``decode`` of Parallax; the probe is shaped as the query, the other arguments are ``decode``'s."""
    batch, tokens, heads, _ = query.shape
    kv_heads = key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    q, r = (_by_row(jnp.moveaxis(x.astype(dtype), 1, 2), kv_heads) for x in (query, probe))
    origin = _origin(key, _by_row(jnp.moveaxis(first, 1, 2), kv_heads), dtype)
    block = _block(q, value)
    shape = q.shape[:3]
    zeros, values = jnp.zeros(shape, dtype), jnp.zeros((*shape, value.shape[3]), dtype)

    def add(j: Array, so_far: _Sums) -> _Sums:
        visible, kv = _load_block(q, key, value, origin, seen, tokens, block, j)
        return _add_block(qk_scale, q, r, visible, kv, so_far)

    nothing = _Sums(jnp.full(shape, -jnp.inf, dtype), zeros, zeros, values, values)
    sums = _over_blocks(add, nothing, (q, key, value, r, origin, seen), seen, block, value.shape[1], reversible)
    o = sums.pa / jnp.where(sums.omega != 0, sums.omega, 1)[..., None]
    return jnp.moveaxis(o.reshape(batch, heads, tokens, value.shape[-1]), 1, 2).astype(query.dtype)


def _add_block(qk_scale: float, q: Array, r: Array, visible: Array, kv: Array, so_far: _Sums) -> _Sums:
    """The sums with those of one block."""
    keys, values = kv[..., : q.shape[-1]], kv[..., q.shape[-1] :]
    logits = qk_scale * jnp.einsum("bkrd,bkcd->bkrc", q, keys, precision="highest")
    logits = jnp.where(visible, logits, -jnp.inf)
    kr = jnp.einsum("bkrd,bkcd->bkrc", r, keys, precision="highest")
    top = jnp.maximum(so_far.top, jnp.max(lax.stop_gradient(logits), axis=-1))
    shift = jnp.where(top == -jnp.inf, 0, top)  # nothing seen so far: every weight is exp(-inf) = 0
    w, shrink = jnp.exp(logits - shift[..., None]), jnp.exp(so_far.top - shift)
    omega = so_far.omega * shrink + jnp.sum(w, axis=-1)
    step = jnp.sum(w * (kr - so_far.t[..., None]), axis=-1) / jnp.where(omega != 0, omega, 1)
    t = so_far.t + step
    by_p, by_pa = (jnp.einsum("bkrc,bkce->bkre", x, values, precision="highest") for x in (w, w * _a(t, kr)))
    p, pa = (x * shrink[..., None] for x in (so_far.p, so_far.pa))
    return _Sums(top, omega, t, p + by_p, pa + step[..., None] * p + by_pa)


def _a(t: Array, kr: Array) -> Array:
    return 1 + (t[..., None] - kr)


def solve(
    covariance: Float[Array, "*rows D D"], lam: Float[Array, "*rows"], m: Float[Array, "*rows D"]
) -> Float[Array, "*rows D"]:
    """(covariance + lam I)^-1 m, whatever the scale of the keys; with the derivative of the solution.

    If the keys are large, or the ridge is small beside their covariance, rounding may make the matrix indefinite. The
    matrix is scaled to a unit diagonal, so its entries are off by their rounding. D times that, added to the diagonal,
    makes it definite again. Two steps of iterative refinement restore the directions that rounding has not lost.
    """
    dim = m.shape[-1]
    rounding = 2 * dim * float(jnp.finfo(m.dtype).eps)

    def matvec(x: Array) -> Array:
        return jnp.einsum("...de,...e->...d", covariance, x, precision="highest") + lam[..., None] * x

    def scaled_solve(_: Any, m: Array) -> Array:
        diagonal = jnp.diagonal(covariance, axis1=-2, axis2=-1) + lam[..., None]
        scale = lax.rsqrt(diagonal)
        eye = jnp.eye(dim, dtype=m.dtype).reshape((1,) * (m.ndim - 1) + (dim, dim))
        unit = jnp.where(eye.astype(bool), 1, covariance * scale[..., :, None] * scale[..., None, :])
        factor = jnp.linalg.cholesky(unit + rounding * eye)
        m = scale * m
        x = jax.scipy.linalg.cho_solve((factor, True), m[..., None])[..., 0]
        for _ in range(2):
            defect = m - jnp.einsum("...de,...e->...d", unit, x, precision="highest")
            x = x + jax.scipy.linalg.cho_solve((factor, True), defect[..., None])[..., 0]
        return scale * x

    return lax.custom_linear_solve(matvec, m, scaled_solve, symmetric=True)


def _by_row(x: Array, kv_heads: int) -> Array:
    """(B, N, T, ...) -> (B, K, R, ...)."""
    batch, heads, tokens, *rest = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * tokens, *rest)


def _origin(key: Array, first: Int[Array, "B K R"], dtype: Any) -> Float[Array, "B K D"]:
    """The earliest key that some query of the group sees. The result does not depend on it: it has no gradient."""
    first = jnp.min(first, axis=2)[:, None, :, None]
    origin = lax.stop_gradient(jnp.take_along_axis(key, first, axis=1)[:, 0].astype(dtype))
    return jnp.where(jnp.isfinite(origin), origin, 0)  # the cache may be unwritten there


def _moments(
    qk_scale: float,
    q: Float[Array, "B K R D"],
    key: Array,
    value: Array,
    origin: Array,
    seen: Visibility,
    tokens: int,
    *,
    reversible: bool,
) -> _Moments:
    """The statistics of each query's visible keys, by a loop over the blocks that some query sees.

    The number of these blocks is known at run time only. A ``reversible`` loop goes over all and skips the rest.
    """
    batch, kv_heads, rows, dim = q.shape
    value_dim = value.shape[3]
    dtype = q.dtype
    block = _block(q, value)
    merge = partial(_merge_block, qk_scale, q, key, value, origin, seen, tokens, block)
    shape = (batch, kv_heads, rows)
    nothing = _Moments(
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape, dim + value_dim), dtype),
        jnp.zeros((*shape, dim, dim + value_dim), dtype),
    )
    return _over_blocks(merge, nothing, (q, key, value, origin, seen), seen, block, value.shape[1], reversible)


def _block(q: Array, value: Array) -> int:
    """Keys of a block."""
    batch, kv_heads, rows, dim = q.shape
    capacity, value_dim = value.shape[1], value.shape[3]
    return min(capacity, max(dim, _BLOCK_SIZE // max(1, batch * kv_heads * rows * (dim + value_dim))))


def _over_blocks(
    merge: Callable[[Array, _State], _State],
    nothing: _State,
    given: Any,
    seen: Visibility,
    block: int,
    capacity: int,
    reversible: bool,
) -> _State:
    """The statistics of all blocks that some query sees.

    ``nothing`` are the statistics of no block, ``given`` the arrays that they depend on.
    """
    nothing, bounds = varying_like((nothing, _blocks(seen, block)), given)
    begin, end = bounds
    if not reversible:
        return lax.fori_loop(begin, end, merge, nothing)

    # only the statistics before each block are kept
    @partial(jax.checkpoint, prevent_cse=False)
    def step(so_far: _State, j: Array) -> tuple[_State, None]:
        return lax.cond((begin <= j) & (j < end), merge, lambda _, same: same, j, so_far), None

    return lax.scan(step, nothing, jnp.arange(math.ceil(capacity / block), dtype=jnp.int32))[0]


def _blocks(seen: Visibility, block: int) -> tuple[Array, Array]:
    """The first block that some query sees, and one more than the last."""
    largest = jnp.iinfo(jnp.int32).max
    begin = jnp.min(jnp.where(seen.start < seen.end, seen.start, largest), initial=largest) // block
    end = (jnp.max(seen.end, initial=0) + block - 1) // block
    return jnp.minimum(begin, end), end


def _merge_block(
    qk_scale: float,
    q: Array,
    key: Array,
    value: Array,
    origin: Array,
    seen: Visibility,
    tokens: int,
    block: int,
    j: Array,
    so_far: _Moments,
) -> _Moments:
    """The statistics with those of block j."""
    dim = q.shape[-1]
    visible, kv = _load_block(q, key, value, origin, seen, tokens, block, j)
    logits = qk_scale * jnp.einsum("bkrd,bkcd->bkrc", q, kv[..., :dim], precision="highest")
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.maximum(so_far.top, jnp.max(lax.stop_gradient(logits), axis=-1))
    shift = jnp.where(top == -jnp.inf, 0, top)  # nothing seen so far: every weight is exp(-inf) = 0
    w = jnp.exp(logits - shift[..., None])
    omega_here = jnp.sum(w, axis=-1)
    omega = so_far.omega * jnp.exp(so_far.top - shift) + omega_here

    p = w / jnp.where(omega_here > 0, omega_here, 1)[..., None]
    mean_here = jnp.einsum("bkrc,bkce->bkre", p, kv, precision="highest")
    centred = kv[:, :, None] - mean_here[:, :, :, None]  # (B, K, R, C, E)
    # this product sums over the left one's last axis: on a CPU 1.6 times as fast as over the first axes
    weighted = jnp.swapaxes(p[..., None] * centred[..., :dim], -1, -2)
    covariance_here = jnp.einsum("bkrdc,bkrce->bkrde", weighted, centred, precision="highest")
    share = (omega_here / jnp.where(omega > 0, omega, 1))[..., None]
    step = mean_here - so_far.mean
    between = (1 - share)[..., None] * step[..., :dim, None] * step[..., None, :]
    return _Moments(
        top,
        omega,
        so_far.mean + share * step,
        so_far.covariance + share[..., None] * (covariance_here - so_far.covariance + between),
    )


def _load_block(
    q: Array, key: Array, value: Array, origin: Array, seen: Visibility, tokens: int, block: int, j: Array
) -> tuple[Array, Array]:
    """Which rows see which keys of block j; its keys and values side by side, zero if no row sees them."""
    batch, kv_heads, rows, _ = q.shape
    start = jnp.minimum(j * block, key.shape[1] - block)  # the last block reaches back rather than over the end
    columns = start + jnp.arange(block, dtype=jnp.int32)[None, None]
    visible = (seen.start[..., None] <= columns) & (columns < seen.end[..., None]) & (columns >= j * block)
    visible = visible[:, None]
    if seen.mask is not None:
        part = seen.mask
        visible = visible & (part if part.shape[3] == 1 else lax.dynamic_slice_in_dim(part, start, block, axis=3))
    visible = jnp.broadcast_to(visible, (batch, rows // tokens * kv_heads, tokens, block))
    visible = _by_row(visible, kv_heads)
    keys, values = (
        jnp.moveaxis(lax.dynamic_slice_in_dim(x, start, block, axis=1).astype(q.dtype), 1, 2) for x in (key, value)
    )
    kv = jnp.concatenate([keys - origin[:, :, None], values], axis=-1)
    if seen.mask is None:  # the union of the tokens' intervals, without a search
        begin = jnp.min(jnp.where(seen.start < seen.end, seen.start, key.shape[1]), axis=1)[:, None]
        some = (begin <= columns[0]) & (columns[0] < jnp.max(seen.end, axis=1)[:, None])
        some = some[:, None]
    else:
        some = jnp.any(visible, axis=2)
    return visible, jnp.where(some[..., None], kv, 0)
