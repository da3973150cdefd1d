"""Local Linear Attention in Flax: the NNX module, its Linen twin in ``flashlla_jax.nn.linen``, and ``attention_fn``."""

from flashlla_jax.nn.adaptors import attention_fn
from flashlla_jax.nn.nnx_module import LLAttention

__all__ = ["LLAttention", "attention_fn"]
