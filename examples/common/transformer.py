"""The model of the trained examples: a pre-norm transformer whose attention is chosen by name; all else is the same.

``"lla"`` is :class:`flashlla_jax.LLAttention` with a learned ridge, ``"parallax"`` is
:class:`flashlla_jax.ParallaxAttention`, which has one projection more; ``"softmax"`` and ``"linear"`` are the baselines
of this file: same projections, same rotary positions, same initialisation.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from flashlla_jax import LLAttention, ParallaxAttention, Residuals
from flashlla_jax.attention import Implementation
from flashlla_jax.nn.rope import rotate

Array = jax.Array

LLA, PARALLAX, SOFTMAX, LINEAR = "lla", "parallax", "softmax", "linear"
ATTENTIONS = (LLA, PARALLAX, SOFTMAX, LINEAR)
TITLES = {LLA: "LLA", PARALLAX: "Parallax", SOFTMAX: "softmax attention", LINEAR: "linear attention"}
# told apart by colour-blind readers
COLORS = {LLA: "#0072B2", PARALLAX: "#CC79A7", SOFTMAX: "#D55E00", LINEAR: "#009E73"}
# so that a curve shows through one that lies on it
LINES = {LLA: "o-", PARALLAX: "d-.", SOFTMAX: "s--", LINEAR: "^:"}
AUTO = "auto"
DTYPES = ("float32", "bfloat16", AUTO)
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

ROPE_BASE = 10000.0  # Su et al., RoFormer (arXiv 2104.09864)


class SoftmaxAttention(nnx.Module):
    """Causal multi-head softmax attention: ``LLAttention``'s projections around ``jax.nn.dot_product_attention``.

    Args:
        num_heads: divides ``features``.
        features: of the input and the output.
        rope: whether query and key carry rotary positions.
        normalize_qk: whether query and key go through a LayerNorm before that, as in ``LLAttention``.
        fused: whether cuDNN's kernel is used where it serves the call. Not under ``jax.vmap``: JAX's rule for it
            refuses batch axes that are not in front.
        dtype: of the computation; parameters are float32.
        rngs: source of the initial parameters.
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        *,
        rope: bool,
        normalize_qk: bool = False,
        fused: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads = (num_heads, features // num_heads)
        self.rope = rope
        self.fused = fused

        def into_heads() -> nnx.LinearGeneral:
            return nnx.LinearGeneral(features, self.heads, use_bias=False, dtype=dtype, rngs=rngs)

        def norm() -> Any:
            if not normalize_qk:
                return nnx.data(None)
            return nnx.LayerNorm(self.heads[1], use_bias=False, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = into_heads(), into_heads(), into_heads()
        self.query_ln, self.key_ln = norm(), norm()
        self.out = nnx.LinearGeneral(self.heads, features, axis=(-2, -1), use_bias=False, dtype=dtype, rngs=rngs)
        self.cached_key: nnx.Cache | None = nnx.data(None)
        self.cached_value: nnx.Cache | None = nnx.data(None)
        self.cache_index: nnx.Cache | None = nnx.data(None)

    def init_cache(self, input_shape: tuple[int, int, int], dtype: Any = jnp.float32) -> None:
        """Sets up an empty key/value cache for inputs ``(B, length, features)``."""
        shape = (*input_shape[:2], *self.heads)
        self.cached_key = nnx.Cache(jnp.zeros(shape, dtype))
        self.cached_value = nnx.Cache(jnp.zeros(shape, dtype))
        self.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, x: Array, decode: bool = False, decode_starts: Array | None = None) -> Array:
        """``(B, T, features)`` to the same; with ``decode`` the T tokens follow those in the cache.

        ``decode_starts`` ``(B,)`` is where each row begins: what is before it is padding.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        if decode:
            return self.out(self._decode(q, k, v, decode_starts))
        if self.rope:
            positions = jnp.arange(x.shape[1])
            q, k = rotate(q, positions, ROPE_BASE), rotate(k, positions, ROPE_BASE)
        return self.out(self.attend(q, k, v))

    def _decode(self, q: Array, k: Array, v: Array, starts: Array | None) -> Array:
        keys, values, index = self.cached_key, self.cached_value, self.cache_index
        if keys is None or values is None or index is None:
            raise ValueError("decode=True needs a cache: call init_cache first")
        start = index[...]
        positions = start + jnp.arange(q.shape[1])
        if self.rope:
            q, k = rotate(q, positions, ROPE_BASE), rotate(k, positions, ROPE_BASE)
        keys[...] = jax.lax.dynamic_update_slice(keys[...], k.astype(keys.dtype), (0, start, 0, 0))
        values[...] = jax.lax.dynamic_update_slice(values[...], v.astype(values.dtype), (0, start, 0, 0))
        index[...] = start + q.shape[1]
        visible = (jnp.arange(keys.shape[1]) <= positions[:, None])[None, None]
        if starts is not None:
            visible = visible & (jnp.arange(keys.shape[1]) >= starts[:, None, None, None])
        k, v = keys[...].astype(q.dtype), values[...].astype(q.dtype)
        return jax.nn.dot_product_attention(q, k, v, mask=visible)

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """``(B, T, N, H)``, each, to the same."""
        # cuDNN's fused kernel, the fastest there is, takes these; JAX does not choose it by itself
        served = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and q.shape[-1] in range(8, 129, 8)
        implementation = "cudnn" if self.fused and served else "xla"
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


class LinearAttention(SoftmaxAttention):
    """Causal linear attention with the feature map elu + 1 (Katharopoulos et al., arXiv 2006.16236).

    In its quadratic form: at these examples' lengths it is the faster one, and the result is the same.
    """

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        weights = jnp.einsum("btnh,bsnh->bnts", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
        weights = jnp.where(jnp.tri(q.shape[1], dtype=bool), weights, 0)
        weights /= weights.sum(-1, keepdims=True)  # > 0: so are the features
        return jnp.einsum("bnts,bsnh->btnh", weights, v)


class MLP(nnx.Module):
    """Two linear maps with a GELU between, four times as wide inside."""

    def __init__(self, features: int, *, dtype: Any, rngs: nnx.Rngs):
        self.up = nnx.Linear(features, 4 * features, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """``x + attention(norm(x))``, then, if it has one, ``x + mlp(norm(x))``."""

    def __init__(
        self,
        attention: str,
        features: int,
        num_heads: int,
        *,
        mlp: bool,
        rope: bool,
        normalize_qk: bool,
        ridge_lambda: float,
        fused: bool,
        dtype: Any,
        implementation: Any,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
        ours: dict[str, Any] = {"use_bias": False, "normalize_qk": normalize_qk, "rope": ROPE_BASE if rope else None}
        ours |= {"dtype": dtype, "implementation": implementation, "rngs": rngs}
        if attention == LLA:
            self.attention = LLAttention(num_heads, features, learn_ridge=True, ridge_lambda=ridge_lambda, **ours)
        elif attention == PARALLAX:
            self.attention = ParallaxAttention(num_heads, features, **ours)
        else:
            kind = {SOFTMAX: SoftmaxAttention, LINEAR: LinearAttention}[attention]
            self.attention = kind(
                num_heads, features, rope=rope, normalize_qk=normalize_qk, fused=fused, dtype=dtype, rngs=rngs
            )
        self.mlp_norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs) if mlp else nnx.data(None)
        self.mlp = MLP(features, dtype=dtype, rngs=rngs) if mlp else nnx.data(None)

    def __call__(self, x: Array, decode: bool = False, starts: Array | None = None) -> Array:
        x = x + self.attention(self.attention_norm(x), decode=decode, decode_starts=starts)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x


class Transformer(nnx.Module):
    """The blocks and the last norm: ``(B, T, features)`` to the same, causal. Embedding and read-out are the task's.

    Args:
        attention: one of ATTENTIONS.
        features: the width.
        num_layers: blocks.
        num_heads: divides ``features``.
        mlp: whether blocks have an MLP.
        rope: whether attention carries rotary positions.
        normalize_qk: whether queries and keys go through a LayerNorm.
        ridge_lambda: the initial ridge of ``LLAttention``.
        fused: of :class:`SoftmaxAttention`.
        dtype: of the computation; parameters are float32.
        implementation: of ``LLAttention`` and ``ParallaxAttention``.
        rngs: source of the initial parameters.
    """

    def __init__(
        self,
        attention: str,
        features: int,
        num_layers: int,
        num_heads: int,
        *,
        mlp: bool = True,
        rope: bool = True,
        normalize_qk: bool = False,
        ridge_lambda: float = 1.0,
        fused: bool = False,
        dtype: Any = jnp.float32,
        implementation: Any = None,
        rngs: nnx.Rngs,
    ):
        shared = {"mlp": mlp, "rope": rope, "normalize_qk": normalize_qk, "ridge_lambda": ridge_lambda, "fused": fused}
        shared |= {"dtype": dtype, "implementation": implementation, "rngs": rngs}
        self.features = features
        self.dtype = dtype
        self.blocks = nnx.List([Block(attention, features, num_heads, **shared) for _ in range(num_layers)])
        self.norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, decode: bool = False, starts: Array | None = None) -> Array:
        for block in self.blocks:
            x = block(x, decode=decode, starts=starts)
        return self.norm(x)

    def init_cache(self, batch: int, length: int) -> None:
        """Sets up empty caches for ``batch`` sequences of up to ``length`` tokens, to be fed with ``decode=True``."""
        for block in self.blocks:
            block.attention.init_cache((batch, length, self.features), self.dtype)


def watched(model: nnx.Module, *inputs: Array) -> tuple[Array, Residuals | None]:
    """The model's output, and what LLA's solves did: arrays ``(layers, B, T, N)``, None where no layer is LLA's."""
    model.set_attributes(sow_residuals=True, raise_if_not_found=False)
    out, sown = nnx.capture(model, nnx.Intermediate)(*inputs)
    layers = jax.tree.leaves(nnx.to_pure_dict(sown), is_leaf=lambda x: isinstance(x, Residuals))
    return out, jax.tree.map(lambda *xs: jnp.stack(xs), *layers) if layers else None


def compute_dtype(name: str, head_dim: int) -> Any:
    """The dtype of a name in DTYPES. Triton's float32 kernels need a minute to compile for wide heads, and spill."""
    if name == AUTO:
        return jnp.dtype(jnp.bfloat16 if head_dim >= 128 else jnp.float32)
    return jnp.dtype(name)


def count_parameters(params: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def decayed(params: Any) -> Any:
    """Where weight decay applies: to kernels and embeddings.

    Not to LLA's learned ridge, which decay would pull to an arbitrary value, nor to the norms' scales and to biases.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
