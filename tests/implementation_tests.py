"""The tests that every implementation passes. Subclass ``ImplementationTests`` and name the implementation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import lla_attention
from tests.cases import (
    ALL_KINDS,
    GRADIENTS,
    HIDDEN,
    KIND_SHAPES,
    RIDGES,
    Hidden,
    Inputs,
    Shape,
    draw,
    evaluate,
    relative_error,
    truth,
)

# Lengths 1 and 7, primes, one less and one more than a block of 128, grouped heads, odd head dimensions, value
# dimension unlike the key's, more keys than queries (aligned at the end), full attention of either proportion.
SHAPES = (
    Shape(queries=1, keys=1),
    Shape(queries=7, keys=7, heads=2, kv_heads=2, dim=8, value_dim=8),
    Shape(queries=113, keys=113, heads=4, kv_heads=2, dim=24, value_dim=48),
    Shape(batch=2, queries=127, keys=127, dim=16, value_dim=32),
    Shape(queries=129, keys=129, heads=3, kv_heads=1, dim=32, value_dim=16),
    Shape(queries=1, keys=131, heads=2, kv_heads=1),
    Shape(queries=37, keys=257),
    Shape(queries=128, keys=256, heads=2, kv_heads=2),
    Shape(queries=101, keys=29, heads=2, kv_heads=1, is_causal=False),
    Shape(batch=3, queries=5, keys=130, heads=2, kv_heads=2, dim=48, value_dim=24, is_causal=False),
    Shape(queries=1, keys=1, dim=1, value_dim=1, is_causal=False),
)

# Of a gradient that may be 0, in units of ||dv||. The promise for float32 is 2e-5 of it: 2e-7, three roundings.
SCALE = 1e-2


class ImplementationTests:
    """Accuracy against the float64 reference, shapes, ridge layouts, residuals, repeatability."""

    implementation: str
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    shapes: tuple[Shape, ...] = SHAPES  # of test_shapes
    kind_shapes: tuple[Shape, ...] = KIND_SHAPES  # of test_accuracy
    hidden: tuple[str, ...] = tuple(HIDDEN)  # of test_hidden
    ridges: tuple[float, ...] = RIDGES
    length: int = 300  # of the longest sequence below; the others are in proportion

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """The subclass's own shapes and ways of hiding keys."""
        if "shape" in metafunc.fixturenames:
            shapes = self.kind_shapes if metafunc.definition.originalname == "test_accuracy" else self.shapes
            metafunc.parametrize("shape", shapes, ids=str)
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.hidden)

    def evaluate(self, inputs: Inputs, ridge: jax.Array, **kwargs: Any) -> dict[str, jax.Array]:
        return evaluate(inputs, ridge, implementation=self.implementation, **kwargs)

    def hidden_case(self, name: str) -> Hidden:
        """The case of ``test_hidden``, on a shape that this implementation can afford."""
        return HIDDEN[name]

    def options(self, dtype: str) -> dict[str, Any]:
        """What the accuracy bound of this dtype is promised for: the defaults, but a tight stop in float64."""
        return {"cg_rtol": 1e-28} if dtype == "float64" else {}

    def bound(self, dtype: str, kind: str, ridge: float, name: str, dense_error: float) -> float:
        """The norm-wise error allowed. ``dense_error``: the dense form's in the same arithmetic, for float32."""
        raise NotImplementedError

    def failures(
        self, inputs: Inputs, lam: jax.Array, kind: str = "iid", ridge: float = 1.0, scale: float = 0.0, **kwargs: Any
    ) -> list[str]:
        """Which of o and the gradients are off by more than their bound, one line each.

        ``scale`` is a floor, in units of ||dv||, of the norm that a gradient's error is divided by.
        """
        got = self.evaluate(inputs, lam, **self.options(str(inputs.q.dtype)), **kwargs)
        return self.beyond_bounds(got, inputs, lam, kind, ridge, scale, **kwargs)

    def beyond_bounds(
        self,
        got: dict[str, jax.Array],
        inputs: Inputs,
        lam: jax.Array,
        kind: str,
        ridge: float,
        scale: float,
        **kwargs: Any,
    ) -> list[str]:
        """``failures`` of what was computed, against the reference for ``kwargs``."""
        dtype = str(inputs.q.dtype)
        expected = truth(inputs, lam, **kwargs)
        dense = evaluate(inputs, lam, implementation="reference", **kwargs) if dtype == "float32" else {}
        lines = []
        for name in ("o", *GRADIENTS):
            assert bool(jnp.all(jnp.isfinite(got[name])))
            assert got[name].dtype == (lam.dtype if name == "dlambda" else inputs.q.dtype)
            floor = scale * float(jnp.linalg.norm(expected["dv"]))
            error = relative_error(got[name], expected[name], floor)
            dense_error = relative_error(dense[name], expected[name], floor) if dense else math.nan
            bound = self.bound(dtype, kind, ridge, name, dense_error)
            if not error <= bound:
                lines.append(f"{dtype} lambda={ridge:g} {name}: {error:.1e} > {bound:.1e}")
        return lines

    @pytest.mark.parametrize("kind", ALL_KINDS)
    def test_accuracy(self, shape: Shape, kind: str) -> None:
        lines = []
        for dtype in self.dtypes:
            inputs = draw(shape, dtype, kind)
            for ridge in self.ridges:
                lam = jnp.full(shape.ridge, ridge, "float64" if dtype == "float64" else "float32")
                lines += self.failures(inputs, lam, kind, ridge, is_causal=shape.is_causal)
        assert not lines, "\n".join(lines)

    def test_shapes(self, shape: Shape) -> None:
        """Any length, grouping and dimension: as accurate as the iid case of the same dtype."""
        dtype = "float64" if "float64" in self.dtypes else "float32"
        inputs = draw(shape, dtype, seed=1)
        lam = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2.0, shape.ridge), dtype)
        # a single key leaves no gradient in q, k and lambda: there the error is measured on the output's scale
        lines = self.failures(inputs, lam, scale=SCALE, is_causal=shape.is_causal)
        assert not lines, "\n".join(lines)

    def test_hidden(self, name: str) -> None:
        """Every way of hiding keys: as accurate as the plain call, and what is hidden may hold NaN."""
        case = self.hidden_case(name)
        dtype = "float64" if "float64" in self.dtypes else "float32"
        inputs = draw(case.shape, dtype, seed=1)
        lam = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2.0, case.shape.ridge), dtype)
        attend = partial(
            self.evaluate,
            is_causal=case.shape.is_causal,
            hidden=case.given(),
            **dict(case.static),
            **self.options(dtype),
        )
        plain = attend(inputs, lam)
        shown = case.dense()
        if shown.any():
            # where queries see one key there is no gradient in q, k and lambda: their error is measured on the output's
            # scale. The reference is given all that is hidden as a mask, by one program for each shape.
            hidden = {"mask": jnp.asarray(shown)}
            lines = self.beyond_bounds(plain, inputs, lam, "iid", 1.0, SCALE, is_causal=False, hidden=hidden)
            assert not lines, "\n".join(lines)

        queries = np.moveaxis(shown.any(axis=3), 1, 2)
        keys = shown.any(axis=(1, 2)) if "mask" not in case.given() else _seen_by_group(shown, case.shape.kv_heads)
        keys = keys.reshape(*keys.shape[:2], -1)
        poisoned = Inputs(
            *(
                jnp.where(seen[..., None], x, jnp.nan)
                for x, seen in zip(inputs, (queries, keys, keys, queries), strict=True)
            )
        )
        got = attend(poisoned, jnp.where(queries, lam, jnp.nan))
        for what, x in plain.items():
            np.testing.assert_array_equal(got[what], x, err_msg=what)
        for what, seen in (("o", queries), ("dq", queries), ("dlambda", queries), ("dk", keys), ("dv", keys)):
            unseen = ~np.broadcast_to(seen, got[what].shape[:3])
            np.testing.assert_array_equal(np.asarray(got[what])[unseen], 0, err_msg=what)

    @pytest.mark.parametrize("preconditioned", [False, True])
    def test_preconditioner_and_scale(self, preconditioned: bool) -> None:
        """qk_scale and the preconditioner change the path, not the accuracy."""
        length = 3 * self.length // 10
        shape = Shape(queries=length, keys=length, heads=2, kv_heads=1, dim=16, value_dim=16)
        inputs = draw(shape, "float32", "anisotropic", seed=3)
        lam = jnp.full(shape.ridge, 0.1, jnp.float32)
        lines = self.failures(inputs, lam, "anisotropic", 0.1, qk_scale=0.7, cg_use_preconditioner=preconditioned)
        assert not lines, "\n".join(lines)

    @pytest.mark.parametrize("qk_scale", [-0.5, 0.0])
    def test_a_scale_below_zero_or_zero(self, qk_scale: float) -> None:
        shape = Shape(queries=40, keys=40, dim=8, value_dim=8)
        inputs = draw(shape, "float32", seed=9)
        lines = self.failures(inputs, jnp.full(shape.ridge, 0.5, jnp.float32), qk_scale=qk_scale)
        assert not lines, "\n".join(lines)

    @pytest.mark.parametrize("ridge_shape", [(), (2,), (1, "T", 1), ("T", 2), (3, 1, 1), (3, "T", 2)], ids=str)
    def test_ridge_layouts(self, ridge_shape: tuple[int | str, ...]) -> None:
        """Scalar, per head, per token, per batch, all: the value and, summed over what was broadcast, the gradient."""
        length = self.length // 5
        ridge_shape = tuple(length if n == "T" else n for n in ridge_shape)
        shape = Shape(batch=3, queries=length, keys=length, heads=2, kv_heads=2)
        inputs = draw(shape, "float32", seed=4)
        lam = jnp.asarray(np.random.default_rng(5).uniform(0.5, 3.0, ridge_shape), jnp.float32)
        lines = self.failures(inputs, lam)
        assert not lines, "\n".join(lines)
        assert self.evaluate(inputs, lam)["dlambda"].shape == ridge_shape

    def test_rank_three_is_one_head(self) -> None:
        shape = Shape(batch=2, queries=50, keys=50)
        inputs = draw(shape, "float32", seed=6)
        lam = jnp.ones((2, 50), jnp.float32)
        flat = self.evaluate(Inputs(*(x[:, :, 0] for x in inputs)), lam)
        full = self.evaluate(inputs, lam[..., None])
        for name in ("o", "dq", "dk", "dv", "dlambda"):
            np.testing.assert_array_equal(flat[name], full[name][:, :, 0], err_msg=name)

    def test_delta_eps(self) -> None:
        """A denominator offset large enough to see; the factor counts as a constant in the gradient."""
        shape = Shape(queries=40, keys=40)
        inputs = draw(shape, "float32", seed=7)
        lam = jnp.full(shape.ridge, 0.5, jnp.float32)
        o, plain = (truth(inputs, lam, delta_eps=eps)["o"] for eps in (0.3, 0.0))
        assert relative_error(o, plain) > 0.01  # the case can tell
        lines = self.failures(inputs, lam, delta_eps=0.3)
        assert not lines, "\n".join(lines)

    def test_residuals(self) -> None:
        shape = Shape(batch=2, queries=7 * self.length // 30, keys=3 * self.length // 10, heads=4, kv_heads=2)
        inputs = draw(shape, "float32", "shifted", seed=8)
        kwargs = {"ridge_lambda": 0.5, "return_residuals": True}
        o, residuals = lla_attention(*inputs[:3], implementation=self.implementation, **kwargs)
        wide = (x.astype(jnp.float64) for x in inputs[:3])
        _, expected = lla_attention(*wide, implementation="reference", **kwargs)
        for x in residuals:
            assert x.shape == o.shape[:3]
        # logits of about 30, each rounded to float32
        np.testing.assert_allclose(residuals.logsumexp, expected.logsumexp, rtol=0, atol=1e-4)
        np.testing.assert_allclose(residuals.omega, expected.omega, rtol=1e-4)
        assert residuals.iterations.dtype == jnp.int32
        assert int(residuals.iterations.min()) >= 1
        assert int(residuals.iterations.max()) <= 32
        m_norm = 10 * shape.dim**0.5 * 10  # |m| at most, the keys being shifted by about 10 a feature
        assert float(residuals.residual_norm.max()) <= 1e-3 * m_norm

    def test_iteration_cap_is_kept(self) -> None:
        inputs = draw(Shape(queries=64, keys=64), "float32", "anisotropic")
        _, residuals = lla_attention(
            *inputs[:3],
            ridge_lambda=0.01,
            cg_max_iters=3,
            return_residuals=True,
            implementation=self.implementation,
        )
        assert int(residuals.iterations.max()) == 3
        capped = residuals.iterations == 3
        assert not bool(residuals.converged[capped].all())
        np.testing.assert_array_equal(residuals.converged[~capped], True)

    def test_the_stop_is_on_the_error(self) -> None:
        """It holds for keys whose residual says little, and the bound is what it says: |r| / sqrt(lambda x.A x)."""
        shape = Shape(queries=96, keys=96)
        inputs = draw(shape, "float32", "low_rank")
        kwargs: dict[str, Any] = {"ridge_lambda": 0.1, "return_residuals": True, "precision": "highest"}
        _, residuals = lla_attention(*inputs[:3], implementation=self.implementation, **kwargs)
        assert bool(residuals.converged.all())
        assert float(residuals.relative_error.max()) <= 1e-13**0.5  # the square root of tau, docs/design.md
        # a residual of 1 % says less of x than the error of 1 % that it would be taken for
        _, loose = lla_attention(*inputs[:3], implementation=self.implementation, cg_rtol=1e-4, **kwargs)
        assert bool(loose.converged.all())
        assert float(loose.relative_error.max()) > 1e-2
        q, k, _ = (np.asarray(x[0, :, 0], np.float64) for x in inputs[:3])
        for row in (20, 95):
            p = np.exp(q[row] @ k[: row + 1].T / shape.dim**0.5)
            p /= p.sum()
            centred = k[: row + 1] - p @ k[: row + 1]
            a_matrix = (centred * p[:, None]).T @ centred + 0.1 * np.eye(shape.dim)
            m = p @ k[: row + 1] - q[row]
            energy = m @ np.linalg.solve(a_matrix, m)
            expected = float(loose.residual_norm[0, row, 0]) / (0.1 * energy) ** 0.5
            np.testing.assert_allclose(float(loose.relative_error[0, row, 0]), expected, rtol=1e-2)

    def test_a_stagnated_solve_ends(self) -> None:
        """A stop beyond what rounding allows does not run to the cap, and is told from one that was reached."""
        inputs = draw(Shape(queries=64, keys=64), "float32")
        kwargs: dict[str, Any] = {"ridge_lambda": 0.1, "return_residuals": True, "precision": "highest"}
        kwargs["implementation"] = self.implementation
        o, residuals = lla_attention(*inputs[:3], **kwargs)
        beyond, stagnated = lla_attention(*inputs[:3], cg_rtol=0.0, cg_max_iters=1000, **kwargs)
        assert int(stagnated.iterations.max()) <= 2 * int(residuals.iterations.max())
        assert not bool(stagnated.converged.all())
        assert relative_error(beyond, o) <= 1e-6  # both are right to the rounding of float32

    def test_a_looser_stop_takes_fewer_steps(self) -> None:
        inputs = draw(Shape(queries=64, keys=64), "float32")

        def steps(**kwargs: Any) -> int:
            _, residuals = lla_attention(
                *inputs[:3], ridge_lambda=0.1, return_residuals=True, implementation=self.implementation, **kwargs
            )
            return int(residuals.iterations.sum())

        assert steps(cg_rtol=1e-2) < steps(cg_rtol=1e-6) < steps(cg_rtol=1e-10)
        assert steps(cg_rtol=1e-6, cg_atol=1e12) == 0  # every right-hand side is below the floor

    def test_rows_do_not_see_each_other(self) -> None:
        """A row's result is the same bits whatever its neighbours' ridges make of the loop."""
        inputs = draw(Shape(queries=48, keys=48), "float32")
        slow = jnp.where(jnp.arange(48) % 2 == 0, 10.0, 0.01).astype(jnp.float32)[None, :, None]
        mixed = self.evaluate(inputs, slow)["o"][:, ::2]
        alone = self.evaluate(inputs, jnp.full((1, 48, 1), 10.0, jnp.float32))["o"][:, ::2]
        np.testing.assert_array_equal(mixed, alone)

    def test_a_bad_traced_ridge_is_nan(self) -> None:
        """Rows whose ridge is not positive are NaN; the other rows are untouched."""
        inputs = draw(Shape(queries=40, keys=40), "float32")
        good = jnp.full((1, 40, 1), 2.0, jnp.float32)
        bad = good.at[0, 5:8, 0].set(jnp.asarray([0.0, -1.0, jnp.nan], jnp.float32))
        o, o_good = self.evaluate(inputs, bad)["o"], self.evaluate(inputs, good)["o"]
        assert bool(jnp.isnan(o[:, 5:8]).all())
        rest = np.setdiff1d(np.arange(40), [5, 6, 7])
        np.testing.assert_array_equal(o[:, rest], o_good[:, rest])

    def test_hidden_keys_do_not_matter(self) -> None:
        """Causal: other values of the later keys leave earlier outputs the same bits."""
        shape = Shape(queries=self.length, keys=self.length)
        inputs = draw(shape, "float32")
        lam = jnp.ones(shape.ridge, jnp.float32)
        cut = self.length - 10
        changed = inputs._replace(k=inputs.k.at[:, cut:].mul(-100), v=inputs.v.at[:, cut:].add(7))
        before, after = self.evaluate(inputs, lam)["o"], self.evaluate(changed, lam)["o"]
        np.testing.assert_array_equal(before[:, :cut], after[:, :cut])

    def test_repeatable(self) -> None:
        """The same inputs give the same bits, outputs and gradients."""
        shape = Shape(batch=2, queries=self.length // 2, keys=self.length // 2, heads=2, kv_heads=1)
        inputs = draw(shape, "float32")
        lam = jnp.full(shape.ridge, 0.1, jnp.float32)
        first, second = self.evaluate(inputs, lam), self.evaluate(inputs, lam)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def _seen_by_group(shown: np.ndarray, kv_heads: int) -> np.ndarray:
    """(B, N, T, S) -> (B, S, K): which keys some query of the heads that share a key head sees."""
    batch, _, _, keys = shown.shape
    return np.moveaxis(shown.any(axis=2).reshape(batch, kv_heads, -1, keys).any(axis=2), 1, 2)
