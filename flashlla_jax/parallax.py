"""``parallax_attention``: Local Linear Attention with a given vector, the probe, in place of its solve."""

from __future__ import annotations

from typing import Literal, overload

from jax import lax
from jaxtyping import Array, Float, Int

from flashlla_jax.arguments import (
    Implementation,
    check_arrays,
    check_axis_name,
    check_flag,
    check_hiding,
    check_parallax_options,
    check_probe,
)
from flashlla_jax.attention import (
    AxisName,
    Key,
    Lengths,
    Mask,
    Output,
    Query,
    Segments,
    Value,
    attend,
    choose,
    of_blind_rows,
)
from flashlla_jax.interface import ParallaxResiduals
from flashlla_jax.kernels import plan as planning

Probe = Float[Array, "B T D"] | Float[Array, "B T N H"]


@overload
def parallax_attention(
    query: Query,
    probe: Probe,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = ...,
    segment_ids: Segments | None = ...,
    query_seq_lengths: Lengths | None = ...,
    key_value_seq_lengths: Lengths | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = ...,
    qk_scale: float | None = ...,
    is_causal: bool = ...,
    precision: lax.PrecisionLike = ...,
    implementation: Implementation | None = ...,
    return_residuals: Literal[False] = ...,
    axis_name: AxisName | None = ...,
) -> Output: ...


@overload
def parallax_attention(
    query: Query,
    probe: Probe,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = ...,
    segment_ids: Segments | None = ...,
    query_seq_lengths: Lengths | None = ...,
    key_value_seq_lengths: Lengths | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = ...,
    qk_scale: float | None = ...,
    is_causal: bool = ...,
    precision: lax.PrecisionLike = ...,
    implementation: Implementation | None = ...,
    return_residuals: Literal[True],
    axis_name: AxisName | None = ...,
) -> tuple[Output, ParallaxResiduals]: ...


def parallax_attention(
    query: Query,
    probe: Probe,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = None,
    segment_ids: Segments | None = None,
    query_seq_lengths: Lengths | None = None,
    key_value_seq_lengths: Lengths | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    qk_scale: float | None = None,
    is_causal: bool = True,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
    axis_name: AxisName | None = None,
) -> Output | tuple[Output, ParallaxResiduals]:
    r"""Parallax (arXiv 2605.29157): the output pass of Local Linear Attention, without its solve.

    With the softmax attention weights :math:`p_{ij}` and a vector :math:`r_i` for every query, the probe:

    .. math::
        \bar k_i = \sum_j p_{ij} k_j, \quad
        o_i = \sum_j p_{ij} (1 - (k_j - \bar k_i) \cdot r_i) v_j

    which is the mean of the values less their covariance with the keys, applied to the probe. A zero probe gives
    softmax attention. ``r_i = A_i^-1 (kbar_i - q_i)`` gives :func:`~flashlla_jax.lla_attention`, which solves for it; a
    model with Parallax projects it from the token instead (:class:`~flashlla_jax.ParallaxAttention`). There is no ridge
    and nothing to converge: a call costs about two of softmax attention, whatever the keys are.

    Differentiable in ``query``, ``probe``, ``key`` and ``value``. The gradient is the true one. What can be
    differentiated again and how calls are divided among devices is as in :func:`~flashlla_jax.lla_attention`, and so is
    what a query sees: one that sees no key has output zero and no gradient.

    Args:
        query: ``(B, T, D)``, or ``(B, T, N, H)`` with N heads. bfloat16, float16, float32 or float64.
        probe: In the shape and the dtype of ``query``. It is in units of the inverse key.
        key: ``(B, S, D)``, or ``(B, S, K, H)`` with K dividing N: each key/value head serves N / K query heads.
        value: ``(B, S, Dv)``, or ``(B, S, K, Hv)``. The last dimension may differ from the key's.
        mask: As in :func:`~flashlla_jax.lla_attention`, and so are the following.
        segment_ids: See :func:`~flashlla_jax.lla_attention`.
        query_seq_lengths: See :func:`~flashlla_jax.lla_attention`.
        key_value_seq_lengths: See :func:`~flashlla_jax.lla_attention`.
        local_window_size: See :func:`~flashlla_jax.lla_attention`.
        query_offset: See :func:`~flashlla_jax.lla_attention`.
        qk_scale: Factor of the logits, a Python number; None for 1 / sqrt(key dimension).
        is_causal: Whether a query sees only the keys up to its own position. True by default.
        precision: As in :func:`~flashlla_jax.lla_attention`. For 16-bit inputs DEFAULT and HIGH are the same.
        implementation: As in :func:`~flashlla_jax.lla_attention`.
        return_residuals: Whether to return ``(o, residuals)``, residuals being a
            :class:`~flashlla_jax.ParallaxResiduals` (omega, logsumexp) of constants.
        axis_name: As in :func:`~flashlla_jax.lla_attention`; the probe is divided as the query is.

    Returns:
        The output in the query's dtype, ``(B, T, Dv)`` or ``(B, T, N, Hv)``; with ``return_residuals`` the pair.

    Raises:
        TypeError: An argument has the wrong type or dtype, or the dtypes of query, probe, key and value differ.
        ValueError: A shape does not fit, or a number is out of range.
        NotImplementedError: The named implementation cannot serve this call here, or arrays are sharded in a way that
            :func:`~flashlla_jax.lla_attention` refuses too.
    """
    return_residuals = check_flag("return_residuals", return_residuals)
    query, key, value = check_arrays(query, key, value)
    probe = check_probe(probe, query)
    axes, lengths = check_axis_name(axis_name, query, key, value), (query_seq_lengths, key_value_seq_lengths)
    hiding = check_hiding(query, key, is_causal, local_window_size, query_offset, *lengths, segment_ids, mask, axes)
    options = check_parallax_options(query, qk_scale, precision)
    chosen = choose("parallax_attention", implementation, planning.refusal(query, value))
    o, residuals = attend(hiding, options, chosen, axes, query, key, value, probe)
    return (o, of_blind_rows(residuals)) if return_residuals else o
