"""``lla_attention``: the signature, and the way from it to an implementation."""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax import operator, reference
from flashlla_jax.arguments import (
    Implementation,
    check_arrays,
    check_axis_name,
    check_flag,
    check_hiding,
    check_implementation,
    check_options,
    check_ridge,
    explains_names_from_elsewhere,
)
from flashlla_jax.context_parallel import Axes, gathered, local_visibility
from flashlla_jax.interface import Options, ParallaxOptions, Residuals
from flashlla_jax.kernels import plan as planning
from flashlla_jax.sharding import by_shard
from flashlla_jax.visibility import Hiding, visibility

_PACKAGE = str(Path(__file__).parent)

Query = Float[Array, "B T D"] | Float[Array, "B T N H"]
Key = Float[Array, "B S D"] | Float[Array, "B S K H"]
Value = Float[Array, "B S Dv"] | Float[Array, "B S K Hv"]
Output = Float[Array, "B T Dv"] | Float[Array, "B T N Hv"]
Ridge = float | Float[Array, "..."] | Int[Array, "..."]
Mask = Bool[Array, "#B #T #S"] | Bool[Array, "#B #N #T #S"]
Lengths = Int[Array, " B"]
AxisName = str | tuple[str, ...]
Segments = Int[Array, "B S"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]


@overload
def lla_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = ...,
    segment_ids: Segments | None = ...,
    query_seq_lengths: Lengths | None = ...,
    key_value_seq_lengths: Lengths | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = ...,
    ridge_lambda: Ridge = ...,
    qk_scale: float | None = ...,
    is_causal: bool = ...,
    delta_eps: float = ...,
    cg_atol: float | None = ...,
    cg_rtol: float | None = ...,
    cg_max_iters: int | None = ...,
    cg_use_preconditioner: bool = ...,
    precision: lax.PrecisionLike = ...,
    implementation: Implementation | None = ...,
    return_residuals: Literal[False] = ...,
    axis_name: AxisName | None = ...,
) -> Output: ...


@overload
def lla_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = ...,
    segment_ids: Segments | None = ...,
    query_seq_lengths: Lengths | None = ...,
    key_value_seq_lengths: Lengths | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = ...,
    ridge_lambda: Ridge = ...,
    qk_scale: float | None = ...,
    is_causal: bool = ...,
    delta_eps: float = ...,
    cg_atol: float | None = ...,
    cg_rtol: float | None = ...,
    cg_max_iters: int | None = ...,
    cg_use_preconditioner: bool = ...,
    precision: lax.PrecisionLike = ...,
    implementation: Implementation | None = ...,
    return_residuals: Literal[True],
    axis_name: AxisName | None = ...,
) -> tuple[Output, Residuals]: ...


