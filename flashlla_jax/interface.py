"""The arguments and the results of every implementation.

An implementation works on the canonical layout: query ``(B, T, N, D)``, key ``(B, S, K, D)``, value ``(B, S, K, Dv)``,
with K dividing N, the method's own array, and a ``Visibility`` that says which keys a query sees. Local Linear
Attention's own array is ridge_lambda ``(B, T, N)`` in the accumulation dtype, Parallax's is the probe
``(B, T, N, D)``. A query that sees none has output zero and no gradient. ``arguments.py`` has checked all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class SolverOptions:
    """How the conjugate-gradient solves run; ``lla_attention`` has these names with ``cg_`` before them.

    Attributes:
        atol: floor of the scale that the tolerance multiplies; None for 0.
        rtol: relative tolerance of the squared residual; None for a stop on the error of x instead.
        max_iters: the most steps of a solve.
        use_preconditioner: whether to precondition with the diagonal of A (Jacobi).
    """

    atol: float | None
    rtol: float | None
    max_iters: int
    use_preconditioner: bool


@dataclass(frozen=True)
class Options:
    """The static options of one call; hashable, since they are part of the trace."""

    qk_scale: float
    delta_eps: float
    solver: SolverOptions
    precision: jax.lax.Precision


@dataclass(frozen=True)
class ParallaxOptions:
    """The static options of one call of Parallax. The type of the options says which method is called."""

    qk_scale: float
    precision: jax.lax.Precision


class Residuals(NamedTuple):
    """How the solves of a call went: one number per query and head, constants under differentiation.

    The arrays have shape ``(B, S)`` for rank-3 inputs and ``(B, T, N)`` for rank-4 inputs. Floating ones are float32
    (float64 for float64 inputs).

    Attributes:
        omega: ``sum_j exp(qk_scale q.k_j - max_j)`` over the visible keys, the normaliser that ``flashlla`` returns.
        logsumexp: ``log sum_j exp(qk_scale q.k_j)``, natural logarithm; -inf for a query that sees no key.
        iterations: int32, conjugate-gradient steps that this query's solve took (0 for the dense reference).
        residual_norm: Euclidean norm of ``m - A x`` at the end of the solve, as the solver tracks it.
        relative_error: ``sqrt(|m - A x|^2 / (lambda x.A x))``, a bound on the relative error of x in the norm of A,
            which is the error that the output sees (docs/design.md, "When a solve stops"). 0 if there is nothing to
            solve.
        converged: bool, whether the stop was reached. False if ``cg_max_iters`` ended the solve, or rounding did.
    """

    omega: jax.Array
    logsumexp: jax.Array
    iterations: jax.Array
    residual_norm: jax.Array
    relative_error: jax.Array
    converged: jax.Array


class ParallaxResiduals(NamedTuple):
    """The statistics of Parallax's forward pass; shapes, dtypes and meaning as in :class:`Residuals`.

    Attributes:
        omega: ``sum_j exp(qk_scale q.k_j - max_j)`` over the visible keys.
        logsumexp: ``log sum_j exp(qk_scale q.k_j)``, natural logarithm; -inf for a query that sees no key.
    """

    omega: jax.Array
    logsumexp: jax.Array


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


# Beyond this the solution of (A + lambda I) x = m is below the rounding of 1 - kc.x, and lambda |p|^2 might overflow;
# a larger (or infinite) ridge gives the same result as this one: softmax attention.
LARGEST_RIDGE = 1e15


def usable_ridge(ridge_lambda: jax.Array) -> jax.Array:
    """The ridge that an iterative solve works with: NaN where it is not positive, and finite where it is infinite."""
    return jnp.minimum(jnp.where(ridge_lambda > 0, ridge_lambda, jnp.nan), LARGEST_RIDGE)
