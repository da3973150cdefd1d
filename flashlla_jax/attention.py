"""``lla_attention``: check the arguments, bring them to one layout, choose an implementation."""

from __future__ import annotations

import importlib
import math
import numbers
import operator
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax import blockwise, dispatch, reference
from flashlla_jax.interface import Options, Residuals, accumulation_dtype
from flashlla_jax.kernels import attention as kernels
from flashlla_jax.mask import canonical_mask
from flashlla_jax.sharding import by_shard

Implementation = Literal["triton", "xla", "reference"]

Query = Float[Array, "B S D"] | Float[Array, "B T N H"]
Key = Float[Array, "B S D"] | Float[Array, "B S K H"]
Value = Float[Array, "B S Dv"] | Float[Array, "B S K Hv"]
Output = Float[Array, "B S Dv"] | Float[Array, "B T N Hv"]
Ridge = float | Float[Array, "..."]
Mask = Bool[Array, "#B #T #S"] | Bool[Array, "#B #N #T #S"]

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_AXES = {3: "(B, S, D)", 4: "(B, T, N, H)"}


@overload
def lla_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = ...,
    ridge_lambda: Ridge = ...,
    qk_scale: float | None = ...,
    is_causal: bool = ...,
    key_value_seq_lengths: Int[Array, " B"] | None = ...,
    delta_eps: float = ...,
    cg_atol: float | None = ...,
    cg_rtol: float | None = ...,
    cg_max_iters: int | None = ...,
    cg_use_preconditioner: bool = ...,
    precision: lax.PrecisionLike = ...,
    implementation: Implementation | None = ...,
    return_residuals: Literal[False] = ...,
) -> Output: ...


@overload
def lla_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = ...,
    ridge_lambda: Ridge = ...,
    qk_scale: float | None = ...,
    is_causal: bool = ...,
    key_value_seq_lengths: Int[Array, " B"] | None = ...,
    delta_eps: float = ...,
    cg_atol: float | None = ...,
    cg_rtol: float | None = ...,
    cg_max_iters: int | None = ...,
    cg_use_preconditioner: bool = ...,
    precision: lax.PrecisionLike = ...,
    implementation: Implementation | None = ...,
    return_residuals: Literal[True],
) -> tuple[Output, Residuals]: ...


