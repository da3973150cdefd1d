"""``LLAttention`` and ``ParallaxAttention`` for Flax Linen, the twins of those of the same names for NNX."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flashlla_jax.attention import Implementation
from flashlla_jax.nn import checks, core, decoding


class _Attention(nn.MultiHeadDotProductAttention):
    """The common part of the modules of this file: all but their own attributes and their function."""

    if TYPE_CHECKING:  # the subclasses' attributes, which have an order of their own
        num_kv_heads: int | None = None
        is_causal: bool = True
        local_window_size: int | tuple[int, int] | None = None
        rope: float | None = None
        qk_scale: float | None = None
        implementation: Implementation | None = None

    def _solver(self) -> dict[str, Any]:
        """The settings that no other method has."""
        return {}

    def _of_method(self, inputs_q: Array) -> dict[str, Any]:
        """``{"ridge_lambda": ...}`` or ``{"probe": ...}``, of these inputs."""
        raise NotImplementedError

    def _sower(self) -> core.Sow | None:
        """The function that a call hands its solves' residuals to, or None."""
        return None

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs_q: Float[Array, "*batch T features"],
        inputs_k: Float[Array, "*batch S kv_features"] | None = None,
        inputs_v: Float[Array, "*batch S kv_features"] | None = None,
        *,
        inputs_kv: Float[Array, "*batch S kv_features"] | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        input_positions: core.Positions | None = None,
        segment_ids: core.Segments | None = None,
        query_seq_lengths: core.Lengths | None = None,
        key_value_seq_lengths: core.Lengths | None = None,
        decode_starts: core.Lengths | None = None,
        decode_lengths: core.Lengths | None = None,
    ) -> Float[Array, "*batch T out_features"]:
        """Attention of ``inputs_q`` to ``inputs_k``, with the call signature of ``nn.MultiHeadDotProductAttention``.

        Args:
            inputs_q: Any number of batch axes, none included.
            inputs_k: Inputs of the keys; None for ``inputs_q``.
            inputs_v: Inputs of the values; None for ``inputs_k``.
            inputs_kv: Flax's old name for ``inputs_k`` without ``inputs_v``.
            mask: As in :class:`flashlla_jax.LLAttention`.
            deterministic: Without effect, as in Flax without dropout.
            dropout_rng: Without effect, as in Flax without dropout.
            sow_weights: Must be False: see the attribute ``sow_residuals`` of :class:`LLAttention`.
            input_positions: As in :class:`flashlla_jax.LLAttention`, and so are the following.
            segment_ids: See :class:`flashlla_jax.LLAttention`. Not with ``decode=True``, as are the lengths.
            query_seq_lengths: See :class:`flashlla_jax.LLAttention`.
            key_value_seq_lengths: See :class:`flashlla_jax.LLAttention`.
            decode_starts: As in :class:`flashlla_jax.LLAttention`.
            decode_lengths: As in :class:`flashlla_jax.LLAttention`.

        Returns:
            The output.

        Raises:
            ValueError: A shape does not fit, a number is out of range, or the cache is overrun.
            TypeError: An array has the wrong type or dtype, the ridge is not a number, or the window is not ints.
            NotImplementedError: The module cannot serve an argument.
        """
        self._check(sow_weights)
        inputs_k = _one_of(inputs_k, inputs_v, inputs_kv)
        inputs_k, inputs_v = core.keys_and_values(inputs_q, inputs_k, inputs_v)
        settings = self._settings(inputs_q)
        query, key, value = self._projected(inputs_q, inputs_k, inputs_v)
        arguments = self._of_method(inputs_q)
        arguments |= {"is_causal": self.is_causal, "mask": mask, "positions": input_positions}
        hiding = checks.hiding(segment_ids, query_seq_lengths, key_value_seq_lengths, self.decode)
        # init makes the cache, as long as its inputs, and attends without it
        has_cache = self.has_variable("cache", "cached_key")
        variables = self._cache(key, value) if self.decode else ()
        rows = checks.rows_of_cache(decode_starts, decode_lengths, self.decode and has_cache)
        if self.decode and has_cache:
            cache = decoding.Cache(*(variable.value for variable in variables))
            o, cache = decoding.decode(settings, query, key, value, cache, **arguments, **rows)
            for variable, x in zip(variables, cache, strict=True):
                variable.value = x
        else:
            o = core.forward(settings, query, key, value, **arguments, **hiding, sow=self._sower())
        return self._out(o, inputs_q.shape[-1])

    def _check(self, sow_weights: bool) -> None:
        checks.check_dropout(self.dropout_rate)
        checks.check_attention_fn(self.attention_fn)
        checks.check_flags(is_causal=self.is_causal)
        checks.check_sow_weights(sow_weights)
        checks.check_einsums(self.qk_attn_weights_einsum_cls, self.attn_weights_value_einsum_cls)

    def _settings(self, inputs_q: Array) -> core.Settings:
        settings = core.Settings(
            dtype=self.dtype,
            rope=self.rope,
            qk_scale=self.qk_scale,
            precision=self.precision,
            implementation=self.implementation,
            local_window_size=checks.check_local_window_size(self.local_window_size),
            **self._solver(),
        )
        settings.check(self._head_dim(inputs_q))
        return settings

    def _head_dim(self, inputs_q: Array) -> int:
        features = self.qkv_features or inputs_q.shape[-1]
        if features % self.num_heads:
            raise ValueError(f"num_heads must divide qkv_features, got {self.num_heads} for {features}")
        return features // self.num_heads

    def _project(self, *features: Any, **options: Any) -> nn.DenseGeneral:
        """A projection with this module's dtypes."""
        return nn.DenseGeneral(
            *features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_bias=self.use_bias,
            precision=self.precision,
            **options,
        )

    def _into_heads(self, name: str, heads: int, head_dim: int, **options: Any) -> nn.DenseGeneral:
        """A projection into heads."""
        options = {"kernel_init": self.kernel_init, "bias_init": self.bias_init} | options
        dot = {"dot_general": self.qkv_dot_general, "dot_general_cls": self.qkv_dot_general_cls}
        return self._project((heads, head_dim), name=name, **options, **dot)

    def _projected(self, inputs_q: Array, inputs_k: Array, inputs_v: Array) -> tuple[Array, Array, Array]:
        """Query, key and value of these inputs."""
        head_dim = self._head_dim(inputs_q)
        kv_heads = checks.check_heads(self.num_heads, self.num_kv_heads)
        query = self._into_heads("query", self.num_heads, head_dim)(inputs_q)
        key = self._into_heads("key", kv_heads, head_dim)(inputs_k)
        value = self._into_heads("value", kv_heads, head_dim)(inputs_v)
        if self.normalize_qk:
            norm = partial(nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        return query, key, value

    def _out(self, o: Array, features: int) -> Array:
        """The output of the heads, projected."""
        return self._project(
            self.out_features or features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
        )(o)

    def _cache(self, key: Array, value: Array) -> tuple[nn.Variable, ...]:
        return (
            self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype),
            self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype),
            self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32),
        )


