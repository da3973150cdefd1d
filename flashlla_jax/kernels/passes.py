"""The forward and the backward pass by Triton kernels, on the canonical layout."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flashlla_jax.interface import Options, ParallaxOptions, Residuals, SolverOptions
from flashlla_jax.kernels import launch
from flashlla_jax.kernels.constants import Constants
from flashlla_jax.kernels.plan import Launch, Plan, padded
from flashlla_jax.kernels.tables import Table, by_key_tiles, by_query_tiles
from flashlla_jax.origin import anchored, origins
from flashlla_jax.visibility import Visibility

_LOG2_E = math.log2(math.e)
_LEAST_STEEPNESS = 1e-30  # moves no logit
# One tile of queries of so many may be cut where documents meet: documents of four tiles and more are then all served.
# Programs that are not needed end at once.
_CUT = 4
ORIGIN_ROWS = 32  # queries that share an origin of the keys: kernels/tiles.py, load_origin


class Saved(NamedTuple):
    """What the backward pass needs beside the inputs."""

    x_hi: Array  # -x, what rounding it left, and what rounding that left
    x_lo: Array
    x_rest: Array
    lse: Array  # log2 of the softmax normaliser, of the keys relative to their origin (kernels/tiles.py, Rows)
    lse_rest: Array  # these three only where products keep all of float32
    near: Array  # kernels/forward.py, Solution; a0 also for bfloat16, its rest only then
    a0: Array
    a0_rest: Array
    damping: Array
    omega: Array


_NO_SOLVER = SolverOptions(None, None, 0, False)  # of Parallax


class Problem(NamedTuple):
    """One call, of either method, and what its kernels share."""

    query: Any
    key: Any
    value: Any
    seen: Visibility
    options: Options | ParallaxOptions
    plan: Plan
    anchor: Array | None  # of the queries' documents, if the keys are relative to it

    @classmethod
    def of(
        cls, query: Any, key: Any, value: Any, seen: Visibility, options: Options | ParallaxOptions, plan: Plan
    ) -> Problem:
        """With keys relative to their documents, if products are in float32."""
        documents = anchored(key, seen) if plan.arithmetic.upcast else None
        key, anchor = (key, None) if documents is None else documents
        return cls(query, key, value, seen, options, plan, anchor)

    @property
    def shape(self) -> tuple[int, int, int, int, int, int, int]:
        """B, T, S, N, K, D, Dv."""
        batch, T, heads, dim = self.query.shape
        _, S, kv_heads, value_dim = self.value.shape
        return batch, T, S, heads, kv_heads, dim, value_dim

    @property
    def wide(self) -> jnp.dtype:
        """The dtype of x and u in memory: that of the products' operands."""
        return jnp.dtype(jnp.float32) if self.plan.arithmetic.upcast else self.query.dtype

    def row(self, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """A number per query and head."""
        return jax.ShapeDtypeStruct(self.query.shape[:3], dtype)

    def row_if(self, there: bool) -> jax.ShapeDtypeStruct:
        """A number per query and head, else one element an entry."""
        return self.row() if there else jax.ShapeDtypeStruct((self.query.shape[0], 1, 1), jnp.float32)

    def exact_row(self) -> jax.ShapeDtypeStruct:
        """A number per query and head where products keep all of float32."""
        return self.row_if(self.plan.arithmetic.exact)

    def solution(self, part: int = 1) -> jax.ShapeDtypeStruct:
        """A part of x or u: one element where there is none."""
        batch, T, _, heads, _, dim, _ = self.shape
        whole = part <= self.plan.arithmetic.parts
        return jax.ShapeDtypeStruct((batch, T, heads, dim) if whole else (batch, 1, 1, 1), self.wide)

    def anchors(self) -> Array:
        return jnp.zeros((1, 1, 1, 1), jnp.float32) if self.anchor is None else self.anchor

    def origins(self) -> Array:
        if not self.plan.arithmetic.upcast:
            return jnp.zeros((1, 1, 1, 1), jnp.float32)
        found = origins(self.key, self.seen, ORIGIN_ROWS).astype(jnp.float32)
        return jnp.broadcast_to(found, (self.query.shape[0], *found.shape[1:]))

    @property
    def cut(self) -> int:
        """For ``by_query_tiles``: tiles are cut where segments may meet in one."""
        return _CUT if self.seen.query_ids is not None and self.seen.mask is None else 0

    def by_queries(self, shape: Launch) -> tuple[Table, int]:
        """The table of a kernel over tiles of queries, and its number of programs."""
        batch, _, S, heads, *_ = self.shape
        table = by_query_tiles(self.seen, S, shape.BM, shape.BN, self.cut)
        return table, table.rows.shape[2] * batch * heads

    def visible(self, table: Table) -> tuple[Array, ...]:
        """The visibility as the kernels take it: one number where there is none, all or none by batch entry."""
        seen = self.seen
        none = jnp.zeros((1, 1), jnp.int32)
        rows = [none if x is None else x for x in (seen.start, seen.end, seen.query_ids, seen.key_ids)]
        batch = self._visibilities(table)
        rows = [jnp.broadcast_to(x, (batch, x.shape[1])) for x in rows]
        mask = none if seen.mask is None else seen.mask.astype(jnp.int8)
        tables = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in table)
        return (*rows, mask, *tables)

    def _visibilities(self, table: Table) -> int:
        """How many batch entries have a visibility of their own: all, or one for all."""
        return max(x.shape[0] for x in (self.seen.start, self.seen.end, table.rows))

    def constants(self, shape: Launch, table: Table, taus: tuple[float, float] | None = None) -> Constants:
        _, _, _, heads, kv_heads, dim, value_dim = self.shape
        options, arithmetic, mask = self.options, self.plan.arithmetic, self.seen.mask
        solver, delta_eps = _NO_SOLVER, 0.0
        if isinstance(options, Options):
            solver, delta_eps = options.solver, options.delta_eps
        # the key kernel has the fewer spills with one pipeline for both
        few_edges = mask is None and taus is not None
        rtol, hard_rtol = (taus or (0.0, 0.0)) if solver.rtol is None else (solver.rtol, solver.rtol)
        axes = [False] * 4 if mask is None else [n > 1 for n in mask.shape]
        return Constants(
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=dim,
            DV=value_dim,
            DP=padded(dim),
            DVP=padded(value_dim),
            BM=shape.BM,
            BN=shape.BN,
            STAGES=shape.num_stages,
            EDGE_STAGES=1 if few_edges else shape.num_stages,
            SCALE=options.qk_scale * _LOG2_E,
            QK_SCALE=options.qk_scale,
            STEEPNESS=max(abs(options.qk_scale) * _LOG2_E, _LEAST_STEEPNESS),
            PRECISION=arithmetic.precision,
            EXACT=arithmetic.exact,
            UPCAST=arithmetic.upcast,
            ANCHORED=self.anchor is not None,
            PARTS=arithmetic.parts,
            FEWEST_PARTS=max(1, arithmetic.parts - 1),
            MOST_CARE=arithmetic.most_care,
            SPLIT_ALL=arithmetic.split_all,
            HARD_BELOW=arithmetic.hard_below,
            LAST_ABOVE=arithmetic.last_above,
            CORRECTED_BELOW=0.0 if solver.rtol is not None else arithmetic.corrected_below,
            BALANCED_ABOVE=arithmetic.balanced_above,
            FROM_FIRST=self.seen.from_first,
            IDS=self.seen.query_ids is not None,
            MASK=mask is not None,
            **dict(zip(("MASK_B", "MASK_N", "MASK_T", "MASK_S"), axes, strict=True)),
            CUT=self.cut,
            PER_BATCH=self._visibilities(table) > 1,
            PER_HEAD=table.rows.shape[1] > 1,
            RTOL=rtol,
            HARD_RTOL=hard_rtol,
            ENERGY=solver.rtol is None,
            ATOL=0.0 if solver.atol is None else solver.atol,
            MAX_ITERS=solver.max_iters,
            PRECONDITION=solver.use_preconditioner,
            FINISH=arithmetic.finish and solver.rtol is None,  # a stop that was asked for is kept to
            DELTA_EPS=delta_eps,
            QUERY_BM=self.plan.query.BM,
        )


