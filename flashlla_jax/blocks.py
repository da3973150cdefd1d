"""How the XLA path cuts a call: blocks of queries and keys, which of them see each other, and sums over them.

What the methods that are computed in blocks have in common; ``blockwise.py`` is Local Linear Attention,
``blockwise_parallax.py`` is Parallax. One block of queries is worked on at a time. What it has against the keys that it
can see lies in strips of (block, S), which are computed once and kept until the block is done. Loops over key blocks go
from the first to the last that any query of the block sees: what lies outside is never touched.

Within a query block every key is taken relative to the block's origin, and before that to its document's (origin.py).

A mask is cut with the queries: what one block of them sees is a boolean strip as large as a quarter of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax.interface import accumulation_dtype
from flashlla_jax.origin import anchored, origins
from flashlla_jax.sharding import varying_like
from flashlla_jax.visibility import Visibility

# Rows of a query block (times the query heads that share a key head) and of a key block. Measured on 2 CPU cores by
# benchmarks/xla.py: larger blocks waste more on the diagonal, smaller ones spend more on loop overhead.
_QUERY_BLOCK = 128
_KEY_BLOCK = 128


class Queries(NamedTuple):
    """The query side in I blocks; H = B * K key heads, R = rows times the G queries that share a key head.

    Inside a scan over the blocks the leading axis is gone.
    """

    q: Float[Array, "I H R D"]
    own: Float[Array, "I H R"] | Float[Array, "I H R D"]  # the ridge, or the probe
    anchor: Float[Array, "I H R D"] | None  # what the keys that a query sees are relative to
    origin: Float[Array, "I H 1 D"]  # and what its block takes them relative to then
    start: Int[Array, " I #H R"]
    end: Int[Array, " I #H R"]
    ids: Int[Array, " I #H R"] | None
    first: Int[Array, " I"]  # key blocks that some query of the block sees: from the first up to the stop
    stop: Int[Array, " I"]

    def relative(self) -> Array:
        """The queries relative to what their keys are. One after the other: the sum of both would be rounded."""
        return (self.q if self.anchor is None else self.q - self.anchor) - self.origin

    def taken_off(self) -> Array:
        """What relative keys take off a query's products with them."""
        return jnp.sum(self.q * (self.origin if self.anchor is None else self.anchor + self.origin), axis=-1)


class Keys(NamedTuple):
    """The key side in J blocks of C keys."""

    k: Float[Array, "J H C D"]
    v: Float[Array, "J H C Dv"]


@dataclass(frozen=True)
class Layout:
    """How (B, L, K * G, .) is cut: ``count`` blocks of ``rows``, the last one padded."""

    batch: int
    length: int
    heads: int  # key/value heads K
    group: int  # query heads per key/value head G
    count: int
    rows: int

    def cut(self, x: Array, mode: str = "edge") -> Array:
        """(B, L, K * G, ...) -> (count, B * K, G * rows, ...).

        The padding repeats the last row by default: in range, and it converges when that row does.
        """
        tail = x.shape[3:]
        x = jnp.pad(x, [(0, 0), (0, self.count * self.rows - self.length)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        x = x.reshape(self.batch, self.count, self.rows, self.heads, self.group, *tail)
        x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
        return x.reshape(self.count, self.batch * self.heads, self.group * self.rows, *tail)

    def join(self, x: Array) -> Array:
        """The inverse of ``cut``."""
        tail = x.shape[3:]
        x = x.reshape(self.count, self.batch, self.heads, self.group, self.rows, *tail)
        x = jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2))
        x = x.reshape(self.batch, self.count * self.rows, self.heads * self.group, *tail)
        return x[:, : self.length]