def _one_of(inputs_k: Any, inputs_v: Any, inputs_kv: Any) -> Any:
    """The inputs of the keys, under their name or Flax's old one."""
    if inputs_kv is None:
        return inputs_k
    if inputs_k is not None or inputs_v is not None:
        raise ValueError("inputs_kv is inputs_k under its old name: give one of them, and no inputs_v with it")
    return inputs_kv


class LLAttention(_Attention):
    """Local Linear Attention with the parameters, the arguments and the cache of ``nn.MultiHeadDotProductAttention``.

    The attributes are those of ``nn.MultiHeadDotProductAttention``, in its order, then the following, which are those
    of :class:`flashlla_jax.LLAttention`; the parameters of either module fit the other. Attention is causal unless
    ``is_causal=False``. ``dropout_rate``, ``attention_fn`` and the two einsum classes cannot be served and must be left
    as they are; the softmax weights of 16-bit inputs are float32 whatever ``force_fp32_for_softmax`` says.
    Encoder-decoder cross-attention needs ``is_causal=False``: by default, if ``inputs_k`` is longer than
    ``inputs_q``, the last query is aligned with the last key.

    With ``decode=True`` the ``cache`` collection is made by ``init`` from inputs as long as the cache is to be, as in
    Flax. A call with ``mutable=["cache"]`` then takes any number of tokens; overrunning the cache is a ValueError, or
    NaN if the cache is traced.

    Attributes:
        num_kv_heads: Key/value heads, dividing ``num_heads``; None for ``num_heads``.
        is_causal: Whether a query sees only the keys up to its own position, aligned at the end.
        local_window_size: As in :class:`flashlla_jax.LLAttention`; None for no window.
        ridge_lambda: The ridge, a number > 0; the initial value if it is learned.
        learn_ridge: Whether every head learns its ridge, ``ridge_floor + softplus(raw_ridge)``; the parameter
            ``raw_ridge``, ``(num_heads,)``, should be left out of weight decay.
        ridge_floor: The lower bound of a learned ridge, > 0 and < ``ridge_lambda``.
        rope: Base of a rotary position embedding of queries and keys, applied after ``normalize_qk``; None for none.
        qk_scale: As in :func:`flashlla_jax.lla_attention`, and so are the following.
        cg_atol: See :func:`flashlla_jax.lla_attention`.
        cg_rtol: See :func:`flashlla_jax.lla_attention`.
        cg_max_iters: See :func:`flashlla_jax.lla_attention`.
        cg_use_preconditioner: See :func:`flashlla_jax.lla_attention`.
        implementation: See :func:`flashlla_jax.lla_attention`; with a cache also of :func:`flashlla_jax.lla_decode`.
        sow_residuals: Whether a call with ``mutable=["intermediates"]`` sows its :class:`flashlla_jax.Residuals`,
            arrays ``[batch..., T, num_heads]``, as ``residuals``. They are of the forward pass. Calls with a cache sow
            nothing: a decode step is exact and takes no iterations.
    """

    attention_fn: Any = None
    num_kv_heads: int | None = None
    is_causal: bool = True
    local_window_size: int | tuple[int, int] | None = None
    ridge_lambda: float = 10.0
    learn_ridge: bool = False
    ridge_floor: float = 0.01
    rope: float | None = None
    qk_scale: float | None = None
    cg_atol: float | None = None
    cg_rtol: float | None = None
    cg_max_iters: int | None = None
    cg_use_preconditioner: bool = False
    implementation: Implementation | None = None
    sow_residuals: bool = False

    def _solver(self) -> dict[str, Any]:
        checks.check_flags(learn_ridge=self.learn_ridge, sow_residuals=self.sow_residuals)
        checks.check_ridge(self.ridge_lambda, self.ridge_floor if self.learn_ridge else None)
        names = ("cg_atol", "cg_rtol", "cg_max_iters", "cg_use_preconditioner")
        return {name: getattr(self, name) for name in names}

    def _of_method(self, inputs_q: Array) -> dict[str, Any]:
        return {"ridge_lambda": self._ridge()}

    def _sower(self) -> core.Sow | None:
        return partial(self.sow, "intermediates", "residuals") if self.sow_residuals else None

    def _ridge(self) -> float | Float[Array, " N"]:
        if not self.learn_ridge:
            return self.ridge_lambda
        initial = core.raw_ridge(self.ridge_lambda, self.ridge_floor)
        raw = self.param("raw_ridge", nn.initializers.constant(initial), (self.num_heads,), self.param_dtype)
        return core.learned_ridge(raw, self.ridge_floor)


