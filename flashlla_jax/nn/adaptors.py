"""Local Linear Attention as the ``attention_fn`` of Flax's own attention modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype as promote
from jaxtyping import Array, Float

from flashlla_jax.arguments import check_integers
from flashlla_jax.attention import Implementation, Ridge
from flashlla_jax.nn import checks, core, decoding


def attention_fn(
    *arrays: Any,
    ridge_lambda: Ridge = 10.0,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: core.Segments | None = None,
    query_seq_lengths: core.Lengths | None = None,
    key_value_seq_lengths: core.Lengths | None = None,
    qk_scale: float | None = None,
    cg_atol: float | None = None,
    cg_rtol: float | None = None,
    cg_max_iters: int | None = None,
    cg_use_preconditioner: bool = False,
    implementation: Implementation | None = None,
    **others: Any,
) -> AttentionFn:
    """A function for ``attention_fn=`` of ``nnx.MultiHeadAttention`` and of Linen's ``MultiHeadDotProductAttention``.

    An existing model switches to Local Linear Attention without a new module or new parameters::

        nnx.MultiHeadAttention(num_heads=8, in_features=512, attention_fn=attention_fn(), rngs=rngs)
        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn())

    The function uses the module's ``mask``, ``dtype`` and ``precision``, and works with its ``decode=True``. It
    refuses a bias, dropout on the weights and sowing the weights: Local Linear Attention does not have them. Two
    functions with the same settings are equal. An array equals only itself.

    Flax's modules cannot pass segments and lengths on. So these belong to the function, for calls of their shapes. If
    the arrays differ from call to call, make the function, and a Linen module around it, in the traced call. Or use the
    module's ``mask``, or :class:`flashlla_jax.LLAttention`: they are arguments of the call.

    Args:
        arrays: Pass none. A module passes them if you forget the parentheses.
        ridge_lambda: The ridge, > 0, as in :func:`flashlla_jax.lla_attention`.
        is_causal: Whether attention is causal even if the module does not ask for it. Flax's modules are not causal by
            default, so this is not. A causal model that says so here needs no (T, S) mask.
        local_window_size: As in :func:`flashlla_jax.lla_attention`. Not with the modules' ``decode=True``, which does
            not tell the function where the token is.
        segment_ids: ``[batch..., length]`` integers for queries and keys, or a pair ``([batch..., T], [batch..., S])``,
            as in :func:`flashlla_jax.lla_attention`, with the batch axes of the module's inputs.
        query_seq_lengths: ``[batch...]`` integers. Not with ``decode=True`` either.
        key_value_seq_lengths: ``[batch...]`` integers. With ``decode=True`` they count positions in the cache.
        qk_scale: As in :func:`flashlla_jax.lla_attention`.
        cg_atol: As in :func:`flashlla_jax.lla_attention`.
        cg_rtol: As in :func:`flashlla_jax.lla_attention`.
        cg_max_iters: As in :func:`flashlla_jax.lla_attention`.
        cg_use_preconditioner: As in :func:`flashlla_jax.lla_attention`.
        implementation: As in :func:`flashlla_jax.lla_attention`.
        others: Pass none.

    Returns:
        The function. It raises NotImplementedError if it refuses an argument.

    Raises:
        TypeError: An argument is not one of these, or has the wrong type.
        ValueError: A number is out of range, or ``implementation`` is not one.
    """
    if arrays:
        raise TypeError("attention_fn makes the function: a module takes attention_fn=attention_fn(), with parentheses")
    if others:
        raise TypeError(f"attention_fn has no argument {', '.join(others)}")
    checks.check_flags(is_causal=is_causal, cg_use_preconditioner=cg_use_preconditioner)
    checks.check_operator(cg_max_iters, implementation)
    if not isinstance(ridge_lambda, np.ndarray | jax.Array):
        ridge_lambda = checks.check_ridge(ridge_lambda, None)
    return AttentionFn(
        ridge_lambda=ridge_lambda,
        is_causal=is_causal,
        local_window_size=checks.check_local_window_size(local_window_size),
        segment_ids=_check_segments(segment_ids),
        query_seq_lengths=_check_bound("query_seq_lengths", query_seq_lengths, "an integer array"),
        key_value_seq_lengths=_check_bound("key_value_seq_lengths", key_value_seq_lengths, "an integer array"),
        qk_scale=qk_scale,
        cg_atol=cg_atol,
        cg_rtol=cg_rtol,
        cg_max_iters=cg_max_iters,
        cg_use_preconditioner=cg_use_preconditioner,
        implementation=implementation,
    )


def _check_bound(name: str, array: Any, allowed: str) -> Any:
    return None if array is None else check_integers(name, array, allowed)


def _check_segments(segment_ids: Any) -> Any:
    name, allowed = "segment_ids", "an integer array or a pair of them"
    if not isinstance(segment_ids, tuple | list):
        return _check_bound(name, segment_ids, allowed)
    if len(segment_ids) != 2:
        raise ValueError(f"{name} must be one array or a pair (query, key), got {len(segment_ids)} of them")
    return tuple(check_integers(name, ids, allowed) for ids in segment_ids)


@dataclass(frozen=True, eq=False)
class AttentionFn:
    """The function that :func:`attention_fn` returns. Its fields are arguments of ``lla_attention``.

    It is a value: two models that are made with the same settings are equal for ``jit``, ``tree.map`` and ``pickle``.
    """

    ridge_lambda: Ridge
    is_causal: bool
    local_window_size: tuple[int, int] | None
    segment_ids: Any
    query_seq_lengths: Any
    key_value_seq_lengths: Any
    qk_scale: float | None
    cg_atol: float | None
    cg_rtol: float | None
    cg_max_iters: int | None
    cg_use_preconditioner: bool
    implementation: Implementation | None

    def _key(self) -> tuple[Any, ...]:
        # an array has no hash, and its values may not be known: the object stands for it
        def of(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(of, value))
            return ("array", id(value)) if isinstance(value, np.ndarray | jax.Array) else value

        return of(tuple(vars(self).values()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionFn) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    # Linen passes only the keywords that it finds in the signature, NNX passes all of its own. So the signature has all
    # keywords of both modules: none is dropped unseen.
    def __call__(
        self,
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
        force_fp32_for_softmax: bool = False,  # always in float32
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        promote_dtype: Callable[..., Any] = promote,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> Float[Array, "*batch T N Dv"]:
        """Attention, with the arguments of ``nnx.dot_product_attention`` and of Linen's.

        Raises:
            NotImplementedError: An argument has no counterpart in Local Linear Attention. Or Flax's modules decode
                (one query and several keys) with a window or query lengths.
        """
        if bias is not None:
            raise NotImplementedError("Local Linear Attention takes no bias; use mask to hide keys")
        if input_positions is not None:
            raise NotImplementedError(
                "input_positions must be None: attention_fn has no rotary embedding, LLAttention(rope=...) has"
            )
        checks.check_einsums(qk_attn_weights_einsum, attn_weights_value_einsum)
        if not deterministic:
            checks.check_dropout(dropout_rate)
        checks.check_sow_weights(module is not None)
        for name in ("local_window_size", "query_seq_lengths"):
            if getattr(self, name) is not None and query.shape[-3] == 1 < key.shape[-3]:
                raise NotImplementedError(
                    f"{name} cannot be served with decode=True of Flax's own modules: they do not say at which "
                    "position of the cache the token is. LLAttention(local_window_size=...) decodes"
                )
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        hiding = (self.segment_ids, self.query_seq_lengths, self.key_value_seq_lengths, self.local_window_size)
        if query.shape[-3] == 1 and all(x is None for x in hiding):
            # as a decode step: the token is the last of the keys, causal or not
            exact = {name: getattr(self, name) for name in ("ridge_lambda", "qk_scale", "implementation")}
            return decoding.attend_one(query, key, value, mask=mask, precision=precision, **exact)
        options: dict[str, Any] = vars(self) | {"is_causal": self.is_causal or is_causal}
        return core.attend(query, key, value, mask=mask, precision=precision, **options)
