"""``ParallaxAttention`` for Flax NNX."""

from __future__ import annotations

from typing import Any, Unpack

from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array

from flashlla_jax.attention import Implementation
from flashlla_jax.nn import checks, core
from flashlla_jax.nn.nnx_module import CachedAttention
from flashlla_jax.nn.nnx_options import FlaxOptions
from flashlla_jax.parallax import parallax_attention


class ParallaxAttention(CachedAttention):
    """Parallax, called like :class:`flashlla_jax.LLAttention`: its probe is projected from the token.

    The parameters are those of ``flax.nnx.MultiHeadAttention`` and ``probe``, which starts at 0: a new layer is softmax
    attention exactly. So is one into which the checkpoint of a softmax model was loaded, until ``probe`` is trained.
    With the same ``rngs`` the other parameters start as Flax's do. What the layer refuses, and what differs from Flax,
    is as in :class:`flashlla_jax.LLAttention`: causal by default, no dropout on the weights, no ``sow_weights``.

    Example::

        layer = ParallaxAttention(num_heads=8, in_features=512, decode=False, rngs=nnx.Rngs(0))
        out = layer(x)  # x: [batch..., length, 512]

    Args:
        num_heads: Query heads; divides ``qkv_features``.
        in_features: Features of ``inputs_q``.
        qkv_features: Features of queries over all heads; None for ``in_features``.
        out_features: Features of the output; None for ``in_features``.
        num_kv_heads: Key/value heads, dividing ``num_heads``; None for ``num_heads``.
        in_kv_features: Features of ``inputs_k`` and ``inputs_v``; None for ``in_features``.
        rngs: Keys for the initialisers.
        attention_fn: Must be None: the module is its attention function.
        is_causal: As in :class:`flashlla_jax.LLAttention`, and so are the following.
        local_window_size: See :class:`flashlla_jax.LLAttention`.
        rope: See :class:`flashlla_jax.LLAttention`.
        qk_scale: See :func:`flashlla_jax.parallax_attention`.
        probe_kernel_init: Initialiser of the probe's kernel; its bias, if there are biases, starts at 0.
        implementation: See :func:`flashlla_jax.parallax_attention`; with a cache also of
            :func:`flashlla_jax.parallax_decode`.
        flax: The other arguments of ``flax.nnx.MultiHeadAttention``, with its defaults: ``FlaxOptions`` of
            ``nn/nnx_options.py`` lists them. ``dropout_rate`` must be 0.

    Raises:
        TypeError: ``local_window_size`` is not ints, or Flax does not know an argument.
        ValueError: A number is out of range, or the heads do not divide the features.
        NotImplementedError: ``dropout_rate`` or ``attention_fn`` is given.

    Attributes:
        probe: Projection of ``inputs_q``, kernel ``(in_features, num_heads, head_dim)``. With ``rope`` the probe is
            rotated as the queries are; ``normalize_qk`` leaves it as it is.
        query: As in :class:`flashlla_jax.LLAttention`, and so are the others.
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
        rope: float | None = None,
        qk_scale: float | None = None,
        probe_kernel_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008 (a pure function)
        implementation: Implementation | None = None,
        **flax: Unpack[FlaxOptions],
    ):
        checks.check_dropout(flax.get("dropout_rate", 0.0))
        checks.check_attention_fn(attention_fn)
        checks.check_flags(is_causal=is_causal)
        window = checks.check_local_window_size(local_window_size)
        sizes = (num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features)
        super().__init__(*sizes, attention_fn=parallax_attention, rngs=rngs, **flax)
        self.probe = nnx.LinearGeneral(
            in_features,
            (num_heads, self.head_dim),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=probe_kernel_init,
            use_bias=self.use_bias,
            precision=self.precision,
            promote_dtype=self.qkv_promote_dtype,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
            kernel_metadata=flax.get("kernel_metadata", {}),
            bias_metadata=flax.get("bias_metadata", {}),
            rngs=rngs,
        )
        self.is_causal = is_causal
        self.settings = core.Settings(
            dtype=self.dtype,
            rope=rope,
            qk_scale=qk_scale,
            precision=self.precision,
            implementation=implementation,
            local_window_size=window,
        )
        self.settings.check(self.head_dim)

    def of_method(self, inputs_q: Array, qkv_sharding: Any) -> dict[str, Any]:
        return {"probe": self.probe(inputs_q, out_sharding=qkv_sharding)}