def forward(
    query: Array, key: Array, value: Array, lam: Array, seen: Visibility, options: Options, plan: Plan
) -> tuple[Array, Saved, Residuals]:
    """``(o, saved, residuals)``: the forward pass, and what ``backward`` needs of it."""
    from flashlla_jax.kernels.forward import forward_kernel

    problem = Problem.of(query, key, value, seen, options, plan)
    batch, T, S, heads, _, _, value_dim = problem.shape
    shape = plan.forward
    table, programs = problem.by_queries(shape)
    row, exact_row = problem.row(), problem.exact_row()
    o, x_hi, x_lo, x_rest, lse, lse_rest, near, a0, a0_rest, damping, omega, logsumexp, *of_solve = launch.call(
        forward_kernel,
        programs,
        (query, problem.key, value, lam, *problem.visible(table), problem.origins(), problem.anchors()),
        (T, S),
        (
            jax.ShapeDtypeStruct((batch, T, heads, value_dim), query.dtype),
            problem.solution(),
            problem.solution(2),
            problem.solution(3),
            row,
            exact_row,
            exact_row,
            problem.row_if(plan.arithmetic.exact or plan.arithmetic.balanced),
            problem.row_if(plan.arithmetic.balanced),
            row,
            row,
            row,
            problem.row(jnp.int32),
            row,
            row,
            problem.row(jnp.int32),
        ),
        shape,
        problem.constants(shape, table, plan.arithmetic.forward_tau),
    )
    iterations, residual_norm, error, converged = of_solve
    saved = Saved(x_hi, x_lo, x_rest, lse, lse_rest, near, a0, a0_rest, damping, omega)
    return o, saved, Residuals(omega, logsumexp, iterations, residual_norm, error, converged != 0)


