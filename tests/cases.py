"""The inputs that every implementation is put through, and the one measure of error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flashlla_jax import lla_attention

RIDGES = (10.0, 1.0, 0.1, 0.01)
GRADIENTS = ("dq", "dk", "dv", "dlambda")


class Inputs(NamedTuple):
    """query, key, value, and the cotangent of the output."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array


@dataclass(frozen=True)
class Shape:
    """The shapes of one call; ``kwargs`` go to ``lla_attention``."""

    batch: int = 1
    queries: int = 64
    keys: int = 64
    heads: int = 1
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 16
    is_causal: bool = True

    def __str__(self) -> str:
        return (
            f"{'causal' if self.is_causal else 'full'}-B{self.batch}-T{self.queries}-S{self.keys}"
            f"-N{self.heads}-K{self.kv_heads}-D{self.dim}-Dv{self.value_dim}"
        )

    @property
    def ridge(self) -> tuple[int, int, int]:
        return (self.batch, self.queries, self.heads)


# The must-hold list of the accuracy tests: one causal shape with grouped heads and the usual head dimension, over a
# few blocks and a ragged one; one full shape with different lengths and odd dimensions.
KIND_SHAPES = (
    Shape(1, 200, 200, 2, 1, 64, 64),
    Shape(2, 70, 150, 2, 2, 24, 40, is_causal=False),
)


def _iid(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return q, k


def _anisotropic(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Feature scales over two decades."""
    scale = np.logspace(0.5, -1.5, q.shape[-1])
    return q * scale, k * scale


def _peaky(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits with a standard deviation of 8: a few keys hold nearly all the weight."""
    return 4 * q, 2 * k


def _shifted(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A common offset ten times the keys' spread."""
    return q, k + 10 * rng.normal(size=k.shape[-1])


def _near_duplicate(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Groups of four keys that differ by 1e-3: the covariance is nearly singular."""
    return q, k[:, np.arange(k.shape[1]) // 4 * 4] + 1e-3 * k


KINDS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "iid": _iid,
    "anisotropic": _anisotropic,
    "peaky": _peaky,
    "shifted": _shifted,
    "near_duplicate": _near_duplicate,
}


def draw(shape: Shape, dtype: Any = jnp.float64, kind: str = "iid", seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(shape.batch, shape.queries, shape.heads, shape.dim))
    k = rng.normal(size=(shape.batch, shape.keys, shape.kv_heads, shape.dim))
    v = rng.normal(size=(shape.batch, shape.keys, shape.kv_heads, shape.value_dim))
    g = rng.normal(size=(shape.batch, shape.queries, shape.heads, shape.value_dim))
    q, k = KINDS[kind](q, k, rng)
    return Inputs(*(jnp.asarray(x).astype(dtype) for x in (q, k, v, g)))


def relative_error(got: jax.Array, truth: jax.Array, floor: float = 0.0) -> float:
    """||got - truth|| / max(||truth||, floor) in float64; NaN where either holds one, which passes no bound."""
    got, truth = (np.asarray(x, np.float64) for x in (got, truth))
    assert got.shape == truth.shape
    return float(np.linalg.norm(got - truth) / max(float(np.linalg.norm(truth)), floor))


@cache
def outputs_and_gradients(attend: Callable[..., Any], **kwargs: Any) -> Callable[..., dict[str, jax.Array]]:
    """jit-ed ``(inputs, ridge) -> {o, dq, dk, dv, dlambda}``, compiled once per options, dtype and shape."""

    @jax.jit
    def run(inputs: Inputs, ridge: jax.Array) -> dict[str, jax.Array]:
        def call(q: jax.Array, k: jax.Array, v: jax.Array, lam: jax.Array) -> jax.Array:
            return attend(q, k, v, ridge_lambda=lam, **kwargs)

        o, vjp = jax.vjp(call, inputs.q, inputs.k, inputs.v, ridge)
        return dict(zip(("o", *GRADIENTS), (o, *vjp(inputs.g)), strict=True))

    return run


def evaluate(inputs: Inputs, ridge: jax.Array, attend: Callable[..., Any] = lla_attention, **kwargs: Any):
    return outputs_and_gradients(attend, **kwargs)(inputs, ridge)


def truth(inputs: Inputs, ridge: jax.Array, **kwargs: Any) -> dict[str, jax.Array]:
    """The float64 reference on these very inputs, as rounded to their dtype."""
    wide = Inputs(*(x.astype(jnp.float64) for x in inputs))
    return evaluate(wide, ridge.astype(jnp.float64), implementation="reference", **kwargs)