@explains_names_from_elsewhere
def lla_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = None,
    segment_ids: Segments | None = None,
    query_seq_lengths: Lengths | None = None,
    key_value_seq_lengths: Lengths | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    ridge_lambda: Ridge = 10.0,
    qk_scale: float | None = None,
    is_causal: bool = True,
    delta_eps: float = 1e-12,
    cg_atol: float | None = None,
    cg_rtol: float | None = None,
    cg_max_iters: int | None = None,
    cg_use_preconditioner: bool = False,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
    axis_name: AxisName | None = None,
) -> Output | tuple[Output, Residuals]:
    """Local Linear Attention (Zuo et al., ICLR 2026, arXiv 2510.01450).

    Names, layouts and meanings are those of ``jax.nn.dot_product_attention`` if it has them, with these differences:
    causal by default; queries are aligned with the keys at the end (``query_offset``); the factor of the logits is
    ``qk_scale``; there is no bias; a query that sees no key has output zero.

    At every query the function fits a linear regression of the values on the keys, with a ridge. Each key counts with
    its softmax attention weight. The output is the prediction at the query. docs/api/arguments.md has the formula, and
    says more of each argument, of derivatives and of several devices.

    Example::

        o = lla_attention(q, k, v)  # (B, T, N, H), causal
        o = lla_attention(q, k, v, segment_ids=ids, local_window_size=(511, 0))

    Args:
        query: ``(B, T, D)``, or ``(B, T, N, H)`` with N heads. bfloat16, float16, float32 or float64.
        key: ``(B, S, D)``, or ``(B, S, K, H)`` with K dividing N: each key/value head serves N / K query heads.
        value: ``(B, S, Dv)``, or ``(B, S, K, Hv)``. The last dimension may differ from the key's.
        mask: Boolean, True where a key is visible: ``(B, T, S)`` or ``(B, N, T, S)``, with 1 in place of any axis.
        segment_ids: Integers ``(B, S)``, or a pair ``(B, T)``, ``(B, S)``. A query sees the keys of its own segment.
        query_seq_lengths: ``(B,)``: how many leading queries there are. The others see no key.
        key_value_seq_lengths: ``(B,)``: how many leading keys there are. The others are padding.
        local_window_size: ``(left, right)``: position i sees the keys from ``i - left`` to ``i + right``; w is (w, w).
        query_offset: Position of the first query, an int, integer scalar or ``(B,)``; None for ``S - T``.
        ridge_lambda: The ridge, > 0, in units of the squared key: a number, or an array that broadcasts to (B, T, N).
        qk_scale: Factor of the logits, a Python number; None for 1 / sqrt(key dimension).
        is_causal: Whether a query sees only the keys up to its own position.
        delta_eps: Added, with its sign, to the denominator of the paper's equation, as in ``flashlla``. >= 0.
        cg_atol: Floor of the scale that the tolerance multiplies. >= 0; None for 0, a purely relative stop.
        cg_rtol: A solve stops when ``|r|^2 <= cg_rtol max(cg_atol, |r0|^2)``; None for a stop on the error of x.
        cg_max_iters: Most steps of a solve, >= 1; None for ``max(32, 4 D)``.
        cg_use_preconditioner: Whether to precondition the solves with the diagonal of A (Jacobi).
        precision: None, a ``jax.lax.Precision`` or its name. None is JAX's ``jax_default_matmul_precision``.
        implementation: ``"triton"``, ``"xla"``, ``"reference"``, or None for the best that runs. If you name one, it
            runs or it raises an error.
        return_residuals: Whether to return ``(o, residuals)``, a :class:`~flashlla_jax.Residuals` of constants.
        axis_name: Inside ``jax.shard_map``, the mesh axes that divide the length; B, T, S are then this device's.

    Returns:
        The output in the query's dtype, ``(B, T, Dv)`` or ``(B, T, N, Hv)``; with ``return_residuals`` the pair.

    Raises:
        TypeError: An argument has the wrong type or dtype, or the dtypes of query, key and value differ.
        ValueError: A shape does not fit, or a number is out of range.
        NotImplementedError: The named implementation cannot serve the call, or its sharding cannot be served.
    """
    return_residuals = check_flag("return_residuals", return_residuals)
    query, key, value = check_arrays(query, key, value)
    axes, lengths = check_axis_name(axis_name, query, key, value), (query_seq_lengths, key_value_seq_lengths)
    hiding = check_hiding(query, key, is_causal, local_window_size, query_offset, *lengths, segment_ids, mask, axes)
    solver = (cg_atol, cg_rtol, cg_max_iters, cg_use_preconditioner)
    options = check_options(query, qk_scale, delta_eps, *solver, precision)
    chosen = choose("lla_attention", implementation, planning.refusal(query, value))
    o, residuals = attend(hiding, options, chosen, axes, query, key, value, check_ridge(ridge_lambda, query))
    return (o, of_blind_rows(residuals)) if return_residuals else o


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
    segment_ids: Segments | None = None,
    query_seq_lengths: Lengths | None = None,
    key_value_seq_lengths: Lengths | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    is_causal: bool = True,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Output, Array]:
    """``(o, omega)``, with the argument order of ``LLAFunction.apply`` in ``flashlla``.

    The arguments and the errors are those of :func:`lla_attention`. omega is the softmax normaliser
    ``sum_j exp(qk_scale q.k_j - max_j)``, shape ``(B, T)`` or ``(B, T, N)``, float32 (float64 for float64 inputs); it
    is a constant under differentiation, as in ``flashlla``.

    Example::

        o, omega = lla_attention_and_omega(q, k, v, 10.0)
    """
    o, residuals = lla_attention(
        query,
        key,
        value,
        mask=mask,
        segment_ids=segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_offset=query_offset,
        ridge_lambda=ridge_lambda,
        qk_scale=qk_scale,
        is_causal=is_causal,
        delta_eps=delta_eps,
        cg_atol=cg_atol,
        cg_rtol=cg_rtol,
        cg_max_iters=cg_max_iters,
        cg_use_preconditioner=cg_use_preconditioner,
        precision=precision,
        implementation=implementation,
        return_residuals=True,
        axis_name=axis_name,
    )
    return o, residuals.omega


def attend(
    hiding: Hiding,
    options: Options | ParallaxOptions,
    implementation: Implementation | None,
    axes: Axes | None,
    query: Array,
    key: Array,
    value: Array,
    own: Array,
) -> tuple[Array, Any]:
    """The output and the residuals of a call whose arguments are checked; ``own`` is its ridge or its probe."""
    return _run(*_static_and_arrays(hiding, options, implementation, axes), query, key, value, own)