def lla_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = None,
    ridge_lambda: Ridge = 10.0,
    qk_scale: float | None = None,
    is_causal: bool = True,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    delta_eps: float = 1e-12,
    cg_atol: float | None = None,
    cg_rtol: float | None = None,
    cg_max_iters: int | None = None,
    cg_use_preconditioner: bool = False,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
) -> Output | tuple[Output, Residuals]:
    r"""Local Linear Attention (Zuo et al., ICLR 2026, arXiv 2510.01450).

    Fits, at every query, a ridge-regularised linear regression of the values on the keys, weighted by the softmax
    attention weights :math:`p_{ij}`, and returns its prediction at the query. In the centred form (design of this
    package, equal to the paper's equation):

    .. math::
        \bar k_i = \sum_j p_{ij} k_j, \quad
        A_i = \sum_j p_{ij} (k_j - \bar k_i)(k_j - \bar k_i)^T + \lambda_i I, \quad
        x_i = A_i^{-1} (\bar k_i - q_i), \quad
        o_i = \sum_j p_{ij} (1 - (k_j - \bar k_i) \cdot x_i) v_j

    ``ridge_lambda`` to infinity is softmax attention; ``qk_scale = 0`` is ridge regression with an intercept over the
    visible keys (MesaNet's limit).

    Differentiable in ``query``, ``key``, ``value`` and ``ridge_lambda``, in reverse mode; a second time too, but by
    Triton. Works under ``jax.jit``, ``jax.vmap``, ``jax.checkpoint``, ``jax.lax.scan`` and ``jax.shard_map``. On a mesh
    with explicit axes, or with automatic ones under ``jax.jit``, the arrays may be sharded along the batch and the
    heads; each device computes its own.

    Args:
        query: ``(B, S, D)``, or ``(B, T, N, H)`` with N heads. bfloat16, float16, float32 or float64.
        key: ``(B, S, D)``, or ``(B, S, K, H)`` with K dividing N: each key/value head serves N / K query heads.
        value: ``(B, S, Dv)``, or ``(B, S, K, Hv)``. The last dimension may differ from the key's.
        mask: Boolean, True where a key is visible: ``(B, T, S)``, or ``(B, N, T, S)`` for rank-4 inputs, with 1 in
            place of any axis. A query sees what the mask, ``is_causal`` and ``key_value_seq_lengths`` all allow; one
            that sees no key has output zero and no gradient. Keys that no query sees count for nothing, even where
            they hold NaN. Memory is the mask's own and a block's. Not for ``"triton"``.
        ridge_lambda: The ridge, > 0: a number, or an array that broadcasts to ``(B, S)`` or ``(B, T, N)`` by NumPy's
            rules (so ``(N,)`` is one per head, ``(B, T, 1)`` one per token). It is in units of the squared key and is
            multiplied by omega as in the PyTorch package ``flashlla``. Numbers and NumPy arrays are checked here;
            where a traced or device array is not positive the output row is NaN.
        qk_scale: Factor of the logits, a Python number; None for 1 / sqrt(key dimension).
        is_causal: Whether query i sees only the keys up to its own position. With more keys than queries the two are
            aligned at the end: the last query sees every key. More queries than keys are refused.
        key_value_seq_lengths: ``(B,)``, integers from 0 to S: how many leading keys of each batch entry there are, the
            rest being padding. A mask, in O(S) memory; the alignment of ``is_causal`` is still that of the arrays.
        delta_eps: Added, with its sign, to the denominator of the paper's equation, as in ``flashlla``; a constant
            under differentiation. >= 0.
        cg_atol: Floor of the squared right-hand side in the stop below. >= 0; None for 0, a purely relative stop.
        cg_rtol: A query's conjugate-gradient solve stops when ``|r|^2 <= cg_rtol * max(cg_atol, |r0|^2)``. >= 0; None
            for the value that fits the dtype and ``precision`` (see README, Numerics). Below eps^4, 2e-28 for float32,
            it counts as that: no x gets better, and rounding would lead the steps astray.
        cg_max_iters: Most steps of a solve, >= 1; None for ``max(32, 4 D)``, a net under the stop.
        cg_use_preconditioner: Whether to precondition the solves with the diagonal of A (Jacobi).
        precision: None, a ``jax.lax.Precision`` or its name; of a pair the higher one counts, and a
            ``jax.lax.DotAlgorithmPreset`` stands for the one that it comes nearest. None is JAX's
            ``jax_default_matmul_precision`` where that is set, else DEFAULT.
        implementation: ``"triton"`` (fused kernels, NVIDIA GPU of compute capability 8.0 or more), ``"xla"`` (any
            platform, O(S D) memory), ``"reference"`` (dense, for tests), or None for the best that runs: Triton where
            it can serve the call, XLA elsewhere and with a mask. A named one is used or refused, never replaced.
        return_residuals: Whether to return ``(o, residuals)``, residuals being a
            :class:`~flashlla_jax.Residuals` (omega, logsumexp, iterations, residual_norm) of constants.

    Returns:
        The output in the query's dtype, ``(B, S, Dv)`` or ``(B, T, N, Hv)``; with ``return_residuals`` the pair.

    Raises:
        TypeError: An argument has the wrong type or dtype, or the dtypes of query, key and value differ.
        ValueError: A shape does not fit, or a number is out of range.
        NotImplementedError: The named implementation cannot serve this call here, or an array is sharded along its
            length or its last axis, or the key/value heads do not divide among the devices.
    """
    is_causal = check_flag("is_causal", is_causal)
    return_residuals = check_flag("return_residuals", return_residuals)
    query, key, value = _check_arrays(query, key, value, is_causal)
    dim = query.shape[-1]
    ridge_lambda = _check_ridge(ridge_lambda, query)
    options = Options(
        is_causal=is_causal,
        qk_scale=dim**-0.5 if qk_scale is None else _check_number("qk_scale", qk_scale, minimum=-math.inf),
        delta_eps=_check_number("delta_eps", delta_eps),
        cg_atol=None if cg_atol is None else _check_number("cg_atol", cg_atol),
        cg_rtol=None if cg_rtol is None else max(_check_number("cg_rtol", cg_rtol), _least_rtol(query)),
        cg_max_iters=_default_max_iters(query) if cg_max_iters is None else check_count("cg_max_iters", cg_max_iters),
        cg_use_preconditioner=check_flag("cg_use_preconditioner", cg_use_preconditioner),
        precision=_check_precision(precision),
    )
    visible = canonical_mask(mask, key_value_seq_lengths, query, key)
    attend = _implementation(implementation, query, value, visible is not None)

    one_head = query.ndim == 3
    if one_head:
        query, key, value, ridge_lambda = (x[:, :, None] for x in (query, key, value, ridge_lambda))
    o, residuals = by_shard(attend)(query, key, value, ridge_lambda, options, visible)
    if one_head:
        o, residuals = jax.tree.map(lambda x: x[:, :, 0], (o, residuals))
    return (o, lax.stop_gradient(residuals)) if return_residuals else o


