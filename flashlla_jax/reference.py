"""Local Linear Attention by its definition: dense, one ``jnp.linalg.solve`` per query.

This is the definition that every other implementation is tested against; in float64 it is the truth. It holds a
``(B, N, T, S, D)`` array and costs O(T S D^2), so it is for tests and small problems.

For query i over its visible keys j, with softmax weights p_ij (docs/design.md):

    kbar_i = sum_j p_ij k_j,  kc_ij = k_j - kbar_i,  A_i = sum_j p_ij kc_ij kc_ij^T + lambda_i I
    x_i = A_i^-1 (kbar_i - q_i),  o_i = sum_j p_ij (1 - kc_ij.x_i) v_j

The paper (arXiv 2510.01450, section 3) writes the same with z_ij = k_j - q_i in place of kc_ij, and then divides:

    w_ij = exp(qk_scale q_i.k_j - max_j),  omega_i = sum_j w_ij,  mu_i = sum_j w_ij z_ij
    Sigma_i = sum_j w_ij z_ij z_ij^T + lambda_i omega_i I,  rho_i = Sigma_i^-1 mu_i
    o_i = sum_j w_ij (1 - z_ij.rho_i) / (omega_i - mu_i.rho_i) v_j

In float64 the two agree to 1e-14. In float32 the paper's loses everything where a query lies far from the keys it sees.

A query that sees no key has output zero.

Parallax has a given vector, the probe r_i, in place of the solution x_i: ``parallax`` below.

``delta_eps`` is added to the denominator ``omega_i - mu_i.rho_i``, which is positive. The factor that this multiplies
``o_i`` by counts as a constant under differentiation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flashlla_jax.interface import (
    Options,
    ParallaxOptions,
    ParallaxResiduals,
    Residuals,
    accumulation_dtype,
    usable_ridge,
)
from flashlla_jax.visibility import Visibility, dense, seeing_queries, without_hidden


def _by_head(x: Array, heads: int) -> Array:
    """(B, L, K, ...) -> (B, N, L, ...), each key/value head repeated for the query heads that share it."""
    x = jnp.moveaxis(x, 2, 1)
    return jnp.repeat(x, heads // x.shape[1], axis=1)


def _weights(
    q: Array, k: Array, seen: Visibility, options: Options | ParallaxOptions
) -> tuple[Array, Array, Array, Array]:
    """``(w, omega, total, top)``: w (B, N, T, S), 0 where key j is hidden from query i; total is omega, or 1 for 0."""
    s = options.qk_scale * jnp.einsum("bntd,bnsd->bnts", q, k, precision="highest")
    s = jnp.where(dense(seen, k.shape[2]), s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    w = jnp.exp(s - top)
    omega = jnp.sum(w, axis=-1)
    return w, omega, jnp.where(omega > 0, omega, 1), top[..., 0]


def _canonical(
    query: Array, key: Array, value: Array, ridge_lambda: Array, seen: Visibility
) -> tuple[Array, Array, Array, Array]:
    """Heads first, in the accumulation dtype, without the values that no result may depend on."""
    dtype = accumulation_dtype(query.dtype)
    if not seen.complete:
        query, key, value = without_hidden(query, key, value, seen)
        ridge_lambda = jnp.where(seeing_queries(seen, key.shape[1]), ridge_lambda, 1)
    heads = query.shape[2]
    q = jnp.moveaxis(query, 2, 1).astype(dtype)
    k, v = (_by_head(x, heads).astype(dtype) for x in (key, value))
    lam = jnp.moveaxis(ridge_lambda, 2, 1).astype(dtype)
    return q, k, v, usable_ridge(lam)


def _regression(p: Array, k: Array, lam: Array) -> tuple[Array, Array, Array]:
    """The centred keys kc, (B, N, T, S, D), the matrix A, (B, N, T, D, D), and kbar."""
    kbar = jnp.einsum("bnts,bnsd->bntd", p, k, precision="highest")
    kc = k[:, :, None] - kbar[:, :, :, None]
    ridge = lam[..., None, None] * jnp.eye(k.shape[-1], dtype=k.dtype)[None, None, None]
    return kc, jnp.einsum("bntsd,bntse->bntde", p[..., None] * kc, kc, precision="highest") + ridge, kbar


def _damping(total: Array, m: Array, x: Array, options: Options) -> Array:
    """The factor by which ``delta_eps`` changes the output; the paper's denominator is ``total / (1 + m.x)``."""
    return total / (total + options.delta_eps * (1 + jnp.sum(m * x, axis=-1)))


def attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    ridge_lambda: Float[Array, "B T N"],
    seen: Visibility,
    options: Options,
) -> tuple[Float[Array, "B T N Dv"], Residuals]:
    """The centred form. Differentiable by JAX itself; 16-bit inputs are computed in float32.

    The solver's options and ``precision`` do not apply: the solve is direct and every product is exact to the dtype.
    """
    q, k, v, lam = _canonical(query, key, value, ridge_lambda, seen)
    w, omega, total, top = _weights(q, k, seen, options)

    p = w / total[..., None]
    kc, a_matrix, kbar = _regression(p, k, lam)
    m = jnp.where((omega > 0)[..., None], kbar - q, 0)
    x = jnp.linalg.solve(a_matrix, m[..., None])[..., 0]
    a = 1 - jnp.einsum("bntsd,bntd->bnts", kc, x, precision="highest")
    damping = jax.lax.stop_gradient(_damping(total, m, x, options))
    o = jnp.einsum("bnts,bnsd->bntd", p * a * damping[..., None], v, precision="highest")
    o = jnp.where((omega > 0)[..., None], o, 0)  # selected: the cotangent of a query that sees no key may be NaN

    defect = m - jnp.einsum("bntde,bnte->bntd", a_matrix, x, precision="highest")
    left = jnp.linalg.norm(defect, axis=-1)
    energy = lam * jnp.sum(m * x, axis=-1)
    residuals = Residuals(
        omega=omega,
        logsumexp=top + jnp.log(total),
        iterations=jnp.zeros(omega.shape, jnp.int32),
        residual_norm=left,
        relative_error=jnp.where(left > 0, left / jnp.sqrt(jnp.where(energy > 0, energy, 1)), 0),
        converged=jnp.isfinite(left),
    )
    residuals = jax.lax.stop_gradient(Residuals(*(jnp.moveaxis(x, 1, 2) for x in residuals)))
    return jnp.moveaxis(o, 1, 2).astype(query.dtype), residuals


