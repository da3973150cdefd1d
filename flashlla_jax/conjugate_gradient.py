"""Conjugate gradients on many small symmetric positive definite systems at once, one per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Solution(NamedTuple):
    """The result of ``solve``, row by row.

    Attributes:
        x: the solution.
        iterations: int32, the steps that the row took part in.
        residual_norm: ``|rhs - A x|`` as the recurrence tracks it.
        error: ``sqrt(|rhs - A x|^2 / (ridge x.A x))``, a bound on the relative error of x in the norm of A.
        converged: whether the stop was reached.
    """

    x: Float[Array, "*rows D"]
    iterations: Int[Array, "*rows"]
    residual_norm: Float[Array, "*rows"]
    error: Float[Array, "*rows"]
    converged: Bool[Array, "*rows"]


class Stop(NamedTuple):
    """When a row has converged: ``|r|^2 <= rtol * max(atol, scale)``.

    The scale is ``ridge * x.A x``, or ``|rhs|^2`` if ``of_rhs``. No eigenvalue of A is below the ridge, so
    ``|r|^2 / ridge`` bounds the square of x's error in the norm of A (docs/design.md, "When a solve stops").
    """

    rtol: float
    atol: float
    of_rhs: bool
    max_iters: int


class _State(NamedTuple):
    step: Int[Array, ""]
    live: Bool[Array, "*rows"]
    x: Float[Array, "*rows D"]
    r: Float[Array, "*rows D"]
    p: Float[Array, "*rows D"]
    rz: Float[Array, "*rows"]
    energy: Float[Array, "*rows"]
    iterations: Int[Array, "*rows"]


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=-1)


def solve(
    matvec: Callable[[Array], Array],
    rhs: Float[Array, "*rows D"],
    ridge: Float[Array, "*rows"],
    stop: Stop,
    inverse_diagonal: Float[Array, "*rows D"] | None = None,
) -> Solution:
    """Solves ``A_i x_i = rhs_i`` from zero; the loop ends when every row has converged.

    The derivative in forward mode is the implicit one, another solve: A dx = d(rhs) - dA x.

    A row that has converged is left alone while others go on, so a row's result does not depend on the rows beside it.
    A row whose search direction has no positive curvature (a NaN, or a system that rounding has made indefinite) stops
    where it is. So does one that has stagnated: a step adds less to x.A x than the dtype keeps of x.

    Args:
        matvec: ``p -> A p`` for all rows.
        rhs: right-hand sides.
        ridge: a lower bound of A's eigenvalues.
        stop: when a row has converged.
        inverse_diagonal: 1 / diag(A) for the Jacobi preconditioner; None for none.
    """

    def iterate(matvec: Callable[[Array], Array], rhs: Array) -> tuple[Array, tuple[Array, ...]]:
        scale = _power_of_two(rhs)
        floor = stop.atol / scale[..., 0] / scale[..., 0]
        solution = _iterate(matvec, rhs / scale, ridge, stop, floor, inverse_diagonal)
        x, *aux = solution._replace(x=solution.x * scale, residual_norm=solution.residual_norm * scale[..., 0])
        return x, tuple(aux)

    # its type in JAX 0.12 is that of a call without aux
    solved: Any = lax.custom_linear_solve(matvec, rhs, iterate, symmetric=True, has_aux=True)
    x, aux = solved
    return Solution(x, *aux)


def _power_of_two(rhs: Array) -> Array:
    """(*rows, 1), about as large as a row. Divide the row by it, and squares keep all their digits.

    The gradient's right-hand side may be 1e-21, if a key has so little weight. Its square would underflow.
    """
    most = jnp.max(jnp.abs(rhs), axis=-1, keepdims=True)
    _, exponent = jnp.frexp(most)
    return jnp.where(jnp.isfinite(most) & (most > 0), jnp.ldexp(jnp.ones_like(most), exponent), 1)


def _iterate(
    matvec: Callable[[Array], Array],
    rhs: Array,
    ridge: Array,
    stop: Stop,
    atol: Array,
    inverse_diagonal: Array | None,
) -> Solution:
    """``solve`` without its derivative."""

    def precondition(r: Array) -> Array:
        return r if inverse_diagonal is None else r * inverse_diagonal

    rr = _dot(rhs, rhs)
    stagnation = (float(jnp.finfo(rhs.dtype).eps) / 4) ** 2

    def bound(energy: Array) -> Array:
        return stop.rtol * jnp.maximum(atol, rr if stop.of_rhs else ridge * energy)

    p = precondition(rhs)
    start = _State(
        step=jnp.zeros((), jnp.int32),
        live=rr > bound(jnp.zeros_like(rr)),
        x=jnp.zeros_like(rhs),
        r=rhs,
        p=p,
        rz=_dot(rhs, p),
        energy=jnp.zeros_like(rr),
        iterations=jnp.zeros_like(rr, dtype=jnp.int32),
    )

    def unfinished(state: _State) -> Array:
        return (state.step < stop.max_iters) & jnp.any(state.live)

    def advance(state: _State) -> _State:
        product = matvec(state.p)
        curvature = _dot(state.p, product)
        live = state.live & (curvature > 0)
        alpha = jnp.where(live, state.rz / jnp.where(live, curvature, 1), 0)
        # a row that is not live must not pick up 0 * NaN or 0 * inf from its matvec
        x = jnp.where(live[..., None], state.x + alpha[..., None] * state.p, state.x)
        r = jnp.where(live[..., None], state.r - alpha[..., None] * product, state.r)
        z = precondition(r)
        rz = jnp.where(live, _dot(r, z), state.rz)
        gain = alpha * state.rz
        energy = state.energy + gain
        beta = jnp.where(live, rz / jnp.where(live, state.rz, 1), 0)
        return _State(
            step=state.step + 1,
            live=live & (_dot(r, r) > bound(energy)) & (gain > stagnation * energy),
            x=x,
            r=r,
            p=z + beta[..., None] * state.p,
            rz=rz,
            energy=energy,
            iterations=state.iterations + live.astype(jnp.int32),
        )

    end = lax.while_loop(unfinished, advance, start)
    left = _dot(end.r, end.r)
    error = jnp.sqrt(left / jnp.where(end.energy > 0, ridge * end.energy, jnp.where(left > 0, left, 1)))
    return Solution(end.x, end.iterations, jnp.sqrt(left), error, left <= bound(end.energy))
