"""Local Linear Attention in Flax: the NNX module, its Linen twin in ``flashlla_jax.nn.linen``, and ``attention_fn``.

And Parallax: ``ParallaxAttention``, with its twin in the same place.
"""

from flashlla_jax.nn.adaptors import attention_fn
from flashlla_jax.nn.nnx_module import LLAttention
from flashlla_jax.nn.nnx_parallax import ParallaxAttention

__all__ = ["LLAttention", "ParallaxAttention", "attention_fn"]