def _layout(x: Array, heads: int, block: int) -> Layout:
    batch, length, all_heads = x.shape[:3]
    count = -(-length // block)
    return Layout(batch, length, heads, all_heads // heads, count, -(-length // count))  # evenly: little padding


def layouts(query: Array, key: Array) -> tuple[Layout, Layout]:
    """Of the query side, and of the key side."""
    heads = key.shape[2]
    return _layout(query, heads, _QUERY_BLOCK), _layout(key, heads, _KEY_BLOCK)


def cut(query: Array, key: Array, value: Array, own: Array, seen: Visibility) -> tuple[Queries, Keys]:
    """Both sides in blocks, in the accumulation dtype; ``own`` is the method's own array of the queries."""
    queries, keys = layouts(query, key)
    dtype = accumulation_dtype(query.dtype)
    anchor, documents = None, anchored(key, seen)
    if documents is not None:
        key, anchor = documents.key, queries.cut(jnp.repeat(documents.anchor, queries.group, axis=2))
    origin = jnp.moveaxis(origins(key, seen, queries.rows), 1, 0)
    of_query = partial(_by_block, layout=queries)
    start, end = of_query(seen.start), of_query(seen.end)
    first, stop = _key_blocks(start, end, keys)
    return (
        Queries(
            q=queries.cut(query).astype(dtype),
            own=queries.cut(own).astype(dtype),
            anchor=anchor,
            origin=origin.reshape(queries.count, -1, 1, key.shape[-1]),
            start=start,
            end=end,
            ids=None if seen.query_ids is None else of_query(seen.query_ids),
            first=first,
            stop=stop,
        ),
        Keys(k=keys.cut(key).astype(dtype), v=keys.cut(value).astype(dtype)),
    )


def _by_block(x: Array, layout: Layout) -> Array:
    """A number for every query, (1 or B, T), in blocks: (I, 1 or H, R)."""
    x = jnp.pad(x, [(0, 0), (0, layout.count * layout.rows - layout.length)], mode="edge")
    x = jnp.moveaxis(x.reshape(x.shape[0], layout.count, layout.rows), 1, 0)
    return jnp.tile(x if x.shape[1] == 1 else jnp.repeat(x, layout.heads, axis=1), (1, 1, layout.group))


def _key_blocks(start: Array, end: Array, keys: Layout) -> tuple[Array, Array]:
    """The first key block that some query of a block sees, and one more than the last; (I, H, R) -> (I,) each."""
    blind = start >= end
    start = jnp.where(blind, keys.length, start)
    stop = (jnp.max(jnp.where(blind, 0, end), axis=(1, 2), initial=0) + keys.rows - 1) // keys.rows
    return jnp.minimum(jnp.min(start, axis=(1, 2), initial=keys.length) // keys.rows, stop), stop


def _strip_of_mask(mask: Array, i: Array, queries: Layout, keys: Layout) -> Bool[Array, "J H R C"]:
    """The mask of all keys for the queries of block i."""
    columns = keys.count * keys.rows
    if mask.shape[2] > 1:
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, queries.count * queries.rows - queries.length), (0, 0)], mode="edge")
        mask = lax.dynamic_slice_in_dim(mask, i * queries.rows, queries.rows, axis=2)
    if mask.shape[3] > 1:
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, 0), (0, columns - mask.shape[3])])
    mask = jnp.broadcast_to(mask, (queries.batch, queries.heads * queries.group, queries.rows, columns))
    shape = (queries.batch * queries.heads, queries.group * queries.rows, keys.count, keys.rows)
    return jnp.moveaxis(mask.reshape(shape), 2, 0)


def _visible(
    queries: Queries, key_ids: Array | None, mask: Array | None, columns: int, j: Array
) -> Bool[Array, "#H R C"]:
    """Which keys of block j the queries of a block see."""
    column = (j * columns + jnp.arange(columns, dtype=jnp.int32))[None, None]
    visible = (queries.start[..., None] <= column) & (column < queries.end[..., None])
    if queries.ids is not None and key_ids is not None:
        visible = visible & (queries.ids[..., None] == key_ids[j][:, None])
    return visible if mask is None else visible & mask[j]


def product_precision(dtype: jnp.dtype, precision: lax.Precision) -> lax.Precision:
    """Of the products, which are of float32 arrays for 16-bit inputs.

    These keep their low halves at DEFAULT, too, where a product would round them to bfloat16 (TPU).
    """
    narrow = dtype.itemsize == 2 and precision == lax.Precision.DEFAULT
    return lax.Precision.HIGH if narrow else precision


def rows_by_keys(q: Array, k: Array, dot: lax.Precision) -> Array:
    """(H, R, D), (H, C, D) -> (H, R, C)."""
    return jnp.einsum("hrd,hcd->hrc", q, k, precision=dot)


def rows_by_features(t: Array, k: Array, dot: lax.Precision) -> Array:
    """(H, R, C), (H, C, D) -> (H, R, D)."""
    return jnp.einsum("hrc,hcd->hrd", t, k, precision=dot)


def keys_by_features(t: Array, q: Array, dot: lax.Precision) -> Array:
    """(H, R, C), (H, R, D) -> (H, C, D)."""
    return jnp.einsum("hrc,hrd->hcd", t, q, precision=dot)


class Strips(NamedTuple):
    """One query block against every key block that it visits; the other key blocks hold old values.

    Each query block hands them to the next. So a block costs no more than the key blocks that it visits.
    """

    k: Float[Array, "J H C D"]  # relative to the block's origin
    weights: Float[Array, "J H R C"]  # p_ij
    kx: Float[Array, "J H R C"]  # k_j.x_i (or, of the probe, k_j.r_i) less about its mean
    gamma: Float[Array, "J H R C"] | None  # in the backward pass


class Visits(Protocol):
    """A block of queries: it visits the key blocks from ``first`` up to ``stop``."""

    @property
    def first(self) -> Array: ...
    @property
    def stop(self) -> Array: ...


_Sum = TypeVar("_Sum")  # an array, or a tuple of them


def add_up(block: Visits, start: _Sum, term: Callable[[Array], _Sum]) -> _Sum:
    """start + the sum of term(j) over the key blocks that the query block visits."""
    return lax.fori_loop(block.first, block.stop, lambda j, acc: jax.tree.map(jnp.add, acc, term(j)), start)


