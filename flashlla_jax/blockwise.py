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
blocks end at the last block that any query of the block sees: hidden blocks are never touched.

Within a query block every key is taken relative to ``origin``, the mean of the keys that the block's first query sees.
The logits change by a constant per row and the regression not at all, and what a large common offset of the keys
would lose to rounding is kept. Only keys that every query of the block sees enter it, so nothing leaks from the future.

A mask is cut with the queries: what one block of them sees is a boolean strip as large as a quarter of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flashlla_jax import conjugate_gradient
from flashlla_jax.interface import Options, Residuals, accumulation_dtype, differentiable, usable_ridge, visible_keys

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
    visible: Int[Array, "I R"]  # leading keys that the query sees
    origin: Float[Array, "I H 1 D"]
    seen: Bool[Array, "J H R C"] | None = None  # with a mask, inside a scan: all that the query sees


class _Keys(NamedTuple):
    """The key side in J blocks of C keys."""

    k: Float[Array, "J H C D"]
    v: Float[Array, "J H C Dv"]


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass, in blocks of queries; relative to the block's origin."""

    logsumexp: Float[Array, "I H R"]
    kbar: Float[Array, "I H R D"]
    x: Float[Array, "I H R D"]
    a0: Float[Array, "I H R"]  # a_ij = a0_i - k_j.x_i
    damping: Float[Array, "I H R"]


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


def _cut(query: Array, key: Array, value: Array, lam: Array, options: Options) -> tuple[_Queries, _Keys]:
    queries, keys = _layouts(query, key)
    dtype = accumulation_dtype(query.dtype)
    visible = visible_keys(queries.length, keys.length, options.is_causal)
    visible = jnp.pad(visible, (0, queries.count * queries.rows - queries.length), mode="edge")
    visible = visible.reshape(queries.count, queries.rows)

    first = visible[:, 0]
    sums = jnp.cumsum(key.astype(dtype), axis=1)
    origin = jnp.take(sums, first - 1, axis=1) / first[None, :, None, None].astype(dtype)  # (B, I, K, D)
    origin = jnp.moveaxis(origin, 1, 0).reshape(queries.count, -1, 1, key.shape[-1])

    return (
        _Queries(
            q=queries.cut(query).astype(dtype),
            lam=queries.cut(usable_ridge(lam)).astype(dtype),
            visible=jnp.tile(visible, (1, queries.group)),
            origin=origin,
        ),
        _Keys(k=keys.cut(key).astype(dtype), v=keys.cut(value).astype(dtype)),
    )


def _with_mask(queries: _Queries, keys: _Keys, mask: Array, i: Array, layout: _Layout) -> _Queries:
    """Query block i with ``seen``, and with the mean of the keys that every query in it sees as its origin.

    A query that sees no key has no say in the origin. Where the queries have no key in common it is 0.
    """
    count, _, columns, _ = keys.k.shape
    if mask.shape[2] > 1:
        padding = layout.count * layout.rows - layout.length
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, padding), (0, 0)], mode="edge")
        mask = lax.dynamic_slice_in_dim(mask, i * layout.rows, layout.rows, axis=2)
    if mask.shape[3] > 1:
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, 0), (0, count * columns - mask.shape[3])])
    mask = jnp.broadcast_to(mask, (layout.batch, layout.heads * layout.group, layout.rows, count * columns))
    seen = jnp.moveaxis(mask.reshape(*queries.lam.shape, count, columns), 2, 0)
    index = jnp.arange(count * columns, dtype=jnp.int32).reshape(count, 1, 1, columns)
    seen = seen & (index < queries.visible[None, None, :, None])

    blind = ~jnp.any(seen, axis=(0, 3), keepdims=True)
    shared = jnp.all(seen | blind, axis=2)[..., None]
    number = jnp.maximum(jnp.sum(shared, axis=(0, 2), dtype=keys.k.dtype), 1)
    origin = jnp.sum(jnp.where(shared, keys.k, 0), axis=(0, 2)) / number
    return queries._replace(seen=seen, origin=origin[:, None])


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
        rtol=rtol if options.cg_rtol is None else options.cg_rtol,
        atol=0.0 if options.cg_atol is None else options.cg_atol,
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