def lla_attention_and_omega(
    query: Query,
    key: Key,
    value: Value,
    ridge_lambda: Ridge,
    qk_scale: float | None = None,
    delta_eps: float = 1e-12,
    cg_atol: float | None = None,
    cg_rtol: float | None = None,
    cg_max_iters: int | None = None,
    cg_use_preconditioner: bool = False,
    *,
    mask: Mask | None = None,
    is_causal: bool = True,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> tuple[Output, Array]:
    """The explicit form, ``flashlla``'s ``LLAFunction.apply`` with its argument order: ``(o, omega)``.

    The arguments are those of :func:`lla_attention`, and so are the errors. omega is the softmax normaliser
    ``sum_j exp(qk_scale q.k_j - max_j)``, shape ``(B, S)`` or ``(B, T, N)``, float32 (float64 for float64 inputs); it
    is a constant under differentiation, as it is in ``flashlla``.
    """
    o, residuals = lla_attention(
        query,
        key,
        value,
        mask=mask,
        ridge_lambda=ridge_lambda,
        qk_scale=qk_scale,
        is_causal=is_causal,
        key_value_seq_lengths=key_value_seq_lengths,
        delta_eps=delta_eps,
        cg_atol=cg_atol,
        cg_rtol=cg_rtol,
        cg_max_iters=cg_max_iters,
        cg_use_preconditioner=cg_use_preconditioner,
        precision=precision,
        implementation=implementation,
        return_residuals=True,
    )
    return o, residuals.omega


def default_implementation() -> Implementation:
    """What ``implementation=None`` stands for on JAX's default device: ``"triton"`` or ``"xla"``.

    Calls that the Triton kernels cannot serve (float64, a head dimension over 256) are XLA's wherever they run, and so
    is a program that was traced beside a GPU and is lowered for another platform.
    """
    return "xla" if _no_triton() else "triton"


@cache
def _no_triton() -> str | None:
    """Why the Triton kernels cannot run on JAX's default backend, or None."""
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:
        return f"jax-triton cannot be imported ({' '.join(str(error).split())})"
    device = jax.devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind.upper():
        return f"it needs an NVIDIA GPU, JAX's default device is {device.device_kind} ({device.platform})"
    capability = getattr(device, "compute_capability", "0")
    if float(capability) < 8.0:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, this one has {capability}"
    return None


def check_implementation(name: Any) -> None:
    if name is not None and name not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation must be one of {allowed} or None, got {name!r}")


def _implementation(name: str | None, query: Array, value: Array, masked: bool) -> Callable[..., Any]:
    check_implementation(name)
    if name is None:
        served = not (masked or _no_triton() or kernels.refusal(query, value))
        return dispatch.attention if served else blockwise.attention
    if name == "xla":
        return blockwise.attention
    if name == "reference":
        return reference.attention
    reason = "it takes no mask" if masked else kernels.refusal(query, value) or _no_triton()
    if reason:
        raise NotImplementedError(
            f'implementation="triton" cannot serve this call: {reason}. '
            'implementation="xla" runs on every platform, and None picks the best that runs'
        )
    return kernels.attention


def _check_arrays(query: Any, key: Any, value: Any, is_causal: bool) -> tuple[Array, Array, Array]:
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if str(x.dtype) not in _DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; allowed are {', '.join(_DTYPES)}")
        if x.ndim not in _AXES:
            raise ValueError(
                f"{name} must have rank 3, {_AXES[3]}, or rank 4, {_AXES[4]}, got shape {x.shape}; "
                "use jax.vmap for more axes"
            )
    shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
    if len({x.ndim for x in arrays.values()}) > 1:
        raise ValueError(f"query, key and value must have the same rank, got {shapes}")
    if len({str(x.dtype) for x in arrays.values()}) > 1:
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in arrays.items())
        raise TypeError(f"query, key and value must have the same dtype, got {dtypes}")
    for name, x in arrays.items():
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must not be empty in its length, heads or dimension, got shape {x.shape}")

    if len({x.shape[0] for x in arrays.values()}) > 1:
        raise ValueError(f"query, key and value must have the same batch size (first axis), got {shapes}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value must have the same length (second axis), got {shapes}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"query and key must have the same head dimension (last axis), got {shapes}")
    if query.ndim == 4:
        if key.shape[2] != value.shape[2]:
            raise ValueError(f"key and value must have the same number of heads (third axis), got {shapes}")
        if query.shape[2] % key.shape[2]:
            raise ValueError(
                f"the key/value heads (third axis) must divide the query heads, got {key.shape[2]} for "
                f"{query.shape[2]}: {shapes}"
            )
    if is_causal and query.shape[1] > key.shape[1]:
        raise ValueError(
            f"is_causal=True needs at least as many keys as queries (they are aligned at the end), got {shapes}; "
            "pass is_causal=False for attention over all keys"
        )
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)


