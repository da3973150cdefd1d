"""The tests that every implementation of ``parallax_attention`` passes. Subclass ``ParallaxTests`` and name it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import parallax_attention
from tests.cases import HIDDEN, KIND_SHAPES, KINDS, Hidden, Inputs, Shape, draw, relative_error
from tests.implementation_tests import SCALE, SHAPES

NAMES = ("o", "dq", "dprobe", "dk", "dv")


def draw_probe(inputs: Inputs, seed: int = 5) -> jax.Array:
    """For which k.r is about as large as a feature of the keys: a_ij is 1 give or take that."""
    shape = inputs.q.shape
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * shape[-1] ** -0.5).astype(inputs.q.dtype)


@cache
def outputs_and_gradients(**kwargs: Any) -> Callable[..., dict[str, jax.Array]]:
    """jit-ed ``(inputs, probe, hidden)`` -> what NAMES names, compiled once per options, dtype and shape."""

    @jax.jit
    def run(inputs: Inputs, probe: jax.Array, hidden: dict[str, Any]) -> dict[str, jax.Array]:
        def call(q: jax.Array, r: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return parallax_attention(q, r, k, v, **hidden, **kwargs)

        o, vjp = jax.vjp(call, inputs.q, probe, inputs.k, inputs.v)
        return dict(zip(NAMES, (o, *vjp(inputs.g)), strict=True))

    return run


def evaluate(inputs: Inputs, probe: jax.Array, hidden: Any = None, **kwargs: Any) -> dict[str, jax.Array]:
    """The output and all gradients; ``hidden`` are the arrays that hide keys, by argument."""
    return outputs_and_gradients(**kwargs)(inputs, probe, hidden or {})


def truth(inputs: Inputs, probe: jax.Array, hidden: Any = None, **kwargs: Any) -> dict[str, jax.Array]:
    """The float64 reference on these very inputs, as rounded to their dtype."""
    wide = Inputs(*(x.astype(jnp.float64) for x in inputs))
    return evaluate(wide, probe.astype(jnp.float64), hidden, implementation="reference", **kwargs)


class ParallaxTests:
    """Accuracy against the float64 reference, shapes, what is hidden, the softmax limit, repeatability."""

    implementation: str
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    shapes: tuple[Shape, ...] = SHAPES
    kind_shapes: tuple[Shape, ...] = KIND_SHAPES
    hidden: tuple[str, ...] = tuple(HIDDEN)
    length: int = 300

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "shape" in metafunc.fixturenames:
            shapes = self.kind_shapes if metafunc.definition.originalname == "test_accuracy" else self.shapes
            metafunc.parametrize("shape", shapes, ids=str)
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.hidden)

    def bound(self, dtype: str, name: str) -> float:
        """The norm-wise error allowed."""
        raise NotImplementedError

    def hidden_case(self, name: str) -> Hidden:
        """The case of ``test_hidden``, on a shape that this implementation can afford."""
        return HIDDEN[name]

    def evaluate(self, inputs: Inputs, probe: jax.Array, hidden: Any = None, **kwargs: Any) -> dict[str, jax.Array]:
        return evaluate(inputs, probe, hidden, implementation=self.implementation, **kwargs)

    @property
    def widest(self) -> str:
        return "float64" if "float64" in self.dtypes else "float32"

    def failures(
        self, got: dict[str, jax.Array], expected: dict[str, jax.Array], dtype: str, scale: float = 0.0
    ) -> list[str]:
        """What is off by more than its bound; ``scale``: see ``SCALE``."""
        lines = []
        for name in NAMES:
            assert str(got[name].dtype) == dtype
            floor = scale * float(jnp.linalg.norm(expected["dv"]))
            error, bound = relative_error(got[name], expected[name], floor), self.bound(dtype, name)
            if not error <= bound:
                lines.append(f"{dtype} {name}: {error:.1e} > {bound:.1e}")
        return lines

    @pytest.mark.parametrize("kind", KINDS)
    def test_accuracy(self, shape: Shape, kind: str) -> None:
        lines = []
        for dtype in self.dtypes:
            inputs = draw(shape, dtype, kind)
            probe = draw_probe(inputs)
            got, expected = (run(inputs, probe, is_causal=shape.is_causal) for run in (self.evaluate, truth))
            lines += self.failures(got, expected, dtype)
        assert not lines, "\n".join(lines)

    def test_shapes(self, shape: Shape) -> None:
        """Any length, grouping and dimension. A single key leaves no gradient but dv."""
        inputs = draw(shape, self.widest, seed=1)
        probe = draw_probe(inputs)
        got, expected = (run(inputs, probe, is_causal=shape.is_causal) for run in (self.evaluate, truth))
        assert not self.failures(got, expected, self.widest, SCALE)

    def test_hidden(self, name: str) -> None:
        """Every way of hiding keys: as accurate as the plain call, and what is hidden may hold NaN."""
        case = self.hidden_case(name)
        inputs = draw(case.shape, self.widest, seed=1)
        probe = draw_probe(inputs)
        options = {"is_causal": case.shape.is_causal, **dict(case.static)}
        plain = self.evaluate(inputs, probe, case.given(), **options)
        shown = case.dense()
        if shown.any():
            expected = truth(inputs, probe, {"mask": jnp.asarray(shown)}, is_causal=False)
            lines = self.failures(plain, expected, self.widest, SCALE)
            assert not lines, "\n".join(lines)
        queries = np.moveaxis(shown.any(axis=3), 1, 2)
        keys = shown.reshape(shown.shape[0], case.shape.kv_heads, -1, *shown.shape[2:]).any(axis=(2, 3))
        keys = np.moveaxis(keys, 1, 2)
        if "mask" not in case.given():  # then heads are alike
            keys = np.broadcast_to(keys.any(axis=2, keepdims=True), keys.shape)
        places = (queries, keys, keys, queries)
        poisoned = Inputs(*(jnp.where(at[..., None], x, jnp.nan) for x, at in zip(inputs, places, strict=True)))
        got = self.evaluate(poisoned, jnp.where(queries[..., None], probe, jnp.nan), case.given(), **options)
        for what, x in plain.items():
            np.testing.assert_array_equal(got[what], x, err_msg=what)
        for what, at in (("o", queries), ("dq", queries), ("dprobe", queries), ("dk", keys), ("dv", keys)):
            np.testing.assert_array_equal(np.asarray(got[what])[~at], 0, err_msg=what)

    @pytest.mark.parametrize("qk_scale", [0.7, -0.5, 0.0])
    def test_scale(self, qk_scale: float) -> None:
        inputs = draw(Shape(queries=40, keys=40, dim=8, value_dim=8), self.widest, seed=9)
        probe = draw_probe(inputs)
        got, expected = (run(inputs, probe, qk_scale=qk_scale) for run in (self.evaluate, truth))
        assert not self.failures(got, expected, self.widest, SCALE)  # of dq, which is 0 at 0

    def test_a_zero_probe_is_softmax_attention(self) -> None:
        """Values and gradients; the probe's own gradient is that of the slope there, and not 0."""
        shape = Shape(2, 70, 70, 4, 2, 16, 16)
        inputs = draw(shape, "float32")
        got = self.evaluate(inputs, jnp.zeros_like(inputs.q))
        softmax = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
        with jax.default_matmul_precision("highest"):
            o, vjp = jax.vjp(softmax, *inputs[:3])
            dq, dk, dv = vjp(inputs.g)
        for name, expected in {"o": o, "dq": dq, "dk": dk, "dv": dv}.items():
            assert relative_error(got[name], expected) <= max(2e-6, self.bound("float32", name)), name
        assert float(jnp.abs(got["dprobe"]).max()) > 1e-2

    def test_an_offset_of_the_keys_changes_nothing_but_the_logits(self) -> None:
        """Keys around 100 along a direction that the queries have none of: float32's error, not a hundred times it."""
        shape = Shape(1, 90, 90, 1, 1, 16, 16)
        inputs = draw(shape, "float32")
        probe = draw_probe(inputs)
        q = inputs.q.at[..., 0].set(0)
        moved = inputs._replace(q=q, k=inputs.k.at[..., 0].add(100))
        got, expected = self.evaluate(moved, probe), truth(moved, probe)
        assert not self.failures(got, expected, "float32")

    def test_hidden_keys_do_not_matter(self) -> None:
        """Causal: other values of the later keys leave earlier outputs the same bits."""
        shape = Shape(queries=self.length, keys=self.length)
        inputs = draw(shape, "float32")
        cut, probe = self.length - 10, draw_probe(inputs)
        changed = inputs._replace(k=inputs.k.at[:, cut:].mul(-100), v=inputs.v.at[:, cut:].add(7))
        before, after = self.evaluate(inputs, probe)["o"], self.evaluate(changed, probe)["o"]
        np.testing.assert_array_equal(before[:, :cut], after[:, :cut])

    def test_repeatable(self) -> None:
        """The same inputs give the same bits, outputs and gradients."""
        inputs = draw(Shape(2, self.length // 2, self.length // 2, 2, 1), "float32")
        first, second = (self.evaluate(inputs, draw_probe(inputs)) for _ in range(2))
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)

    def test_residuals(self) -> None:
        """omega and logsumexp are the softmax's; a query that sees no key has 0 and -inf."""
        shape = Shape(2, 40, 40, 2, 1, 16, 16)
        inputs = draw(shape, "float32")
        lengths = jnp.array([0, 33])
        _, residuals = parallax_attention(
            inputs.q,
            draw_probe(inputs),
            *inputs[1:3],
            key_value_seq_lengths=lengths,
            implementation=self.implementation,  # type: ignore[arg-type]
            return_residuals=True,
        )
        logits = np.einsum("btnd,bsd->btns", inputs.q, inputs.k[:, :, 0]) / 4
        positions = np.arange(40)
        visible = positions <= positions[:, None, None]
        visible = visible[None] & (positions[None, None, None] < np.asarray(lengths)[:, None, None, None])
        logits = np.where(visible, logits, -np.inf)
        with np.errstate(divide="ignore"):
            expected = np.log(np.exp(logits).sum(axis=3))
        np.testing.assert_allclose(residuals.logsumexp, expected, rtol=self.bound("float32", "o"), atol=1e-5)
        assert residuals.omega.shape == (2, 40, 2)
        np.testing.assert_array_equal(residuals.omega[0], 0)
        assert bool((residuals.omega[1] >= 1 - 1e-3).all())