class _QueryBlock(NamedTuple):
    """One query block at work: its weights against the keys that it sees, ready for solves."""

    k: Float[Array, "J H C D"]  # relative to the block's origin
    weights: Float[Array, "J H R C"]  # p_ij; what lies at and beyond ``blocks`` is never read
    blocks: Int[Array, ""]  # key blocks that some query of the block sees
    kbar: Float[Array, "H R D"]
    lam: Float[Array, "H R"]


_Sum = TypeVar("_Sum")  # an array, or a tuple of them


def _add_up(blocks: Array, start: _Sum, term: Callable[[Array], _Sum]) -> _Sum:
    """start + sum over key blocks j < blocks of term(j)."""
    return lax.fori_loop(0, blocks, lambda j, acc: jax.tree.map(jnp.add, acc, term(j)), start)


def _logits(queries: _Queries, k: Array, j: Array, options: Options, dot: lax.Precision) -> Array:
    s = options.qk_scale * _rows_by_keys(queries.q, k, dot)
    if queries.seen is not None:
        return jnp.where(queries.seen[j], s, -jnp.inf)
    columns = j * k.shape[1] + jnp.arange(k.shape[1], dtype=jnp.int32)
    return jnp.where((columns[None, :] < queries.visible[:, None])[None], s, -jnp.inf)


def _visible_blocks(queries: _Queries, k: Array) -> Array:
    """How many of the key blocks (J, H, C, D), up to the last that some query of the block sees a key of."""
    if queries.seen is not None:
        used = jnp.any(queries.seen, axis=(1, 2, 3))
        return jnp.max(jnp.where(used, jnp.arange(1, k.shape[0] + 1, dtype=jnp.int32), 0))
    return (jnp.max(queries.visible) + k.shape[2] - 1) // k.shape[2]


def _solve(block: _QueryBlock, rhs: Array, options: Options, tol: _Tolerances) -> conjugate_gradient.Solution:
    """x = A^-1 rhs for every row of the block; ``defect`` is sum_j p_ij kc_ij.x, 0 but for rounding."""

    def matvec(p: Array) -> tuple[Array, Array]:
        offset = jnp.sum(block.kbar * p, axis=-1)[..., None]

        def term(j: Array) -> tuple[Array, Array]:
            t = block.weights[j] * (_rows_by_keys(p, block.k[j], tol.dot) - offset)
            return _rows_by_features(t, block.k[j], tol.dot), jnp.sum(t, axis=-1)

        product, t_sum = _add_up(block.blocks, (jnp.zeros_like(p), jnp.zeros_like(block.lam)), term)
        return product - t_sum[..., None] * block.kbar + block.lam[..., None] * p, t_sum

    inverse_diagonal = None
    if options.cg_use_preconditioner:
        squares = _add_up(
            block.blocks,
            jnp.zeros_like(rhs),
            lambda j: _rows_by_features(block.weights[j], jnp.square(block.k[j]), tol.dot),
        )
        # the variance of a key coordinate; rounding may leave it just below 0
        inverse_diagonal = 1 / (jnp.maximum(squares - jnp.square(block.kbar), 0) + block.lam[..., None])
    return conjugate_gradient.solve(
        matvec,
        rhs,
        rtol=tol.rtol,
        atol=tol.atol,
        max_iters=options.cg_max_iters,
        inverse_diagonal=inverse_diagonal,
    )