def _check_ridge(ridge_lambda: Any, query: Array) -> Array:
    """The ridge in the accumulation dtype, broadcast to one number per query and head."""
    dtype = accumulation_dtype(query.dtype)
    number = _is_number(ridge_lambda)
    if not number and not (hasattr(ridge_lambda, "shape") and hasattr(ridge_lambda, "dtype")):
        raise TypeError(f"ridge_lambda must be a real number or an array, got {type(ridge_lambda).__name__}")
    if not number and str(ridge_lambda.dtype) not in _DTYPES and not jnp.issubdtype(ridge_lambda.dtype, jnp.integer):
        raise TypeError(f"ridge_lambda must be real, {', '.join(_DTYPES)} or integer, got dtype {ridge_lambda.dtype}")
    # what is known now is checked now, in the dtype that it is used in, where a tiny number may be 0
    if number:
        ridge_lambda = _as_float("ridge_lambda", ridge_lambda)
    known = None
    if number or isinstance(ridge_lambda, np.ndarray | np.generic):
        with np.errstate(over="ignore"):  # beyond float32's range is infinite: softmax attention
            known = np.asarray(ridge_lambda).astype(dtype)
    if known is not None and not np.all(known > 0):
        what = "an array whose minimum is " if known.ndim else ""
        given: Any = np.asarray(ridge_lambda)
        raise ValueError(f"ridge_lambda must be > 0 (in {dtype.name}), got {what}{given.min()}")
    target = query.shape[:-1]
    axes = "(B, S)" if query.ndim == 3 else "(B, T, N)"
    shape = np.shape(ridge_lambda)
    try:
        broadcast = jnp.broadcast_shapes(shape, target)  # knows symbolic sizes (jax.export)
    except ValueError:
        broadcast = None
    if broadcast != target:
        raise ValueError(
            f"ridge_lambda of shape {shape} does not broadcast to {axes} = {target}"
            + (f"; a ridge per token has shape {(*shape, 1)}" if shape == target[:2] and query.ndim == 4 else "")
        )
    return jnp.broadcast_to(jnp.asarray(ridge_lambda if known is None else known).astype(dtype), target)


def _default_max_iters(query: Array) -> int:
    """In exact arithmetic D steps are enough. Rounding costs more: up to 3 D were seen in float64, more than 2 D in
    bfloat16 (peaky keys, ridge 0.01)."""
    return max(32, 4 * query.shape[-1])


def _least_rtol(query: Array) -> float:
    """|r| = eps^2 |r0|: x has long been as good as it gets, and of what is left the solver would make steps astray."""
    return float(jnp.finfo(accumulation_dtype(query.dtype)).eps) ** 4


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _as_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float") from None


def _check_number(name: str, value: Any, minimum: float = 0.0) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} must be a Python number, known at trace time, got {type(value).__name__}")
    value = _as_float(name, value)
    if not (math.isfinite(value) and value >= minimum):
        allowed = "finite" if minimum == -math.inf else f"finite and >= {minimum:g}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return value


def check_count(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or None, got {value!r}")
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {count}")
    if count >= 2**31:  # steps are counted in int32
        raise ValueError(f"{name} must be < 2**31, got {count}")
    return count


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _check_precision(precision: Any) -> lax.Precision:
    source = "precision"
    if precision is None:
        source = "jax_default_matmul_precision"
        precision = getattr(jax.config, source)
        if precision is None:
            return lax.Precision.DEFAULT
    try:
        if isinstance(precision, tuple):  # of the two operands
            return max((_named_precision(p) for p in precision), key=lambda p: p.value)
        return _named_precision(precision)
    except (ValueError, TypeError):
        names = ", ".join(repr(p.name.lower()) for p in lax.Precision)
        raise ValueError(
            f"{source} must be None, a jax.lax.Precision or one of {names}, a pair of these or a "
            f"jax.lax.DotAlgorithmPreset, got {precision!r}"
        ) from None


def _named_precision(name: Any) -> lax.Precision:
    """Of a ``jax.lax.Precision``, its name or alias, or the one that a ``jax.lax.DotAlgorithmPreset`` comes nearest."""
    if isinstance(name, str) and name in lax.DotAlgorithmPreset.__members__:
        name = lax.DotAlgorithmPreset[name]
    if not isinstance(name, lax.DotAlgorithmPreset):
        return lax.Precision(name)
    if name.name.endswith(("_X6", "_X9")) or name.name in ("F32_F32_F32", "F64_F64_F64"):
        return lax.Precision.HIGHEST
    return lax.Precision.HIGH if name.name.endswith("_X3") else lax.Precision.DEFAULT
