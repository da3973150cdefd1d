"""The Triton implementation: kernels behind ``jax.custom_vjp``, batched by folding into the batch axis."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from flashlla_jax.interface import Options, Residuals, differentiable, usable_ridge
from flashlla_jax.kernels import launch as launching
from flashlla_jax.sharding import divisible

_LOG2_E = math.log2(math.e)
_LARGEST_DIM = 256


class _Arithmetic(NamedTuple):
    """How products are computed, by dtype and precision."""

    upcast: bool  # tiles to float32 after loading
    precision: str  # of a float32 product
    halves: bool  # x and u as hi + lo
    split_below: float  # the matvec's weights as hi + lo where lambda < split_below * (variance of a key's feature)
    low_above: float  # the low half of x is used where it moves kc.x by more than this
    careful_above: float  # what the halves leave of x is, too, and the output's weights made to sum to 1
    forward_rtol: float
    backward_rtol: float
    finish: bool  # whether these stops count on a last step that takes no product, see kernels/solver.py


def _arithmetic(dtype: jnp.dtype, precision: lax.Precision) -> _Arithmetic:
    if dtype == jnp.bfloat16 and precision != lax.Precision.HIGHEST:
        if precision == lax.Precision.HIGH:
            return _Arithmetic(False, "tf32", True, math.inf, 0.0, 1e-4, 1e-8, 1e-11, True)
        return _Arithmetic(False, "tf32", True, 0.05, 1e-3, math.inf, 4e-6, 1e-6, True)
    if precision == lax.Precision.DEFAULT:
        return _Arithmetic(True, "tf32", True, 0.0, 0.0, math.inf, 1e-7, 1e-7, False)
    name, rtol = ("tf32x3", 1e-12) if precision == lax.Precision.HIGH else ("ieee", 1e-13)
    return _Arithmetic(True, name, False, 0.0, 0.0, math.inf, rtol, rtol, False)


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


class _Problem(NamedTuple):
    """The static side of one call, and what the kernels share of it."""

    shape: tuple[int, int, int, int, int, int, int]  # B, T, S, N, K, D, Dv
    dtype: jnp.dtype
    options: Options

    @classmethod
    def of(cls, query: Array, key: Array, value: Array, options: Options) -> _Problem:
        batch, T, heads, dim = query.shape
        _, S, kv_heads, value_dim = value.shape
        return cls((batch, T, S, heads, kv_heads, dim, value_dim), query.dtype, options)

    @property
    def arithmetic(self) -> _Arithmetic:
        return _arithmetic(self.dtype, self.options.precision)

    @property
    def exact(self) -> bool:
        """Whether products keep all of float32, so that the solves' defects are worth keeping."""
        return self.arithmetic.upcast and self.arithmetic.precision != "tf32"

    @property
    def wide(self) -> jnp.dtype:
        """The dtype of x and u in memory: that of the products' operands."""
        return jnp.dtype(jnp.float32) if self.arithmetic.upcast else self.dtype

    def launch(self, kernel: str) -> launching.Launch:
        *_, dim, value_dim = self.shape
        widest = max(_padded(dim), _padded(value_dim))
        return launching.launch(kernel, self.wide.itemsize, widest, launching.capability())

    def constants(self) -> dict[str, Any]:
        *_, heads, kv_heads, dim, value_dim = self.shape
        return {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "D": dim,
            "DV": value_dim,
            "DP": _padded(dim),
            "DVP": _padded(value_dim),
            "CAUSAL": self.options.is_causal,
            "SCALE": self.options.qk_scale * _LOG2_E,
            "HALVES": self.arithmetic.halves,
            "PRECISION": self.arithmetic.precision,
            "UPCAST": self.arithmetic.upcast,
        }

    def solver_constants(self, rtol: float) -> dict[str, Any]:
        options = self.options
        return {
            "RTOL": rtol if options.cg_rtol is None else options.cg_rtol,
            "ATOL": 0.0 if options.cg_atol is None else options.cg_atol,
            "MAX_ITERS": options.cg_max_iters,
            "PRECONDITION": options.cg_use_preconditioner,
            # a stop that was asked for is kept to
            "FINISH": self.arithmetic.finish and options.cg_rtol is None,
            "SPLIT_BELOW": self.arithmetic.split_below,
        }

    def low_halves(self, length: int, heads: int, dim: int) -> tuple[int, ...]:
        """The shape of a low half: one element where there is none."""
        return (self.shape[0], length, heads, dim) if self.arithmetic.halves else (self.shape[0], 1, 1, 1)