def _forward_block(
    queries: _Queries, keys: _Keys, options: Options, tol: _Tolerances
) -> tuple[Array, _Saved, Residuals]:
    q, lam, origin = queries.q, queries.lam, queries.origin
    v = keys.v
    k = keys.k - origin[None]
    blocks = _visible_blocks(queries, k)
    strip = jnp.zeros_like(q, shape=(*k.shape[:2], q.shape[1], k.shape[2]))

    def logits_and_top(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        strip, top = carry
        s = _logits(queries, k[j], j, options, tol.dot)
        return strip.at[j].set(s), jnp.maximum(top, jnp.max(s, axis=-1))

    strip, top = lax.fori_loop(0, blocks, logits_and_top, (strip, jnp.full_like(lam, -jnp.inf)))
    if queries.seen is not None:  # a query that sees no key: weights exp(-inf - 0)
        top = jnp.where(top == -jnp.inf, 0, top)

    def weights_and_sums(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        strip, omega, kbar = carry
        w = jnp.exp(strip[j] - top[..., None])
        return strip.at[j].set(w), omega + jnp.sum(w, axis=-1), kbar + _rows_by_features(w, k[j], tol.dot)

    strip, omega, kbar = lax.fori_loop(0, blocks, weights_and_sums, (strip, jnp.zeros_like(lam), jnp.zeros_like(q)))
    total = omega if queries.seen is None else jnp.where(omega > 0, omega, 1)
    weights = lax.fori_loop(0, blocks, lambda j, strip: strip.at[j].set(strip[j] / total[..., None]), strip)
    kbar = kbar / total[..., None]
    block = _QueryBlock(k, weights, blocks, kbar, lam)

    m = kbar - (q - origin)
    solution = _solve(block, m, options, tol)
    x = jnp.where(jnp.isnan(lam)[..., None], jnp.nan, solution.x)  # a bad ridge never gives a plausible number
    a0 = 1 + jnp.sum(kbar * x, axis=-1) + solution.defect
    o = _add_up(
        blocks,
        jnp.zeros_like(q, shape=(*q.shape[:2], v.shape[-1])),
        lambda j: _rows_by_features(weights[j] * (a0[..., None] - _rows_by_keys(x, k[j], tol.dot)), v[j], tol.dot),
    )
    damping = total / (total + options.delta_eps * (1 + jnp.sum(m * x, axis=-1)))
    shift = options.qk_scale * jnp.sum(q * origin, axis=-1)  # what the origin took off the logits
    residuals = Residuals(omega, top + jnp.log(omega) + shift, solution.iterations, solution.residual_norm)
    return o * damping[..., None], _Saved(top + jnp.log(total), kbar, x, a0, damping), residuals


def _backward_block(
    queries: _Queries, keys: _Keys, saved: _Saved, g: Array, grads: _Keys, options: Options, tol: _Tolerances
) -> tuple[Array, Array, _Keys]:
    """dq and dlambda of the block, and dk and dv with the block's share added."""
    q, lam, origin = queries.q, queries.lam, queries.origin
    v = keys.v
    k = keys.k - origin[None]
    blocks = _visible_blocks(queries, k)
    g = g * saved.damping[..., None]
    strip = jnp.zeros_like(q, shape=(*k.shape[:2], q.shape[1], k.shape[2]))

    def weights_and_gamma(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, gamma, gbar = carry
        p = jnp.exp(_logits(queries, k[j], j, options, tol.dot) - saved.logsumexp[..., None])
        gv = _rows_by_keys(g, v[j], tol.dot)
        return weights.at[j].set(p), gamma.at[j].set(gv), gbar + jnp.sum(p * gv, axis=-1)

    weights, gamma, gbar = lax.fori_loop(0, blocks, weights_and_gamma, (strip, strip, jnp.zeros_like(lam)))

    def rhs(j: Array) -> tuple[Array, Array]:
        t = weights[j] * (gamma[j] - gbar[..., None])
        return _rows_by_features(t, k[j], tol.dot), jnp.sum(t, axis=-1)

    y, t_sum = _add_up(blocks, (jnp.zeros_like(q), jnp.zeros_like(lam)), rhs)
    y = y - t_sum[..., None] * saved.kbar
    solution = _solve(_QueryBlock(k, weights, blocks, saved.kbar, lam), y, options, tol)
    x, u = saved.x, solution.x
    b0 = jnp.sum(saved.kbar * u, axis=-1) + solution.defect - gbar  # b_ij = gamma_ij + b0_i - k_j.u_i
    dlam = jnp.sum(u * x, axis=-1)
    ridge_term = (lam * dlam)[..., None]

    def gradients(j: Array, carry: tuple[Array, _Keys]) -> tuple[Array, _Keys]:
        dq, (dk, dv) = carry
        a = saved.a0[..., None] - _rows_by_keys(x, k[j], tol.dot)
        b = gamma[j] + b0[..., None] - _rows_by_keys(u, k[j], tol.dot)
        pa, pb = weights[j] * a, weights[j] * b
        ds = options.qk_scale * (pa * b + weights[j] * ridge_term)
        dk_j = _keys_by_features(ds, q, tol.dot) - _keys_by_features(pb, x, tol.dot) - _keys_by_features(pa, u, tol.dot)
        dq = dq + _rows_by_features(ds, k[j], tol.dot)
        return dq, _Keys(dk.at[j].add(dk_j), dv.at[j].add(_keys_by_features(pa, g, tol.dot)))

    dq, grads = lax.fori_loop(0, blocks, gradients, (u, grads))
    return dq, dlam, grads


def forward(
    query: Array, key: Array, value: Array, ridge_lambda: Array, options: Options, mask: Array | None = None
) -> tuple[tuple[Array, Residuals], _Saved]:
    """``((o, residuals), saved)``: the forward pass, and what ``backward`` needs of it."""
    tol = _tolerances(query.dtype, options)
    queries, keys = _cut(query, key, value, ridge_lambda, options)

    layout, _ = _layouts(query, key)

    def step(_: None, of: tuple[Array, _Queries]) -> tuple[None, tuple[Array, _Saved, Residuals]]:
        i, block = of
        block = block if mask is None else _with_mask(block, keys, mask, i, layout)
        return None, _forward_block(block, keys, options, tol)

    _, (o, saved, residuals) = lax.scan(step, None, (jnp.arange(layout.count, dtype=jnp.int32), queries))
    join = layout.join
    return (join(o).astype(query.dtype), Residuals(*map(join, residuals))), saved


def backward(
    query: Array,
    key: Array,
    value: Array,
    ridge_lambda: Array,
    saved: _Saved,
    g: Array,
    options: Options,
    mask: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """``(dquery, dkey, dvalue, dridge_lambda)`` for the cotangent g of the output."""
    tol = _tolerances(query.dtype, options)
    queries, keys = _cut(query, key, value, ridge_lambda, options)
    query_layout, key_layout = _layouts(query, key)
    g = query_layout.cut(g, mode="constant").astype(queries.q.dtype)  # padding adds nothing to dk and dv

    def step(grads: _Keys, of: tuple[Array, _Queries, _Saved, Array]) -> tuple[_Keys, tuple[Array, Array]]:
        i, block, of_saved, of_g = of
        block = block if mask is None else _with_mask(block, keys, mask, i, query_layout)
        dq, dlam, grads = _backward_block(block, keys, of_saved, of_g, grads, options, tol)
        return grads, (dq, dlam)

    blocks = (jnp.arange(query_layout.count, dtype=jnp.int32), queries, saved, g)
    grads, (dq, dlam) = lax.scan(step, jax.tree.map(jnp.zeros_like, keys), blocks)
    return (
        query_layout.join(dq).astype(query.dtype),
        key_layout.join(grads.k).astype(key.dtype),
        key_layout.join(grads.v).astype(value.dtype),
        query_layout.join(dlam).astype(ridge_lambda.dtype),
    )


# Local Linear Attention and its exact gradient in O(S D) memory.
attention = differentiable(forward, backward)
