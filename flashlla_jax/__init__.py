"""Local Linear Attention for JAX."""

from flashlla_jax.attention import default_implementation, lla_attention, lla_attention_and_omega
from flashlla_jax.interface import Residuals

__version__ = "0.1.0"

__all__ = ["Residuals", "default_implementation", "lla_attention", "lla_attention_and_omega"]
