"""Local Linear Attention in blocks of queries and keys, in plain XLA: any platform, O(S D) memory.

The centred form and its gradient (design.md section 1; the symbols are the same):

    p_ij = softmax_j(qk_scale q_i.k_j),  kbar_i = sum_j p_ij k_j,  kc_ij = k_j - kbar_i,  m_i = kbar_i - q_i
    A_i = sum_j p_ij kc_ij kc_ij^T + lambda_i I,  x_i = A_i^-1 m_i,  a_ij = 1 - kc_ij.x_i,  o_i = sum_j p_ij a_ij v_j

    gamma_ij = g_i.v_j,  gbar_i = sum_j p_ij gamma_ij,  y_i = sum_j p_ij (gamma_ij - gbar_i) kc_ij,  u_i = A_i^-1 y_i
    b_ij = gamma_ij - gbar_i - kc_ij.u_i,  ds_ij = p_ij (a_ij b_ij + lambda_i u_i.x_i)
    dq_i = qk_scale sum_j ds_ij k_j + u_i
    dk_j = sum_i (qk_scale ds_ij q_i - p_ij b_ij x_i - p_ij a_ij u_i),  dv_j = sum_i p_ij a_ij g_i,  dlambda_i = u_i.x_i

One block of queries is worked on at a time. Its softmax weights against the keys that it can see, a (block, S) strip,
are computed once and kept until the block is done, so a conjugate-gradient step costs two products. Loops over key
blocks go from the first to the last that any query of the block sees: what lies outside is never touched.

Within a query block every key is taken relative to the block's origin (origin.py).

a_ij sums to 1 under p by definition, and b_ij to 0. So both are taken as what is left of products when their mean under
p is subtracted. A product of 1e5 is good to 1e-2 in float32, and so would be that mean: about as much, kbar.x, is
subtracted first. Where one key holds all the weight, or the products are huge, the large parts then cancel exactly.

A mask is cut with the queries: what one block of them sees is a boolean strip as large as a quarter of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax import conjugate_gradient
from flashlla_jax.interface import Options, Residuals, accumulation_dtype
from flashlla_jax.origin import origins
from flashlla_jax.sharding import varying_like
from flashlla_jax.visibility import Visibility

# Rows of a query block (times the query heads that share a key head) and of a key block. Measured on 2 CPU cores by
# benchmarks/xla.py: larger blocks waste more on the diagonal, smaller ones spend more on loop overhead.
_QUERY_BLOCK = 128
_KEY_BLOCK = 128


class _Queries(NamedTuple):
    """The query side in I blocks; H = B * K key heads, R = rows times the G queries that share a key head.

    Inside a scan over the blocks the leading axis is gone.
    """

    q: Float[Array, "I H R D"]
    lam: Float[Array, "I H R"]
    origin: Float[Array, "I H 1 D"]
    start: Int[Array, " I #H R"]
    end: Int[Array, " I #H R"]
    ids: Int[Array, " I #H R"] | None
    first: Int[Array, " I"]  # key blocks that some query of the block sees: from the first up to the stop
    stop: Int[Array, " I"]


class _Keys(NamedTuple):
    """The key side in J blocks of C keys."""

    k: Float[Array, "J H C D"]
    v: Float[Array, "J H C Dv"]


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; relative to the origin of the query's block."""

    top: Float[Array, "B T N"]  # the largest logit
    kbar: Float[Array, "B T N D"]
    x: Float[Array, "B T N D"]
    damping: Float[Array, "B T N"]


@dataclass(frozen=True)
class _Layout:
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