class ParallaxAttention(_Attention):
    """Parallax with the parameters, the arguments and the cache of ``nn.MultiHeadDotProductAttention``.

    The twin of :class:`flashlla_jax.ParallaxAttention`, whose parameters fit: those of Flax's module and ``probe``,
    which starts at 0, so that a new layer is softmax attention exactly. All else is as in :class:`LLAttention`.

    Attributes:
        num_kv_heads: As in :class:`LLAttention`, and so are the following, except the last two.
        is_causal: See :class:`LLAttention`.
        local_window_size: See :class:`LLAttention`.
        rope: See :class:`LLAttention`; the probe is rotated as the queries are.
        qk_scale: See :func:`flashlla_jax.parallax_attention`.
        probe_kernel_init: Initialiser of the probe's kernel; its bias starts at 0.
        implementation: See :func:`flashlla_jax.parallax_attention`; with a cache also of
            :func:`flashlla_jax.parallax_decode`.
    """

    attention_fn: Any = None
    num_kv_heads: int | None = None
    is_causal: bool = True
    local_window_size: int | tuple[int, int] | None = None
    rope: float | None = None
    qk_scale: float | None = None
    probe_kernel_init: Any = nn.initializers.zeros_init()
    implementation: Implementation | None = None

    def _of_method(self, inputs_q: Array) -> dict[str, Any]:
        inits = {"kernel_init": self.probe_kernel_init, "bias_init": nn.initializers.zeros_init()}
        probe = self._into_heads("probe", self.num_heads, self._head_dim(inputs_q), **inits)
        return {"probe": probe(inputs_q)}
