"""Local Linear Attention and Parallax for JAX."""

from typing import TYPE_CHECKING, Any

from flashlla_jax.attention import default_implementation, lla_attention, lla_attention_and_omega
from flashlla_jax.decode import lla_decode, parallax_decode
from flashlla_jax.interface import ParallaxResiduals, Residuals
from flashlla_jax.parallax import parallax_attention

if TYPE_CHECKING:
    from flashlla_jax.nn import LLAttention, ParallaxAttention

__version__ = "0.1.0"

__all__ = [
    "LLAttention",
    "ParallaxAttention",
    "ParallaxResiduals",
    "Residuals",
    "default_implementation",
    "lla_attention",
    "lla_attention_and_omega",
    "lla_decode",
    "parallax_attention",
    "parallax_decode",
]


def __getattr__(name: str) -> Any:
    if name in ("LLAttention", "ParallaxAttention"):  # Flax is loaded by those who use it
        from flashlla_jax import nn

        return getattr(nn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
