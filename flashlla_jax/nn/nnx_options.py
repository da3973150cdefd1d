"""The arguments that Flax's module has and this package's modules hand on to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn


class FlaxOptions(TypedDict, total=False):
    """The keywords of ``flax.nnx.MultiHeadAttention``, with Flax's defaults.

    Attributes:
        dtype: Dtype of the computation; None to infer it from inputs and parameters.
        param_dtype: Dtype of the parameters.
        broadcast_dropout: Without effect, as in Flax without dropout.
        dropout_rate: Must be 0.
        deterministic: Without effect, as in Flax without dropout.
        precision: Of the projections and of the attention.
        kernel_init: Initialiser of the kernels.
        out_kernel_init: Initialiser of the output kernel; None for ``kernel_init``.
        bias_init: Initialiser of the biases.
        out_bias_init: Initialiser of the output bias; None for ``bias_init``.
        use_bias: Whether the projections have biases.
        decode: Whether calls use the cache; None leaves it to the call.
        normalize_qk: Whether queries and keys go through a LayerNorm (arXiv 2302.05442).
        qkv_promote_dtype: Dtype promotion of the query, key and value projections.
        out_promote_dtype: Dtype promotion of the output projection.
        ln_promote_dtype: Dtype promotion of the LayerNorms.
        qkv_dot_general: Passed to the projections; deprecated by Flax, as are the next three.
        out_dot_general: See ``qkv_dot_general``.
        qkv_dot_general_cls: See ``qkv_dot_general``.
        out_dot_general_cls: See ``qkv_dot_general``.
        keep_rngs: Without effect, as in Flax without dropout.
        kernel_metadata: Metadata (sharding, for one) of the kernels.
        out_kernel_metadata: Metadata of the output kernel; empty for ``kernel_metadata``.
        bias_metadata: Metadata of the biases.
        out_bias_metadata: Metadata of the output bias; empty for ``bias_metadata``.
        query_ln_scale_metadata: Metadata of the scale of ``query_ln``.
        key_ln_scale_metadata: Metadata of the scale of ``key_ln``.
    """

    dtype: Dtype | None
    param_dtype: Dtype
    broadcast_dropout: bool
    dropout_rate: float
    deterministic: bool | None
    precision: PrecisionLike
    kernel_init: Initializer
    out_kernel_init: Initializer | None
    bias_init: Initializer
    out_bias_init: Initializer | None
    use_bias: bool
    decode: bool | None
    normalize_qk: bool
    qkv_promote_dtype: PromoteDtypeFn
    out_promote_dtype: PromoteDtypeFn
    ln_promote_dtype: PromoteDtypeFn
    qkv_dot_general: Any
    out_dot_general: Any
    qkv_dot_general_cls: Any
    out_dot_general_cls: Any
    keep_rngs: bool
    kernel_metadata: Mapping[str, Any]
    out_kernel_metadata: Mapping[str, Any]
    bias_metadata: Mapping[str, Any]
    out_bias_metadata: Mapping[str, Any]
    query_ln_scale_metadata: Mapping[str, Any]
    key_ln_scale_metadata: Mapping[str, Any]