def logits(
    strips: Strips, queries: Queries, keys: Keys, visible: Callable[[Array], Array], scale: float, dot: lax.Precision
) -> tuple[Strips, Array]:
    """The block's relative keys, its logits in place of weights, and the largest of every row."""

    def term(j: Array, carry: tuple[Strips, Array]) -> tuple[Strips, Array]:
        strips, top = carry
        k = keys.k[j] - queries.origin
        s = jnp.where(visible(j), scale * rows_by_keys(queries.q, k, dot), -jnp.inf)
        strips = strips._replace(k=strips.k.at[j].set(k), weights=strips.weights.at[j].set(s))
        return strips, jnp.maximum(top, jnp.max(s, axis=-1))

    return lax.fori_loop(queries.first, queries.stop, term, (strips, jnp.full_like(queries.q[..., 0], -jnp.inf)))


def normalised(strips: Strips, queries: Queries, omega: Array) -> tuple[Strips, Array]:
    """With weights that sum to 1, and omega, or 1 for a query that sees no key."""
    total = jnp.where(omega > 0, omega, 1)

    def divide(j: Array, weights: Array) -> Array:
        return weights.at[j].set(weights[j] / total[..., None])

    weights = lax.fori_loop(queries.first, queries.stop, divide, strips.weights)
    return strips._replace(weights=weights), total


def empty_strips(queries: Queries, keys: Keys, backward: bool) -> Strips:
    """The strips for the first block of queries; ``backward``: with a place for gamma."""
    blocks, heads, columns, _ = keys.k.shape
    strip = jnp.zeros_like(queries.q, shape=(blocks, heads, queries.q.shape[2], columns))
    return Strips(jnp.zeros_like(keys.k), strip, strip, strip if backward else None)


def visibility_of_blocks(
    seen: Visibility, queries: Layout, keys: Layout
) -> Callable[[Array, Queries], Callable[[Array], Array]]:
    """Which keys of block j the queries of block i see, by i and the block, then by j."""
    key_ids = None if seen.key_ids is None else _by_block(seen.key_ids, keys)

    def of(i: Array, block: Queries) -> Callable[[Array], Array]:
        mask = None if seen.mask is None else _strip_of_mask(seen.mask, i, queries, keys)
        return partial(_visible, block, key_ids, mask, keys.rows)

    return of


Step = Callable[..., Any]  # of one block of queries, by a method


def forward_by_blocks(
    step: Step, query: Array, key: Array, value: Array, own: Array, seen: Visibility
) -> tuple[Array, Any, Any]:
    """The output, in the query's dtype, and the method's saved arrays and residuals.

    ``step(strips, block, keys, visible)`` gives the strips and these three of a block.
    """
    queries, keys = cut(query, key, value, own, seen)
    layout, key_layout = layouts(query, key)
    visible = visibility_of_blocks(seen, layout, key_layout)

    def run(strips: Strips, of: tuple[Array, Queries]) -> tuple[Strips, tuple[Array, Any, Any]]:
        i, block = of
        return step(strips, block, keys, visible(i, block))

    start = varying_like(empty_strips(queries, keys, backward=False), (query, key, value, own, seen))
    _, out = lax.scan(run, start, (jnp.arange(layout.count, dtype=jnp.int32), queries))
    o, saved, residuals = jax.tree.map(layout.join, out)
    return o.astype(query.dtype), saved, residuals


def backward_by_blocks(
    step: Step, query: Array, key: Array, value: Array, own: Array, seen: Visibility, saved: Any, g: Array
) -> tuple[Array, Array, Array, Array]:
    """The gradients of query, key, value and ``own`` for the cotangent g of the output, in their dtypes.

    ``step((strips, grads), block, keys, visible, saved, g)`` gives the pair, with the block's share of dk and dv in
    ``grads``, and the block's other two gradients.
    """
    queries, keys = cut(query, key, value, own, seen)
    layout, key_layout = layouts(query, key)
    visible = visibility_of_blocks(seen, layout, key_layout)
    of_queries = layout.cut(g, mode="constant").astype(queries.q.dtype)  # padding adds nothing to dk and dv

    def run(carry: tuple[Strips, Keys], of: tuple[Array, Queries, Any, Array]) -> tuple[tuple[Strips, Keys], Any]:
        i, block, of_saved, of_g = of
        return step(carry, block, keys, visible(i, block), of_saved, of_g)

    start = (empty_strips(queries, keys, backward=True), jax.tree.map(jnp.zeros_like, keys))
    start = varying_like(start, (query, key, value, own, seen, saved, of_queries))
    blocks = (jnp.arange(layout.count, dtype=jnp.int32), queries, jax.tree.map(layout.cut, saved), of_queries)
    (_, grads), (dq, down) = lax.scan(run, start, blocks)
    return (
        layout.join(dq).astype(query.dtype),
        key_layout.join(grads.k).astype(key.dtype),
        key_layout.join(grads.v).astype(value.dtype),
        layout.join(down).astype(own.dtype),
    )