def parallax(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    probe: Float[Array, "B T N D"],
    seen: Visibility,
    options: ParallaxOptions,
) -> tuple[Float[Array, "B T N Dv"], ParallaxResiduals]:
    """Parallax (arXiv 2605.29157): ``o_i = sum_j p_ij (1 - kc_ij.r_i) v_j`` of the probe r. As exact as ``attention``.

    The keys are centred before the product with the probe, so nothing is lost to an offset that they share.
    """
    dtype = accumulation_dtype(query.dtype)
    if not seen.complete:
        query, key, value = without_hidden(query, key, value, seen)
        probe = jnp.where(seeing_queries(seen, key.shape[1])[..., None], probe, 0)
    q, r = (jnp.moveaxis(x, 2, 1).astype(dtype) for x in (query, probe))
    k, v = (_by_head(x, query.shape[2]).astype(dtype) for x in (key, value))
    w, omega, total, top = _weights(q, k, seen, options)
    p = w / total[..., None]
    kbar = jnp.einsum("bnts,bnsd->bntd", p, k, precision="highest")
    a = 1 - jnp.einsum("bntsd,bntd->bnts", k[:, :, None] - kbar[:, :, :, None], r, precision="highest")
    o = jnp.einsum("bnts,bnsd->bntd", p * a, v, precision="highest")
    o = jnp.where((omega > 0)[..., None], o, 0)  # selected: the cotangent of a query that sees no key may be NaN
    residuals = ParallaxResiduals(omega, top + jnp.log(total))
    residuals = jax.lax.stop_gradient(ParallaxResiduals(*(jnp.moveaxis(x, 1, 2) for x in residuals)))
    return jnp.moveaxis(o, 1, 2).astype(query.dtype), residuals


def attention_backward(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    ridge_lambda: Float[Array, "B T N"],
    seen: Visibility,
    cotangent: Float[Array, "B T N Dv"],
    options: Options,
) -> tuple[Array, Array, Array, Array]:
    """The gradient of ``attention`` written out: ``(dquery, dkey, dvalue, dridge_lambda)``, shaped as the inputs.

    Dense, in the centred form (docs/design.md), with both solves by ``jnp.linalg.solve``. It equals ``jax.grad``
    of ``attention`` and is what the blockwise path and the kernels compute without a dense array.
    """
    q, k, v, lam = _canonical(query, key, value, ridge_lambda, seen)
    if not seen.complete:
        cotangent = jnp.where(seeing_queries(seen, key.shape[1])[..., None], cotangent, 0)
    g = jnp.moveaxis(cotangent, 2, 1).astype(q.dtype)
    w, _, total, _ = _weights(q, k, seen, options)
    p = w / total[..., None]

    def einsum(subscripts: str, *operands: Array) -> Array:
        return jnp.einsum(subscripts, *operands, precision="highest")

    kc, a_matrix, kbar = _regression(p, k, lam)
    m = kbar - q
    x = jnp.linalg.solve(a_matrix, m[..., None])[..., 0]
    a = 1 - einsum("bntsd,bntd->bnts", kc, x)
    g = g * _damping(total, m, x, options)[..., None]

    gamma = einsum("bntd,bnsd->bnts", g, v)
    gamma = gamma - jnp.sum(p * gamma, axis=-1, keepdims=True)
    y = einsum("bnts,bntsd->bntd", p * gamma, kc)
    u = jnp.linalg.solve(a_matrix, y[..., None])[..., 0]
    b = gamma - einsum("bntsd,bntd->bnts", kc, u)
    ux = jnp.sum(u * x, axis=-1)
    ds = p * (a * b + (lam * ux)[..., None])

    dq = options.qk_scale * einsum("bnts,bnsd->bntd", ds, k) + u
    dk = (
        options.qk_scale * einsum("bnts,bntd->bnsd", ds, q)
        - einsum("bnts,bntd->bnsd", p * b, x)
        - einsum("bnts,bntd->bnsd", p * a, u)
    )
    dv = einsum("bnts,bntd->bnsd", p * a, g)

    def sum_group(d: Array, like: Array) -> Array:
        """(B, N, S, .) -> (B, S, K, .): the query heads that share a key/value head are summed."""
        batch, _, length, width = d.shape
        d = d.reshape(batch, like.shape[2], -1, length, width).sum(axis=2)
        return jnp.moveaxis(d, 1, 2).astype(like.dtype)

    return (
        jnp.moveaxis(dq, 1, 2).astype(query.dtype),
        sum_group(dk, key),
        sum_group(dv, value),
        jnp.moveaxis(ux, 1, 2).astype(ridge_lambda.dtype),
    )
