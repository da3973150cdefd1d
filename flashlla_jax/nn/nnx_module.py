"""``LLAttention`` for Flax NNX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.typing import Dtype
from jaxtyping import Array, Float

from flashlla_jax.attention import Implementation, lla_attention
from flashlla_jax.nn import checks, core, decoding
from flashlla_jax.nn.nnx_options import FlaxOptions


class CachedAttention(nnx.MultiHeadAttention):
    """The common part of this package's modules: the call, with a cache and without.

    A method's module makes ``settings`` and ``is_causal``, and gives its function's own argument.
    """

    is_causal: bool
    settings: core.Settings

    def of_method(self, inputs_q: Array, qkv_sharding: Any) -> dict[str, Any]:
        """``{"ridge_lambda": ...}`` or ``{"probe": ...}``, of these inputs."""
        raise NotImplementedError

    def sower(self) -> core.Sow | None:
        """The function that a call hands its solves' residuals to, or None."""
        return None

    def init_cache(self, input_shape: Sequence[int], dtype: Dtype = jnp.float32) -> None:
        """Makes an empty cache, which calls with ``decode=True`` need; an old one is dropped.

        A call may give any number of tokens: the whole prompt, then one or several at a time. Stacked layers, made by
        ``nnx.vmap``, make their caches by ``nnx.vmap`` too. The cache is on one device: on a mesh, place
        ``cached_key`` and ``cached_value`` as the keys will be.

        Example::

            layer.init_cache((batch, capacity, in_features))
            nnx.vmap(lambda layer: layer.init_cache(shape), in_axes=0, out_axes=None)(stacked)

        Args:
            input_shape: ``[batch..., capacity, in_features]``: the shape of inputs that fill the cache.
            dtype: Dtype of the cached keys and values.
        """
        super().init_cache(tuple(input_shape), dtype)

    def __call__(
        self,
        inputs_q: Float[Array, "*batch T features"],
        inputs_k: Float[Array, "*batch S kv_features"] | None = None,
        inputs_v: Float[Array, "*batch S kv_features"] | None = None,
        *,
        mask: Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool | None = None,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: core.Positions | None = None,
        segment_ids: core.Segments | None = None,
        query_seq_lengths: core.Lengths | None = None,
        key_value_seq_lengths: core.Lengths | None = None,
        decode_starts: core.Lengths | None = None,
        decode_lengths: core.Lengths | None = None,
    ) -> Float[Array, "*batch T out_features"]:
        """Attention of ``inputs_q`` to ``inputs_k``, with the call signature of ``flax.nnx.MultiHeadAttention``.

        Args:
            inputs_q: Any number of batch axes, none included.
            inputs_k: Inputs of the keys; None for ``inputs_q``.
            inputs_v: Inputs of the values; None for ``inputs_k``.
            mask: True or nonzero where a key is visible; broadcastable to ``[batch..., num_heads, T, S]``. Negative is
                an error. With a cache S is its capacity. A query that sees no key gets attention output zero.
            deterministic: Without effect, as in Flax without dropout.
            rngs: Without effect, as in Flax without dropout.
            sow_weights: Must be False: see the constructor's ``sow_residuals``.
            decode: Whether to append to the cache and attend to it, any number of tokens at the next positions; None
                for the constructor's. One of the two must be given, as in Flax.
            is_causal: None for the constructor's.
            out_sharding: Sharding of the output, passed to ``out``.
            qkv_sharding: Sharding of queries, keys and values, passed to their projections.
            input_positions: Positions of queries and keys for ``rope``, broadcastable to ``[batch..., T]``; None to
                count from 0, or from ``cache_index``. In a packed row let them start again in each document.
            segment_ids: Documents packed into one row: integers, ``[batch..., length]`` for queries and keys, or a pair
                ``([batch..., T], [batch..., S])``. A query sees the keys of its own segment. Not with a cache, as are
                the lengths.
            query_seq_lengths: ``[batch...]``, integers: the queries beyond are padding and get attention output zero.
            key_value_seq_lengths: ``[batch...]``, integers: the keys beyond are padding, which no query sees.
            decode_starts: With ``decode``: for prompts that are padded on the left, the first position of each row.
                Give it with every call. ``rope`` needs no change: only differences of positions matter.
            decode_lengths: With ``decode``: for prompts that are padded on the right, how many of the T tokens each
                row has. The others are not written. From then on ``cache_index`` is an array ``[batch...]``, and tokens
                given without ``decode_lengths`` follow each row's last.

        Returns:
            The output. NaN if tokens overrun the cache, or ``cache_index`` is negative, under ``jit``.

        Raises:
            ValueError: A shape does not fit; ``decode`` is given nowhere, its cache is missing or overrun, or it meets
                ``is_causal=False``.
            TypeError: The mask, ``input_positions``, the segments or the lengths have the wrong type or dtype.
            NotImplementedError: ``sow_weights``, segments or lengths with a cache, or the named implementation cannot
                serve this call.
        """
        checks.check_dropout(self.dropout_rate)  # which set_attributes may have changed
        checks.check_sow_weights(sow_weights)
        decode = self._decodes(decode)
        hiding = checks.hiding(segment_ids, query_seq_lengths, key_value_seq_lengths, decode)
        rows = checks.rows_of_cache(decode_starts, decode_lengths, decode)
        query, key, value = self._projected(inputs_q, inputs_k, inputs_v, qkv_sharding)
        arguments = self.of_method(inputs_q, qkv_sharding) | {"mask": mask, "positions": input_positions}
        arguments["is_causal"] = self.is_causal if is_causal is None else is_causal
        if decode:
            o = self._with_cache(query, key, value, **arguments, **rows)
        else:
            o = core.forward(self.settings, query, key, value, **arguments, **hiding, sow=self.sower())
        return self.out(o, out_sharding=out_sharding)

    def _decodes(self, decode: bool | None) -> bool:
        missing = f"decode must be given, True or False, to {type(self).__name__} or to its call"
        return first_from(decode, self.decode, error_msg=missing)

    def _projected(
        self, inputs_q: Array, inputs_k: Array | None, inputs_v: Array | None, sharding: Any
    ) -> tuple[Array, Array, Array]:
        """Query, key and value of these inputs."""
        inputs_k, inputs_v = core.keys_and_values(inputs_q, inputs_k, inputs_v)
        inputs = {"inputs_q": inputs_q, "inputs_k": inputs_k, "inputs_v": inputs_v}
        sizes = (self.in_features, self.in_kv_features, self.in_kv_features)
        for (name, x), features in zip(inputs.items(), sizes, strict=True):
            if x.shape[-1] != features:
                raise ValueError(f"{name} must have {features} features, got shape {x.shape}")
        query = self.query(inputs_q, out_sharding=sharding)
        key = self.key(inputs_k, out_sharding=sharding)
        value = self.value(inputs_v, out_sharding=sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        return query, key, value

    def _with_cache(self, query: Array, key: Array, value: Array, **arguments: Any) -> Array:
        """Append to the cache, and attend to it."""
        if self.cached_key is None or self.cached_value is None or self.cache_index is None:
            raise ValueError("decode=True needs a cache: call init_cache first")
        cache = decoding.Cache(self.cached_key[...], self.cached_value[...], self.cache_index[...])
        o, cache = decoding.decode(self.settings, query, key, value, cache, **arguments)
        for variable, x in zip((self.cached_key, self.cached_value, self.cache_index), cache, strict=True):
            variable.set_value(x)  # the sharding may be new, and the shape of the index
        return o


class LLAttention(CachedAttention):
    """Local Linear Attention with the parameters, the arguments and the cache of ``flax.nnx.MultiHeadAttention``.

    ``nnx.MultiHeadAttention(num_heads=..., in_features=..., rngs=...)`` can be replaced by ``LLAttention`` with the
    same arguments, and its checkpoints load. The arguments from ``is_causal`` on are new. Attention is causal unless
    ``is_causal=False``. Dropout on the weights, ``sow_weights`` and another ``attention_fn`` are refused: Local Linear
    Attention has no weights to drop or to show. Cross-attention to an encoder needs ``is_causal=False``: by default
    the last query is aligned with the last key.

    Example::

        layer = LLAttention(num_heads=8, in_features=512, decode=False, rngs=nnx.Rngs(0))
        out = layer(x)  # x: [batch..., length, 512]

        layer.init_cache((batch, capacity, 512))
        out = layer(prompt, decode=True)  # any number of tokens, then
        out = layer(token, decode=True)  # one at a time

    Args:
        num_heads: Query heads; divides ``qkv_features``.
        in_features: Features of ``inputs_q``.
        qkv_features: Features of queries over all heads; None for ``in_features``.
        out_features: Features of the output; None for ``in_features``.
        num_kv_heads: Key/value heads, dividing ``num_heads``; None for ``num_heads``.
        in_kv_features: Features of ``inputs_k`` and ``inputs_v``; None for ``in_features``.
        rngs: Keys for the initialisers.
        attention_fn: Must be None: the module is its attention function.
        is_causal: Whether a query sees only the keys up to its own position. With more keys than queries the two
            are aligned at the end; more queries than keys need False.
        local_window_size: ``(left, right)``, ints >= 0: a query at position i sees keys at positions from
            ``i - left`` to ``i + right``, with a cache too. An int w is ``(w, w)``; None for no window.
        ridge_lambda: The ridge, a number > 0, in units of the squared key; the initial value if it is learned.
        learn_ridge: Whether every head learns its ridge, ``ridge_floor + softplus(raw_ridge)``.
        ridge_floor: The lower bound of a learned ridge, > 0 and < ``ridge_lambda``. 0.01 is the smallest ridge for
            which the solves were measured.
        rope: Base of a rotary position embedding (10000.0, usually) of queries and keys, applied after
            ``normalize_qk``; None for none. It turns feature i together with feature i + head_dim / 2 (the
            half-split convention, as in ``flax.nnx.RoPE``).
        qk_scale: As in :func:`flashlla_jax.lla_attention`, and so are the following.
        cg_atol: See :func:`flashlla_jax.lla_attention`.
        cg_rtol: See :func:`flashlla_jax.lla_attention`.
        cg_max_iters: See :func:`flashlla_jax.lla_attention`.
        cg_use_preconditioner: See :func:`flashlla_jax.lla_attention`.
        implementation: See :func:`flashlla_jax.lla_attention`; with a cache also of
            :func:`flashlla_jax.lla_decode`.
        sow_residuals: Whether a call sows its :class:`flashlla_jax.Residuals`, arrays ``[batch..., T, num_heads]``,
            as the ``nnx.Intermediate`` ``residuals``, which ``nnx.capture`` collects. They are of the forward pass.
            ``model.set_attributes(sow_residuals=True)`` switches it on in a whole model. Calls with a cache sow
            nothing: a decode step is exact and takes no iterations.
        flax: The other arguments of ``flax.nnx.MultiHeadAttention``, with its defaults: ``FlaxOptions`` of
            ``nn/nnx_options.py`` lists them. ``dropout_rate`` must be 0.

    Raises:
        TypeError: ``ridge_lambda`` is not a number, ``local_window_size`` not ints, or Flax does not know an argument.
        ValueError: A number is out of range, or the heads do not divide the features.
        NotImplementedError: ``dropout_rate`` or ``attention_fn`` is given.

    Attributes:
        query: Projection of ``inputs_q``, kernel ``(in_features, num_heads, head_dim)``.
        key: Projection of ``inputs_k``, kernel ``(in_kv_features, num_kv_heads, head_dim)``.
        value: Projection of ``inputs_v``, shaped as ``key``.
        out: Projection of the heads, kernel ``(num_heads, head_dim, out_features)``.
        query_ln: LayerNorm of the queries with ``normalize_qk``, else None.
        key_ln: LayerNorm of the keys with ``normalize_qk``, else None.
        raw_ridge: With ``learn_ridge`` the parameter ``(num_heads,)``; the ridge is
            ``ridge_floor + softplus(raw_ridge)``. Else None. Leave it out of weight decay.
        ridge: The ridge in use: the fixed number, or the learned ones, ``(num_heads,)``.
        cached_key: ``nnx.Cache``, ``[batch..., capacity, num_kv_heads, head_dim]``, or None before ``init_cache``.
        cached_value: ``nnx.Cache``, shaped as ``cached_key``.
        cache_index: ``nnx.Cache``, int32: positions filled so far; a scalar, or ``[batch...]`` after
            ``decode_lengths``. Setting it back takes tokens off the end.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        rngs: nnx.Rngs,
        attention_fn: None = None,
        is_causal: bool = True,
        local_window_size: int | tuple[int, int] | None = None,
        ridge_lambda: float = 10.0,
        learn_ridge: bool = False,
        ridge_floor: float = 0.01,
        rope: float | None = None,
        qk_scale: float | None = None,
        cg_atol: float | None = None,
        cg_rtol: float | None = None,
        cg_max_iters: int | None = None,
        cg_use_preconditioner: bool = False,
        implementation: Implementation | None = None,
        sow_residuals: bool = False,
        **flax: Unpack[FlaxOptions],
    ):
        checks.check_dropout(flax.get("dropout_rate", 0.0))
        checks.check_attention_fn(attention_fn)
        checks.check_flags(is_causal=is_causal, learn_ridge=learn_ridge, sow_residuals=sow_residuals)
        window = checks.check_local_window_size(local_window_size)
        ridge_lambda = checks.check_ridge(ridge_lambda, ridge_floor if learn_ridge else None)
        sizes = (num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features)
        super().__init__(*sizes, attention_fn=lla_attention, rngs=rngs, **flax)
        self.is_causal = is_causal
        self.sow_residuals = sow_residuals
        self.ridge_lambda = ridge_lambda
        self.ridge_floor = ridge_floor
        self.raw_ridge: nnx.Param[Array] | None = nnx.data(None)
        if learn_ridge:
            initial = core.raw_ridge(ridge_lambda, ridge_floor)
            self.raw_ridge = nnx.Param(jnp.full((num_heads,), initial, self.param_dtype))
        self.settings = core.Settings(
            dtype=self.dtype,
            rope=rope,
            qk_scale=qk_scale,
            cg_atol=cg_atol,
            cg_rtol=cg_rtol,
            cg_max_iters=cg_max_iters,
            cg_use_preconditioner=cg_use_preconditioner,
            precision=self.precision,
            implementation=implementation,
            local_window_size=window,
        )
        self.settings.check(self.head_dim)

    @property
    def ridge(self) -> float | Float[Array, " N"]:
        """The ridge in use: the fixed number, or the learned one of every head."""
        if self.raw_ridge is None:
            return self.ridge_lambda
        return core.learned_ridge(self.raw_ridge[...], self.ridge_floor)

    def of_method(self, inputs_q: Array, qkv_sharding: Any) -> dict[str, Any]:
        return {"ridge_lambda": self.ridge}

    def sower(self) -> core.Sow | None:
        return partial(self.sow, nnx.Intermediate, "residuals") if self.sow_residuals else None