def backward(
    query: Array,
    key: Array,
    value: Array,
    lam: Array,
    seen: Visibility,
    saved: Saved,
    g: Array,
    options: Options,
    plan: Plan,
) -> tuple[Array, Array, Array, Array]:
    """``(dquery, dkey, dvalue, dridge_lambda)`` for the cotangent g of the output."""
    from flashlla_jax.kernels.backward_key import key_kernel
    from flashlla_jax.kernels.backward_query import query_kernel

    problem = Problem.of(query, key, value, seen, options, plan)
    batch, T, S, heads, kv_heads, _, _ = problem.shape
    origin = problem.origins()
    shape = plan.query
    table, programs = problem.by_queries(shape)
    tiles = -(-T // shape.BM)
    pairs = jax.ShapeDtypeStruct((batch, heads, tiles * shape.BM, 2), jnp.float32)
    none = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
    dq, dlam, u_hi, u_lo, *of_rows, care = launch.call(
        query_kernel,
        programs,
        (query, problem.key, value, lam, *problem.visible(table), origin, *saved, g),
        (T, S),
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            problem.row(),
            problem.solution(),
            problem.solution(2),
            pairs,
            pairs,
            pairs if plan.arithmetic.balanced else none,
            pairs if plan.arithmetic.exact else none,
            jax.ShapeDtypeStruct(pairs.shape[:3], jnp.float32) if plan.arithmetic.exact else none,
            problem.row(jnp.int32),
        ),
        shape,
        problem.constants(shape, table, plan.arithmetic.backward_tau),
    )
    shape = plan.key
    table = by_key_tiles(seen, S, shape.BM, shape.BN)
    dk, dv = launch.call(
        key_kernel,
        -(-S // shape.BN) * batch * kv_heads,
        (query, problem.key, value, *problem.visible(table), origin, *saved[:3], u_hi, u_lo, g, *of_rows, care),
        (T, S),
        (jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)),
        shape,
        problem.constants(shape, table),
    )
    return dq, dk, dv, dlam
