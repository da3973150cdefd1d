"""Local Linear Attention for JAX."""

from flashlla_jax.attention import default_implementation, lla_attention, lla_attention_and_omega
from flashlla_jax.interface import Residuals
from flashlla_jax.nn import LLAttention

__version__ = "0.1.0"

__all__ = ["LLAttention", "Residuals", "default_implementation", "lla_attention", "lla_attention_and_omega"]
