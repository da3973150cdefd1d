"""The moments of a query's keys by split of the cache: ``decode.moments_kernel`` with float32 products.

Every block has its moments relative to its own means. The update of Chan, Golub and LeVeque (1979) merges them into
those of the split. One key may hold nearly all the weight. Relative to any other point, its square would then be most
of a moment, and float32 would lose the rest.
"""

import triton
import triton.language as tl

from flashlla_jax.kernels.decode import (
    NO_LOGIT,
    load_columns,
    load_origin,
    load_values,
    load_vector,
    partials_of,
    split_of,
    store_moments,
    visible_keys,
)


@triton.jit
def float32_moments_kernel(
    q, k, v, interval_ptr, first_ptr, mask_ptr, T, S, tops, omegas, means, moments, c: tl.constexpr
):
    """One row, one split, BD features. Order of programs and results are those of ``moments_kernel``."""
    CHUNKS: tl.constexpr = c.DP // c.BD
    chunk = tl.program_id(0) % CHUNKS
    at = split_of(k, v, interval_ptr, first_ptr, mask_ptr, tl.program_id(0) // CHUNKS, T, S, c)
    d, chunk_d = tl.arange(0, c.DP), chunk * c.BD + tl.arange(0, c.BD)
    origin, chunk_origin = load_origin(at, d, c), load_origin(at, chunk_d, c)
    query = load_vector(q + at.row * c.D, d, c)

    top = NO_LOGIT
    omega = 0.0
    kbar = tl.zeros((c.DP,), tl.float32)
    vbar = tl.zeros((c.DVP,), tl.float32)
    chunk_kbar = tl.zeros((c.BD,), tl.float32)
    kk = tl.zeros((c.BD, c.DP), tl.float32)
    kv = tl.zeros((c.BD, c.DVP), tl.float32)
    for n0 in tl.range(at.low, at.high, c.BN, num_stages=c.STAGES):
        columns = n0 + tl.arange(0, c.BN)
        visible = visible_keys(at, columns, c)
        keys = load_columns(at, columns, d, visible, c) - origin[:, None]
        V = load_values(at, columns, visible, c)
        part = keys
        if CHUNKS > 1:
            part = load_columns(at, columns, chunk_d, visible, c) - chunk_origin[:, None]
        s = tl.where(visible, tl.sum(query[:, None] * keys, 0) * c.SCALE, NO_LOGIT)
        new_top = tl.maximum(top, tl.max(s, 0))
        p = tl.where(visible, tl.math.exp2(s - new_top), 0.0)
        shrink = tl.math.exp2(top - new_top)
        top = new_top

        weight = tl.sum(p, 0)
        share = p / tl.where(weight > 0.0, weight, 1.0)
        block_kbar = tl.sum(share[None, :] * keys, 1)
        block_vbar = tl.sum(share[:, None] * V, 0)
        block_chunk_kbar = tl.sum(share[None, :] * part, 1)
        weighted = p[None, :] * (part - block_chunk_kbar[:, None])
        centred = tl.trans(keys - block_kbar[:, None])
        kk = tl.dot(weighted, centred, acc=kk * shrink, input_precision=c.PRECISION)
        kv = tl.dot(weighted, V - block_vbar[None, :], acc=kv * shrink, input_precision=c.PRECISION)

        omega *= shrink
        total = omega + weight
        fresh = weight / tl.where(total > 0.0, total, 1.0)  # the block's share of all weight so far
        k_step, v_step, chunk_step = block_kbar - kbar, block_vbar - vbar, block_chunk_kbar - chunk_kbar
        between = (omega * fresh) * chunk_step
        kk += between[:, None] * k_step[None, :]
        kv += between[:, None] * v_step[None, :]
        kbar += fresh * k_step
        vbar += fresh * v_step
        chunk_kbar += fresh * chunk_step
        omega = total

    partials = partials_of(tops, omegas, means, moments, at.place, c)
    store_moments(partials, chunk, top, omega, chunk_kbar, vbar, kk, kv, c)
