"""Local Linear Attention as the ``attention_fn`` of Flax's own attention modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax.nnx.nn.dtypes import promote_dtype as promote
from jaxtyping import Array, Float

from flashlla_jax.attention import Implementation, Ridge
from flashlla_jax.nn import core


def attention_fn(
    *,
    ridge_lambda: Ridge = 10.0,
    is_causal: bool = False,
    qk_scale: float | None = None,
    cg_atol: float | None = None,
    cg_rtol: float | None = None,
    cg_max_iters: int | None = None,
    cg_use_preconditioner: bool = False,
    implementation: Implementation | None = None,
) -> Callable[..., Array]:
    """A function for ``attention_fn=`` of ``nnx.MultiHeadAttention`` and of Linen's ``MultiHeadDotProductAttention``.

    An existing model switches to Local Linear Attention without a new module or new parameters::

        nnx.MultiHeadAttention(num_heads=8, in_features=512, attention_fn=attention_fn(ridge_lambda=1.0), rngs=rngs)
        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn(ridge_lambda=1.0))

    The function honours the module's ``mask``, ``dtype`` and ``precision``, and works with its ``decode=True``. It
    refuses what Local Linear Attention has no counterpart of: a bias, dropout on the weights, sowing the weights.

    Args:
        ridge_lambda: The ridge, > 0, as in :func:`flashlla_jax.lla_attention`.
        is_causal: Whether attention is causal even where the module does not ask for it. Flax's modules are not causal
            by themselves, and so neither is this; a causal model that says so here rather than with a mask saves the
            (T, S) mask.
        qk_scale: As in :func:`flashlla_jax.lla_attention`.
        cg_atol: As in :func:`flashlla_jax.lla_attention`.
        cg_rtol: As in :func:`flashlla_jax.lla_attention`.
        cg_max_iters: As in :func:`flashlla_jax.lla_attention`.
        cg_use_preconditioner: As in :func:`flashlla_jax.lla_attention`.
        implementation: As in :func:`flashlla_jax.lla_attention`.

    Returns:
        The function. It raises NotImplementedError for what it refuses.
    """
    causal = is_causal

    # Linen passes only the keywords that it finds in the signature, NNX all of its own: this names both modules' whole
    # lists, so that nothing is dropped unseen.
    def attention(
        query: Float[Array, "*batch T N D"],
        key: Float[Array, "*batch S K D"],
        value: Float[Array, "*batch S K Dv"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,  # it always is
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        promote_dtype: Callable[..., Any] = promote,
        is_causal: bool = False,
    ) -> Float[Array, "*batch T N Dv"]:
        if bias is not None:
            raise NotImplementedError("Local Linear Attention takes no bias; use mask to hide keys")
        core.check_einsums(qk_attn_weights_einsum, attn_weights_value_einsum)
        if not deterministic:
            core.check_dropout(dropout_rate)
        core.check_sow_weights(module is not None)
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        return core.attend(
            query,
            key,
            value,
            mask=mask,
            is_causal=causal or is_causal,
            ridge_lambda=ridge_lambda,
            qk_scale=qk_scale,
            cg_atol=cg_atol,
            cg_rtol=cg_rtol,
            cg_max_iters=cg_max_iters,
            cg_use_preconditioner=cg_use_preconditioner,
            precision=precision,
            implementation=implementation,
        )

    return attention