def _layout(x: Array, heads: int, block: int) -> _Layout:
    batch, length, all_heads = x.shape[:3]
    count = -(-length // block)
    return _Layout(batch, length, heads, all_heads // heads, count, -(-length // count))  # evenly: little padding


def _layouts(query: Array, key: Array) -> tuple[_Layout, _Layout]:
    heads = key.shape[2]
    return _layout(query, heads, _QUERY_BLOCK), _layout(key, heads, _KEY_BLOCK)


def _cut(query: Array, key: Array, value: Array, lam: Array, seen: Visibility) -> tuple[_Queries, _Keys]:
    queries, keys = _layouts(query, key)
    dtype = accumulation_dtype(query.dtype)
    origin = jnp.moveaxis(origins(key, seen, queries.rows), 1, 0)
    by_block = partial(_by_block, layout=queries)
    start, end = by_block(seen.start), by_block(seen.end)
    first, stop = _key_blocks(start, end, keys)
    return (
        _Queries(
            q=queries.cut(query).astype(dtype),
            lam=queries.cut(lam).astype(dtype),
            origin=origin.reshape(queries.count, -1, 1, key.shape[-1]),
            start=start,
            end=end,
            ids=None if seen.query_ids is None else by_block(seen.query_ids),
            first=first,
            stop=stop,
        ),
        _Keys(k=keys.cut(key).astype(dtype), v=keys.cut(value).astype(dtype)),
    )


def _by_block(x: Array, layout: _Layout) -> Array:
    """What is known of every query, (1 or B, T), in the shape of their blocks: (I, 1 or H, R)."""
    x = jnp.pad(x, [(0, 0), (0, layout.count * layout.rows - layout.length)], mode="edge")
    x = jnp.moveaxis(x.reshape(x.shape[0], layout.count, layout.rows), 1, 0)
    return jnp.tile(x if x.shape[1] == 1 else jnp.repeat(x, layout.heads, axis=1), (1, 1, layout.group))


def _key_blocks(start: Array, end: Array, keys: _Layout) -> tuple[Array, Array]:
    """The first key block that some query of a block sees, and one more than the last; (I, H, R) -> (I,) each."""
    blind = start >= end
    start = jnp.where(blind, keys.length, start)
    stop = (jnp.max(jnp.where(blind, 0, end), axis=(1, 2), initial=0) + keys.rows - 1) // keys.rows
    return jnp.minimum(jnp.min(start, axis=(1, 2), initial=keys.length) // keys.rows, stop), stop


def _strip_of_mask(mask: Array, i: Array, queries: _Layout, keys: _Layout) -> Bool[Array, "J H R C"]:
    """What the mask shows of all keys to the queries of block i."""
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
    queries: _Queries, key_ids: Array | None, mask: Array | None, columns: int, j: Array
) -> Bool[Array, "#H R C"]:
    """What the queries of a block see of key block j."""
    column = (j * columns + jnp.arange(columns, dtype=jnp.int32))[None, None]
    visible = (queries.start[..., None] <= column) & (column < queries.end[..., None])
    if queries.ids is not None and key_ids is not None:
        visible = visible & (queries.ids[..., None] == key_ids[j][:, None])
    return visible if mask is None else visible & mask[j]


class _Tolerances(NamedTuple):
    rtol: float
    atol: float
    dot: lax.Precision


def _tolerances(dtype: jnp.dtype, options: Options) -> _Tolerances:
    """The solver's stop, |r|^2 <= rtol max(atol, |rhs|^2), and the precision of its products, by input dtype.

    The gradient of a row that is dominated by a few keys amplifies what the solves leave: 16-bit inputs stop at
    |r| = 1e-5 |rhs|, where peaky keys at lambda = 0.1 are down to the rounding of the inputs (at 3e-4 their dq is 5 %
    off), wider ones near what their own rounding lets conjugate gradients reach.
    """
    rtol = {4: 1e-13, 8: 1e-24}.get(dtype.itemsize, 1e-10)
    # float32 intermediates of 16-bit inputs keep their low halves where a product would round them to bfloat16 (TPU)
    narrow = dtype.itemsize == 2 and options.precision == lax.Precision.DEFAULT
    return _Tolerances(
        rtol=rtol if options.solver.rtol is None else options.solver.rtol,
        atol=0.0 if options.solver.atol is None else options.solver.atol,
        dot=lax.Precision.HIGH if narrow else options.precision,
    )


def _rows_by_keys(q: Array, k: Array, dot: lax.Precision) -> Array:
    """(H, R, D), (H, C, D) -> (H, R, C)."""
    return jnp.einsum("hrd,hcd->hrc", q, k, precision=dot)


def _rows_by_features(t: Array, k: Array, dot: lax.Precision) -> Array:
    """(H, R, C), (H, C, D) -> (H, R, D)."""
    return jnp.einsum("hrc,hcd->hrd", t, k, precision=dot)


def _keys_by_features(t: Array, q: Array, dot: lax.Precision) -> Array:
    """(H, R, C), (H, R, D) -> (H, C, D)."""
    return jnp.einsum("hrc,hrd->hcd", t, q, precision=dot)


class _Strips(NamedTuple):
    """What is known of one query block and every key block that it visits; the other key blocks hold old values.

    They are handed from query block to query block, so that a block costs what it visits.
    """

    k: Float[Array, "J H C D"]  # relative to the block's origin
    weights: Float[Array, "J H R C"]  # p_ij
    kx: Float[Array, "J H R C"]  # k_j.x_i less about its mean
    gamma: Float[Array, "J H R C"] | None  # in the backward pass


class _Block(NamedTuple):
    """One query block, ready for solves."""

    strips: _Strips
    first: Int[Array, ""]
    stop: Int[Array, ""]
    kbar: Float[Array, "H R D"]
    lam: Float[Array, "H R"]


_Sum = TypeVar("_Sum")  # an array, or a tuple of them


def _add_up(block: _Block | _Queries, start: _Sum, term: Callable[[Array], _Sum]) -> _Sum:
    """start + the sum of term(j) over the key blocks that the query block visits."""
    return lax.fori_loop(block.first, block.stop, lambda j, acc: jax.tree.map(jnp.add, acc, term(j)), start)


def _solve(block: _Block, rhs: Array, options: Options, tol: _Tolerances) -> conjugate_gradient.Solution:
    """x = A^-1 rhs for every row of the block."""
    k, weights = block.strips.k, block.strips.weights

    def matvec(p: Array) -> Array:
        offset = jnp.sum(block.kbar * p, axis=-1)[..., None]

        def term(j: Array) -> tuple[Array, Array]:
            t = weights[j] * (_rows_by_keys(p, k[j], tol.dot) - offset)
            return _rows_by_features(t, k[j], tol.dot), jnp.sum(t, axis=-1)

        product, t_sum = _add_up(block, (jnp.zeros_like(p), jnp.zeros_like(block.lam)), term)
        return product - t_sum[..., None] * block.kbar + block.lam[..., None] * p

    inverse_diagonal = None
    if options.solver.use_preconditioner:
        squares = _add_up(
            block, jnp.zeros_like(rhs), lambda j: _rows_by_features(weights[j], jnp.square(k[j]), tol.dot)
        )
        # the variance of a key coordinate; rounding may leave it just below 0
        inverse_diagonal = 1 / (jnp.maximum(squares - jnp.square(block.kbar), 0) + block.lam[..., None])
    return conjugate_gradient.solve(
        matvec,
        rhs,
        rtol=tol.rtol,
        atol=tol.atol,
        max_iters=options.solver.max_iters,
        inverse_diagonal=inverse_diagonal,
    )


def _logits(
    strips: _Strips, queries: _Queries, keys: _Keys, visible: Callable[[Array], Array], scale: float, dot: lax.Precision
) -> tuple[_Strips, Array]:
    """The block's relative keys, its logits in place of weights, and the largest of every row."""

    def term(j: Array, carry: tuple[_Strips, Array]) -> tuple[_Strips, Array]:
        strips, top = carry
        k = keys.k[j] - queries.origin
        s = jnp.where(visible(j), scale * _rows_by_keys(queries.q, k, dot), -jnp.inf)
        strips = strips._replace(k=strips.k.at[j].set(k), weights=strips.weights.at[j].set(s))
        return strips, jnp.maximum(top, jnp.max(s, axis=-1))

    return lax.fori_loop(queries.first, queries.stop, term, (strips, jnp.full_like(queries.lam, -jnp.inf)))


def _normalised(strips: _Strips, queries: _Queries, omega: Array) -> tuple[_Strips, Array]:
    """With weights that sum to 1, and omega, or 1 for a query that sees no key."""
    total = jnp.where(omega > 0, omega, 1)

    def divide(j: Array, weights: Array) -> Array:
        return weights.at[j].set(weights[j] / total[..., None])

    weights = lax.fori_loop(queries.first, queries.stop, divide, strips.weights)
    return strips._replace(weights=weights), total


def _forward_block(
    strips: _Strips,
    queries: _Queries,
    keys: _Keys,
    visible: Callable[[Array], Array],
    options: Options,
    tol: _Tolerances,
) -> tuple[_Strips, tuple[Array, Saved, Residuals]]:
    q, lam, origin, v = queries.q, queries.lam, queries.origin, keys.v
    strips, top = _logits(strips, queries, keys, visible, options.qk_scale, tol.dot)
    top = jnp.where(top == -jnp.inf, 0, top)  # a query that sees no key: its weights are exp(-inf - 0)

    def weights_and_sums(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, omega, kbar = carry
        w = jnp.exp(weights[j] - top[..., None])
        return weights.at[j].set(w), omega + jnp.sum(w, axis=-1), kbar + _rows_by_features(w, strips.k[j], tol.dot)

    start = (strips.weights, jnp.zeros_like(lam), jnp.zeros_like(q))
    weights, omega, kbar = lax.fori_loop(queries.first, queries.stop, weights_and_sums, start)
    strips, total = _normalised(strips._replace(weights=weights), queries, omega)
    kbar = kbar / total[..., None]

    m = jnp.where((omega > 0)[..., None], kbar - (q - origin), 0)
    block = _Block(strips, queries.first, queries.stop, kbar, lam)
    solution = _solve(block, m, options, tol)
    x = jnp.where(jnp.isnan(lam)[..., None], jnp.nan, solution.x)  # a bad ridge never gives a plausible number

    near = jnp.sum(kbar * x, axis=-1)[..., None]

    def products(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kx, mean = carry
        product = _rows_by_keys(x, strips.k[j], tol.dot) - near
        return kx.at[j].set(product), mean + jnp.sum(strips.weights[j] * product, axis=-1)

    kx, mean = lax.fori_loop(queries.first, queries.stop, products, (strips.kx, jnp.zeros_like(lam)))
    o = _add_up(
        queries,
        jnp.zeros_like(q, shape=(*q.shape[:2], v.shape[-1])),
        lambda j: _rows_by_features(strips.weights[j] * (1 + (mean[..., None] - kx[j])), v[j], tol.dot),
    )
    damping = total / (total + options.delta_eps * (1 + jnp.sum(m * x, axis=-1)))
    shift = options.qk_scale * jnp.sum(q * origin, axis=-1)  # what the origin took off the logits
    residuals = Residuals(omega, top + jnp.log(total) + shift, solution.iterations, solution.residual_norm)
    return strips._replace(kx=kx), (o * damping[..., None], Saved(top, kbar, x, damping), residuals)


def _backward_block(
    carry: tuple[_Strips, _Keys],
    queries: _Queries,
    keys: _Keys,
    visible: Callable[[Array], Array],
    saved: Saved,
    g: Array,
    options: Options,
    tol: _Tolerances,
) -> tuple[tuple[_Strips, _Keys], tuple[Array, Array]]:
    """dk and dv with the block's share added, and dq and dlambda of the block."""
    strips, grads = carry
    q, lam, v = queries.q, queries.lam, keys.v
    x = saved.x
    g = g * saved.damping[..., None]
    loop = partial(lax.fori_loop, queries.first, queries.stop)
    strips, _ = _logits(strips, queries, keys, visible, options.qk_scale, tol.dot)
    k = strips.k

    near_x = jnp.sum(saved.kbar * x, axis=-1)[..., None]

    def weights_and_products(j: Array, carry: tuple[_Strips, Array]) -> tuple[_Strips, Array]:
        strips, omega = carry
        assert strips.kx is not None
        assert strips.gamma is not None
        w = jnp.exp(strips.weights[j] - saved.top[..., None])
        kx, gamma = _rows_by_keys(x, k[j], tol.dot) - near_x, _rows_by_keys(g, v[j], tol.dot)
        strips = strips._replace(
            weights=strips.weights.at[j].set(w), kx=strips.kx.at[j].set(kx), gamma=strips.gamma.at[j].set(gamma)
        )
        return strips, omega + jnp.sum(w, axis=-1)

    strips, omega = loop(weights_and_products, (strips, jnp.zeros_like(lam)))
    strips, _ = _normalised(strips, queries, omega)  # anew: where logits are huge, top is good to its rounding only
    weights, kx, gamma = strips.weights, strips.kx, strips.gamma
    assert kx is not None
    assert gamma is not None
    zeros = jnp.zeros_like(lam)
    kx_mean, gbar = _add_up(
        queries,
        (zeros, zeros),
        lambda j: (jnp.sum(weights[j] * kx[j], axis=-1), jnp.sum(weights[j] * gamma[j], axis=-1)),
    )

    def rhs(j: Array) -> tuple[Array, Array]:
        t = weights[j] * (gamma[j] - gbar[..., None])
        return _rows_by_features(t, k[j], tol.dot), jnp.sum(t, axis=-1)

    y, t_sum = _add_up(queries, (jnp.zeros_like(q), zeros), rhs)
    y = y - t_sum[..., None] * saved.kbar
    block = _Block(strips, queries.first, queries.stop, saved.kbar, lam)
    u = _solve(block, y, options, tol).x
    near_u = jnp.sum(saved.kbar * u, axis=-1)[..., None]

    def slopes(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """gamma - k.u in gamma's place, and its mean: b_ij is the one less the other."""
        gamma, mean = carry
        left = gamma[j] - (_rows_by_keys(u, k[j], tol.dot) - near_u)
        return gamma.at[j].set(left), mean + jnp.sum(weights[j] * left, axis=-1)

    left, left_mean = loop(slopes, (gamma, zeros))
    dlam = jnp.sum(u * x, axis=-1)
    ridge_term = (lam * dlam)[..., None]

    def gradients(j: Array, carry: tuple[Array, _Keys]) -> tuple[Array, _Keys]:
        dq, (dk, dv) = carry
        p = weights[j]
        pa, b = p * (1 + (kx_mean[..., None] - kx[j])), left[j] - left_mean[..., None]
        ds = options.qk_scale * (pa * b + p * ridge_term)
        dk_j = _keys_by_features(ds, q, tol.dot) - _keys_by_features(p * b, x, tol.dot)
        dk_j = dk_j - _keys_by_features(pa, u, tol.dot)
        dq = dq + _rows_by_features(ds, k[j], tol.dot)
        return dq, _Keys(dk.at[j].add(dk_j), dv.at[j].add(_keys_by_features(pa, g, tol.dot)))

    dq, grads = loop(gradients, (u, grads))
    return (strips._replace(gamma=left), grads), (dq, dlam)


def _start(queries: _Queries, keys: _Keys, backward: bool) -> _Strips:
    blocks, heads, columns, _ = keys.k.shape
    strip = jnp.zeros_like(queries.q, shape=(blocks, heads, queries.q.shape[2], columns))
    return _Strips(jnp.zeros_like(keys.k), strip, strip, strip if backward else None)


def _visibility_of_blocks(
    seen: Visibility, queries: _Layout, keys: _Layout
) -> Callable[[Array, _Queries], Callable[[Array], Array]]:
    """What the queries of block i see of key block j, by i and the block, then by j."""
    key_ids = None if seen.key_ids is None else _by_block(seen.key_ids, keys)

    def of(i: Array, block: _Queries) -> Callable[[Array], Array]:
        mask = None if seen.mask is None else _strip_of_mask(seen.mask, i, queries, keys)
        return partial(_visible, block, key_ids, mask, keys.rows)

    return of


def forward(
    query: Array, key: Array, value: Array, lam: Array, seen: Visibility, options: Options
) -> tuple[Array, Saved, Residuals]:
    """The output, what ``backward`` needs, and the residuals; lam is a usable ridge (interface.py)."""
    tol = _tolerances(query.dtype, options)
    queries, keys = _cut(query, key, value, lam, seen)
    layout, key_layout = _layouts(query, key)
    visible = _visibility_of_blocks(seen, layout, key_layout)

    def step(strips: _Strips, of: tuple[Array, _Queries]) -> tuple[_Strips, tuple[Array, Saved, Residuals]]:
        i, block = of
        return _forward_block(strips, block, keys, visible(i, block), options, tol)

    given = (query, key, value, lam, seen)
    start = varying_like(_start(queries, keys, backward=False), given)
    _, out = lax.scan(step, start, (jnp.arange(layout.count, dtype=jnp.int32), queries))
    o, saved, residuals = jax.tree.map(layout.join, out)
    return o.astype(query.dtype), saved, residuals


def backward(
    query: Array, key: Array, value: Array, lam: Array, seen: Visibility, saved: Saved, g: Array, options: Options
) -> tuple[Array, Array, Array, Array]:
    """``(dquery, dkey, dvalue, dlam)`` for the cotangent g of the output."""
    tol = _tolerances(query.dtype, options)
    queries, keys = _cut(query, key, value, lam, seen)
    layout, key_layout = _layouts(query, key)
    visible = _visibility_of_blocks(seen, layout, key_layout)
    g = layout.cut(g, mode="constant").astype(queries.q.dtype)  # padding adds nothing to dk and dv

    def step(
        carry: tuple[_Strips, _Keys], of: tuple[Array, _Queries, Saved, Array]
    ) -> tuple[tuple[_Strips, _Keys], tuple[Array, Array]]:
        i, block, of_saved, of_g = of
        return _backward_block(carry, block, keys, visible(i, block), of_saved, of_g, options, tol)

    given = (query, key, value, lam, seen, saved, g)
    start = (_start(queries, keys, backward=True), jax.tree.map(jnp.zeros_like, keys))
    blocks = (jnp.arange(layout.count, dtype=jnp.int32), queries, jax.tree.map(layout.cut, saved), g)
    (_, grads), (dq, dlam) = lax.scan(step, varying_like(start, given), blocks)
    return (
        layout.join(dq).astype(query.dtype),
        key_layout.join(grads.k).astype(key.dtype),
        key_layout.join(grads.v).astype(value.dtype),
        layout.join(dlam).astype(lam.dtype),
    )
