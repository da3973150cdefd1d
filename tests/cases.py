"""The inputs that every implementation is put through, and the one measure of error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flashlla_jax import lla_attention, operator
from flashlla_jax.arguments import check_arrays, check_hiding, check_options, check_ridge
from flashlla_jax.context_parallel import local_visibility
from flashlla_jax.sharding import by_shard
from flashlla_jax.visibility import dense, visibility

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


def _low_rank(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Eight directions and a common mean, plus noise of 0.1: as trained keys are, more or less."""
    dim = k.shape[-1]
    directions, mean = rng.normal(size=(8, dim)) / 8**0.5, rng.normal(size=dim)

    def low(x: np.ndarray) -> np.ndarray:
        return rng.normal(size=(*x.shape[:-1], 8)) @ directions + mean + 0.1 * x

    return low(q), low(k)


def _heavy_tailed(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Student's t with three degrees of freedom."""
    return q, rng.standard_t(3, size=k.shape)


def _offset(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A common offset of 4 in every feature of queries and keys: with it come logits that few keys dominate."""
    return q + 4, k + 4


def _varied(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every key times exp N(0, 1): a few long ones, which hold nearly all the weight of most rows."""
    return q, k * np.exp(rng.normal(size=(*k.shape[:-1], 1)))


Kind = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def sink(offset: float) -> Kind:
    """The first key lies where all queries look, as in trained models."""

    def make(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        k = k.copy()
        k[:, 0] += offset
        return q + 0.5, k

    return make


KINDS: dict[str, Kind] = {
    "iid": _iid,
    "anisotropic": _anisotropic,
    "peaky": _peaky,
    "shifted": _shifted,
    "near_duplicate": _near_duplicate,
    "low_rank": _low_rank,
    "heavy_tailed": _heavy_tailed,
    "offset": _offset,
}

# What the solves of a whole row are put through as well.
ALL_KINDS = KINDS | {"varied": _varied, "sink": sink(3)}


def draw(shape: Shape, dtype: Any = jnp.float64, kind: str | Kind = "iid", seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(shape.batch, shape.queries, shape.heads, shape.dim))
    k = rng.normal(size=(shape.batch, shape.keys, shape.kv_heads, shape.dim))
    v = rng.normal(size=(shape.batch, shape.keys, shape.kv_heads, shape.value_dim))
    g = rng.normal(size=(shape.batch, shape.queries, shape.heads, shape.value_dim))
    q, k = (ALL_KINDS[kind] if isinstance(kind, str) else kind)(q, k, rng)
    return Inputs(*(jnp.asarray(x).astype(dtype) for x in (q, k, v, g)))


def relative_error(got: jax.Array, truth: jax.Array, floor: float = 0.0) -> float:
    """||got - truth|| / max(||truth||, floor) in float64; NaN where either holds one, which passes no bound."""
    got, truth = (np.asarray(x, np.float64) for x in (got, truth))
    assert got.shape == truth.shape
    return float(np.linalg.norm(got - truth) / max(float(np.linalg.norm(truth)), floor))


@dataclass(frozen=True)
class Hidden:
    """A way of hiding keys: a shape, and the arguments that say so, the static ones apart from the arrays."""

    shape: Shape
    static: tuple[tuple[str, Any], ...]
    arrays: Callable[[Shape, np.random.Generator], dict[str, Any]] = lambda shape, rng: {}

    def given(self) -> dict[str, Any]:
        """The arrays, by argument."""
        return self.arrays(self.shape, np.random.default_rng(3))

    def dense(self) -> np.ndarray:
        """(B, N, T, S), True where a key is visible."""
        shape, inputs = self.shape, draw(self.shape)
        hiding = check_hiding(inputs.q, inputs.k, **{"is_causal": shape.is_causal, **dict(self.static), **self.given()})
        shown = dense(visibility(hiding, shape.queries, shape.keys), shape.keys)
        return np.broadcast_to(np.asarray(shown), (shape.batch, shape.heads, shape.queries, shape.keys))


_SQUARE = Shape(2, 140, 140, 4, 2, 8, 12)
_WIDE = Shape(2, 70, 150, 2, 1, 8, 8)
_TALL = Shape(2, 150, 60, 2, 2, 8, 8)
_FULL = Shape(2, 140, 140, 4, 2, 8, 12, is_causal=False)


def _runs(batch: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Packed documents: ids that rise along the row."""
    return np.sort(rng.integers(0, 6, (batch, length)), axis=1)


def _pair(shape: Shape, rng: np.random.Generator, ids: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return ids(shape.batch, shape.queries, rng), ids(shape.batch, shape.keys, rng)


def _scattered(batch: int, length: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-1, 2, (batch, length))


def _random_mask(*axes: str) -> Callable[..., dict[str, Any]]:
    """A third visible; with causality many queries see few keys, and some none."""

    def arrays(shape: Shape, rng: np.random.Generator) -> dict[str, Any]:
        sizes = {"B": shape.batch, "N": shape.heads, "T": shape.queries, "S": shape.keys, "1": 1}
        return {"mask": rng.random([sizes[axis] for axis in axes]) < 0.3}

    return arrays


def _some_of_all(shape: Shape, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "segment_ids": _runs(shape.batch, shape.keys, rng),
        "key_value_seq_lengths": np.array([shape.keys - 9, shape.keys]),
        "query_seq_lengths": np.array([shape.queries, shape.queries - 30]),
        "mask": rng.random((shape.batch, 1, shape.queries, shape.keys)) < 0.6,
    }


HIDDEN = {
    "window of itself": Hidden(_SQUARE, (("local_window_size", 0),)),
    "window to the left": Hidden(_SQUARE, (("local_window_size", (33, 0)),)),
    "window of both sides": Hidden(_FULL, (("local_window_size", (20, 40)),)),
    "window, more keys": Hidden(_WIDE, (("local_window_size", (40, 0)),)),
    "window wider than all": Hidden(_SQUARE, (("local_window_size", 10**12),)),
    "packed": Hidden(_SQUARE, (), lambda shape, rng: {"segment_ids": _runs(shape.batch, shape.keys, rng)}),
    "packed, full": Hidden(_FULL, (), lambda shape, rng: {"segment_ids": _runs(shape.batch, shape.keys, rng)}),
    "packed, more keys": Hidden(_WIDE, (), lambda shape, rng: {"segment_ids": _pair(shape, rng, _runs)}),
    "interleaved": Hidden(_SQUARE, (), lambda shape, rng: {"segment_ids": _scattered(shape.batch, shape.keys, rng)}),
    "interleaved, more queries": Hidden(
        dataclasses.replace(_TALL, is_causal=False),
        (),
        lambda shape, rng: {"segment_ids": _pair(shape, rng, _scattered)},
    ),
    "key lengths 0 and 1": Hidden(_SQUARE, (), lambda shape, rng: {"key_value_seq_lengths": np.array([0, 1])}),
    "key lengths, some and all": Hidden(
        _FULL, (), lambda shape, rng: {"key_value_seq_lengths": np.array([77, shape.keys])}
    ),
    "query lengths": Hidden(_WIDE, (), lambda shape, rng: {"query_seq_lengths": np.array([0, 33])}),
    "at the start": Hidden(_WIDE, (("query_offset", 0),)),
    "in the middle": Hidden(_TALL, (("query_offset", 7),)),
    "before the start": Hidden(_SQUARE, (("query_offset", -30),)),
    "traced offset": Hidden(_WIDE, (), lambda shape, rng: {"query_offset": np.int32(40)}),
    "an offset for each": Hidden(
        _WIDE, (("local_window_size", (60, 0)),), lambda shape, rng: {"query_offset": np.array([-10, 140])}
    ),
    "beyond the end": Hidden(
        _WIDE, (("local_window_size", 5),), lambda shape, rng: {"query_offset": np.array([400, 120])}
    ),
    "mask": Hidden(_SQUARE, (), _random_mask(*"BNTS")),
    "mask of the keys": Hidden(_FULL, (), _random_mask(*"B11S")),
    "mask of the queries": Hidden(_SQUARE, (), _random_mask(*"1NT1")),
    "mask of the heads": Hidden(_FULL, (), _random_mask(*"BN11")),
    "mask that hides all": Hidden(_SQUARE, (), lambda shape, rng: {"mask": np.zeros((1, 1, 1, 1), bool)}),
    "all at once": Hidden(_SQUARE, (("local_window_size", (50, 0)),), _some_of_all),
    "all at once, scattered": Hidden(
        _WIDE,
        (("query_offset", 60), ("local_window_size", 45)),
        lambda shape, rng: _some_of_all(shape, rng) | {"segment_ids": _pair(shape, rng, _scattered)},
    ),
}


def operate(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    ridge_lambda: Any = 10.0,
    only: Any = None,
    plan: Any = None,
    precision: Any = None,
    is_causal: bool = True,
    cg_rtol: float | None = None,
    cg_use_preconditioner: bool = False,
    **hiding: Any,
) -> jax.Array:
    """``lla_attention`` of rank 4 without its choice of an implementation: any side on any machine, with any plan."""
    query, key, value = check_arrays(query, key, value)
    hidden = check_hiding(query, key, is_causal=is_causal, **hiding)
    options = check_options(query, None, 1e-12, None, cg_rtol, None, cg_use_preconditioner, precision)
    arrays = {name: x for name, x in hidden._asdict().items() if name != "window" and not isinstance(x, int | None)}

    def attend(q: Any, k: Any, v: Any, lam: Any, arrays: dict[str, Any], axes: Any) -> Any:
        hiding = hidden._replace(**arrays)
        of_all = axes is None
        seen = (visibility if of_all else partial(local_visibility, axes=axes))(hiding, q.shape[1], k.shape[1])
        return operator.attend(q, k, v, lam, seen, options, only=only, plan=plan, axes=axes)

    return by_shard(attend, query, key, value, check_ridge(ridge_lambda, query), arrays, lengthwise=True)[0]


@cache
def outputs_and_gradients(attend: Callable[..., Any], **kwargs: Any) -> Callable[..., dict[str, jax.Array]]:
    """jit-ed ``(inputs, ridge, hidden) -> {o, dq, dk, dv, dlambda}``, compiled once per options, dtype and shape."""

    @jax.jit
    def run(inputs: Inputs, ridge: jax.Array, hidden: dict[str, Any]) -> dict[str, jax.Array]:
        def call(q: jax.Array, k: jax.Array, v: jax.Array, lam: jax.Array) -> jax.Array:
            return attend(q, k, v, ridge_lambda=lam, **hidden, **kwargs)

        o, vjp = jax.vjp(call, inputs.q, inputs.k, inputs.v, ridge)
        return dict(zip(("o", *GRADIENTS), (o, *vjp(inputs.g)), strict=True))

    return run


def evaluate(
    inputs: Inputs,
    ridge: jax.Array,
    attend: Callable[..., Any] = lla_attention,
    hidden: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """The output and all gradients; ``hidden`` are the arrays that hide keys, by argument."""
    return outputs_and_gradients(attend, **kwargs)(inputs, ridge, hidden or {})


def truth(inputs: Inputs, ridge: jax.Array, **kwargs: Any) -> dict[str, jax.Array]:
    """The float64 reference on these very inputs, as rounded to their dtype."""
    wide = Inputs(*(x.astype(jnp.float64) for x in inputs))
    return evaluate(wide, ridge.astype(jnp.float64), implementation="reference", **kwargs)