def _out(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


class _Saved(NamedTuple):
    """What the backward pass needs beside the inputs."""

    x_hi: Array  # -x, and what rounding it left
    x_lo: Array
    lse: Array  # log2 of the softmax normaliser, of the keys relative to their origin (kernels/tiles.py)
    defect: Array  # of x, see kernels/solver.py
    damping: Array


def _forward(query: Array, key: Array, value: Array, lam: Array, options: Options) -> tuple[Array, _Saved, Residuals]:
    problem = _Problem.of(query, key, value, options)
    batch, T, S, heads, _, dim, value_dim = problem.shape
    shape = problem.launch("forward")
    from flashlla_jax.kernels.forward import forward_kernel

    row = _out((batch, T, heads), jnp.float32)
    o, x_hi, x_lo, lse, defect, damping, omega, logsumexp, iterations, residual_norm = launching.call(
        forward_kernel,
        -(-T // shape.BM) * batch * heads,
        (query, key, value, lam),
        (T, S),
        (
            _out((batch, T, heads, value_dim), query.dtype),
            _out((batch, T, heads, dim), problem.wide),
            _out(problem.low_halves(T, heads, dim), problem.wide),
            row,
            row if problem.exact else _out((batch, 1, 1), jnp.float32),
            row,
            row,
            row,
            _out((batch, T, heads), jnp.int32),
            row,
        ),
        shape,
        {
            **problem.constants(),
            **problem.solver_constants(problem.arithmetic.forward_rtol),
            "DELTA_EPS": options.delta_eps,
            "LOW_ABOVE": problem.arithmetic.low_above,
            "CAREFUL_ABOVE": problem.arithmetic.careful_above,
        },
    )
    residuals = Residuals(omega, logsumexp, iterations, residual_norm)
    return o, _Saved(x_hi, x_lo, lse, defect, damping), residuals


def _backward(
    query: Array, key: Array, value: Array, lam: Array, saved: _Saved, g: Array, options: Options
) -> tuple[Array, Array, Array, Array]:
    problem = _Problem.of(query, key, value, options)
    batch, T, S, heads, kv_heads, dim, _ = problem.shape
    from flashlla_jax.kernels.backward import key_kernel, query_kernel

    row = _out((batch, T, heads), jnp.float32)
    shape = problem.launch("query")
    tiles = -(-T // shape.BM)
    pairs = _out((batch, heads, tiles * shape.BM, 2), jnp.float32)
    dq, dlam, u_hi, u_lo, lse_a0, b0_c0, low = launching.call(
        query_kernel,
        tiles * batch * heads,
        (query, key, value, lam, *saved, g),
        (T, S),
        (
            _out(query.shape, query.dtype),
            row,
            _out((batch, T, heads, dim), problem.wide),
            _out(problem.low_halves(T, heads, dim), problem.wide),
            pairs,
            pairs,
            _out((batch, T, heads), jnp.int32),
        ),
        shape,
        {
            **problem.constants(),
            **problem.solver_constants(problem.arithmetic.backward_rtol),
            "QK_SCALE": options.qk_scale,
        },
    )
    query_rows = shape.BM
    shape = problem.launch("key")
    dk, dv = launching.call(
        key_kernel,
        -(-S // shape.BN) * batch * kv_heads,
        (query, key, value, saved.x_hi, saved.x_lo, u_hi, u_lo, g, lse_a0, b0_c0, low),
        (T, S),
        (_out(key.shape, key.dtype), _out(value.shape, value.dtype)),
        shape,
        {**problem.constants(), "QK_SCALE": options.qk_scale, "QUERY_BM": query_rows, "FLAGS": 1024},
    )
    return dq, dk, dv, dlam


def _folding(f: Any) -> Any:
    """``f`` of arrays with a leading batch axis, made vmappable by folding the new axis into that one."""
    folded = jax.custom_batching.custom_vmap(f)

    @folded.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        batch = args[0].shape[1 if in_batched[0] else 0]

        def fold(x: Array, batched: bool) -> Array:
            x = x if batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        def unfold(x: Array) -> Array:
            return x.reshape(axis_size, batch, *x.shape[1:])

        out = folded(*jax.tree.map(fold, args, tuple(in_batched)))
        out = jax.tree.map(unfold, out)
        return out, jax.tree.map(lambda _: True, out)

    return folded


@cache
def _vmappable_forward(options: Options) -> Any:
    return _folding(divisible(partial(_forward, options=options)))


@cache
def _vmappable_backward(options: Options) -> Any:
    return _folding(divisible(partial(_backward, options=options)))


def forget_traces() -> None:
    """For tests and benchmarks, which replace what JAX's traces do not depend on: launches, arithmetic, the GPU."""
    jax.clear_caches()
    _vmappable_forward.cache_clear()
    _vmappable_backward.cache_clear()


def forward(
    query: Array, key: Array, value: Array, ridge_lambda: Array, options: Options
) -> tuple[tuple[Array, Residuals], _Saved]:
    """``((o, residuals), saved)``: the forward pass of the canonical call, and what ``backward`` needs of it."""
    o, saved, residuals = _vmappable_forward(options)(query, key, value, usable_ridge(ridge_lambda))
    return (o, residuals), saved


def backward(
    query: Array, key: Array, value: Array, ridge_lambda: Array, saved: _Saved, g: Array, options: Options
) -> tuple[Array, Array, Array, Array]:
    """``(dquery, dkey, dvalue, dridge_lambda)`` for the cotangent g of the output."""
    return _vmappable_backward(options)(query, key, value, usable_ridge(ridge_lambda), saved, g)


def refusal(query: Array, value: Array) -> str | None:
    """Why these kernels cannot serve this call, or None."""
    if query.dtype == jnp.float64:
        return "it does not compute in float64"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > _LARGEST_DIM:
        return f"its head dimension is at most {_LARGEST_DIM}, got {widest}"
    return None


# Local Linear Attention by fused Triton kernels, with its exact gradient.
attention = differentiable(forward, backward)