def of_blind_rows(residuals: Any) -> Any:
    """With the logsumexp of a query that sees no key, which implementations keep finite, for jax_debug_infs."""
    return residuals._replace(logsumexp=jnp.where(residuals.omega == 0, -jnp.inf, residuals.logsumexp))


class _Static(NamedTuple):
    """The part of a call that is known when it is traced."""

    hiding: Hiding  # its numbers; its arrays are None
    options: Options | ParallaxOptions
    implementation: Implementation | None  # None: Triton or XLA, by platform
    axes: Axes | None  # mesh axes over which the length is divided, inside of jax.shard_map


def _static_and_arrays(
    hiding: Hiding, options: Options | ParallaxOptions, implementation: Implementation | None, axes: Axes | None
) -> tuple[_Static, dict[str, Any]]:
    arrays = {
        name: x for name, x in hiding._asdict().items() if x is not None and not isinstance(x, int) and name != "window"
    }
    return _Static(hiding._replace(**dict.fromkeys(arrays)), options, implementation, axes), arrays


@partial(jax.jit, static_argnums=0)  # so that a call outside of any jit is compiled once
def _run(
    static: _Static, hiding: dict[str, Any], query: Array, key: Array, value: Array, own: Array
) -> tuple[Array, Any]:
    one_head = query.ndim == 3
    if one_head:
        query, key, value, own = (x[:, :, None] for x in (query, key, value, own))
    o, residuals = by_shard(partial(_attend, static), query, key, value, own, hiding, lengthwise=True)
    if one_head:
        o, residuals = jax.tree.map(lambda x: x[:, :, 0], (o, residuals))
    return o, lax.stop_gradient(residuals)


def _attend(
    static: _Static, query: Array, key: Array, value: Array, own: Array, hiding: dict[str, Any], axes: Axes | None
) -> Any:
    """``axes``: the mesh axes over which the length is divided; the arrays are this device's then."""
    hidden = static.hiding._replace(**hiding)
    axes = axes or static.axes
    if axes is None:
        seen = visibility(hidden, query.shape[1], key.shape[1])
    else:
        seen = local_visibility(hidden, query.shape[1], key.shape[1], axes)
    if static.implementation != "reference":
        return operator.attend(query, key, value, own, seen, static.options, only=static.implementation, axes=axes)
    if axes is not None:
        key, value = gathered(key, axes), gathered(value, axes)
    if isinstance(static.options, ParallaxOptions):
        return reference.parallax(query, key, value, own, seen, static.options)
    return reference.attention(query, key, value, own, seen, static.options)


def default_implementation() -> Implementation:
    """The implementation that ``None`` means on JAX's default device: ``"triton"`` or ``"xla"``.

    XLA serves all calls that the Triton kernels cannot (float64, a head dimension over 256). It also serves a program
    that was traced beside a GPU and is lowered for another platform.

    Example::

        assert default_implementation() in ("triton", "xla")
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
    if not _beside_nvidia_gpu():
        return f"it needs an NVIDIA GPU, JAX's default device is {device.device_kind} ({device.platform})"
    capability = getattr(device, "compute_capability", "0")
    if float(capability) < 8.0:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, this one has {capability}"
    return None


def _beside_nvidia_gpu() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and "NVIDIA" in device.device_kind.upper()


def choose(function: str, name: Implementation | None, refusal: str | None) -> Implementation | None:
    """The implementation of this call; None for Triton on CUDA and XLA elsewhere, chosen when it is lowered.

    ``refusal`` is why the kernels cannot serve the call on any machine, or None.
    """
    check_implementation(name)
    if name == "xla" or name == "reference":
        return name
    reason = refusal or _no_triton()
    if not reason:
        return name
    if name == "triton":
        raise NotImplementedError(
            f'implementation="triton" cannot serve this call: {reason}. '
            'implementation="xla" runs on every platform, and None picks the best that runs'
        )
    if _beside_nvidia_gpu():
        remedy = "Pass arrays that it takes" if refusal else "Install a jax-triton that fits this JAX"
        warnings.warn(
            f"{function} falls back to XLA, many times slower than Triton on this GPU: for Triton, {reason}. "
            f'{remedy}; where XLA is meant, implementation="xla" says so',
            stacklevel=_frames_to_caller(),
        )
    return "xla"


def _frames_to_caller() -> int:
    """The ``stacklevel`` with which the calling function warns of the line that called into this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
