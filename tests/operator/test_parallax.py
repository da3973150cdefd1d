"""``parallax_attention``: its reference against things that share no code with it, the XLA path against that."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashlla_jax.attention
from flashlla_jax import lla_attention, parallax_attention
from tests.cases import KINDS, Inputs, Shape, draw, relative_error
from tests.devices.meshes import WAYS, assert_alike, compiled, mesh, output_and_gradients
from tests.devices.meshes import attending as attending_by
from tests.parallax_tests import NAMES, ParallaxTests, draw_probe, evaluate, outputs_and_gradients

SMALL = Shape(2, 7, 10, 4, 2, 5, 3)


@pytest.mark.slow
class TestParallaxBlockwise(ParallaxTests):
    implementation = "xla"

    def bound(self, dtype: str, name: str) -> float:
        # a hundred roundings of the dtype that is computed in, and more in float64, for what is measured by SCALE;
        # 16-bit outputs are rounded once, to 2^-9 and 2^-12
        return {"float64": 1e-12, "float32": 2e-5, "bfloat16": 3e-3, "float16": 4e-4}[dtype]


def exact_probe(q: jax.Array, k: jax.Array, lam: float, is_causal: bool = True) -> jax.Array:
    """``A^-1 (kbar - q)`` of one head, query by query, in float64: what LLA solves for."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    out = np.zeros_like(q)
    for b, i, n in np.ndindex(q.shape[:3]):
        keys = k[b, : i + 1 + k.shape[1] - q.shape[1] if is_causal else None, n * k.shape[2] // q.shape[2]]
        s = keys @ q[b, i, n] * q.shape[3] ** -0.5
        p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        kbar = p @ keys
        covariance = (keys - kbar).T @ (p[:, None] * (keys - kbar))
        out[b, i, n] = np.linalg.solve(covariance + lam * np.eye(q.shape[3]), kbar - q[b, i, n])
    return jnp.asarray(out)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [10.0, 0.1])
def test_the_exact_probe_is_local_linear_attention(lam: float, kind: str, implementation: Any) -> None:
    """To the error of the two solves: LLA's reference has a direct one too, of condition up to 1e5 (shifted keys)."""
    inputs = draw(SMALL, "float64", kind)
    probe = exact_probe(inputs.q, inputs.k, lam)
    got = parallax_attention(inputs.q, probe, *inputs[1:3], implementation=implementation)
    expected = lla_attention(*inputs[:3], ridge_lambda=lam, delta_eps=0.0, implementation="reference")
    assert relative_error(got, expected) <= 1e-10


def test_the_reference_is_the_formula() -> None:
    inputs = draw(SMALL, "float64")
    q, k, v, r = (np.asarray(x) for x in (*inputs[:3], draw_probe(inputs)))
    expected = np.zeros((2, 7, 4, 3))
    for b, i, n in np.ndindex(2, 7, 4):
        keys, values = k[b, : i + 4, n // 2], v[b, : i + 4, n // 2]
        p = np.exp(keys @ q[b, i, n] / 5**0.5)
        p /= p.sum()
        a = [1 - (key - p @ keys) @ r[b, i, n] for key in keys]
        expected[b, i, n] = (p * a) @ values
    got = parallax_attention(inputs.q, jnp.asarray(r), *inputs[1:3], implementation="reference")
    assert relative_error(got, jnp.asarray(expected)) <= 1e-14


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_are_finite_differences(implementation: Any) -> None:
    """Central differences of step 1e-5 err by 1e-10 of the third derivative and 1e-11 of rounding."""
    inputs = draw(SMALL, "float64")
    probe = draw_probe(inputs)
    gradients = evaluate(inputs, probe, implementation=implementation)
    rng = np.random.default_rng(7)
    call = partial(parallax_attention, implementation=implementation)
    arrays = [inputs.q, probe, inputs.k, inputs.v]
    for place, name in enumerate(NAMES[1:]):
        direction = jnp.asarray(rng.normal(size=arrays[place].shape))
        moved = [[x + step * direction if i == place else x for i, x in enumerate(arrays)] for step in (1e-5, -1e-5)]
        plus, minus = (float(jnp.sum(inputs.g * call(*x))) for x in moved)
        expected = float(jnp.sum(gradients[name] * direction))
        assert abs((plus - minus) / 2e-5 - expected) <= 1e-8 * (1 + abs(expected)), name


def test_rank_3() -> None:
    inputs = draw(Shape(2, 9, 9, 1, 1, 6, 4), "float32")
    probe = draw_probe(inputs)
    whole = parallax_attention(inputs.q, probe, *inputs[1:3])
    np.testing.assert_array_equal(
        parallax_attention(*(x[:, :, 0] for x in (inputs.q, probe, *inputs[1:3]))), whole[:, :, 0]
    )


@pytest.mark.slow
def test_transforms() -> None:
    """vmap folds into the batch, checkpoint changes nothing, and a gradient has a derivative in forward mode."""
    inputs = draw(Shape(3, 20, 20, 2, 1, 8, 8), "float64")
    q, k, v, _ = inputs
    r = draw_probe(inputs)

    def loss(q: jax.Array, r: jax.Array, k: jax.Array, v: jax.Array, implementation: Any = "xla") -> jax.Array:
        return jnp.sum(jnp.sin(parallax_attention(q, r, k, v, implementation=implementation)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    plain = gradient(q, r, k, v)
    over = jax.vmap(jax.grad(loss, argnums=(0, 1, 2, 3)), in_axes=(0, None, None, None))
    for got, expected in zip(over(jnp.stack([2 * q, q]), r, k, v), plain, strict=True):
        np.testing.assert_allclose(got[1], expected, atol=1e-12)
    for got, expected in zip(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2, 3))(q, r, k, v), plain, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)

    def tangent(implementation: Any) -> Any:
        of = jax.grad(partial(loss, implementation=implementation), argnums=(0, 1, 2, 3))
        return jax.jvp(of, (q, r, k, v), (r, k[:, :, [0, 0]], q[:, :, :1], k))[1]

    for got, expected in zip(tangent("xla"), tangent("reference"), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


DIVIDED = Shape(2, 32, 32, 4, 2, 8, 12)


@cache
def on_one_device() -> Any:
    attend = attending_by(parallax=True)
    return jax.jit(partial(output_and_gradients, attend, {}))(*given())


def given() -> list[jax.Array]:
    """q, k, v, the probe and the cotangent."""
    inputs = draw(DIVIDED, "float32")
    return [*inputs[:3], draw_probe(inputs), inputs.g]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("placed", [{"length": "x"}, {"length": None, "batch": "x"}], ids=["length", "batch"])
def test_on_two_devices(way: str, placed: dict[str, Any]) -> None:
    run, arrays = compiled(way, {"x": 2}, {}, {"parallax": True}, given(), **placed)
    assert_alike(run(*arrays), on_one_device())


def test_a_probe_that_lies_elsewhere_is_moved_to_the_query() -> None:
    on = mesh(AxisType.Explicit)
    places = (P(None, "x"), P(), P("x"), P("x"))
    q, k, v, r, g = given()
    arrays = [jax.device_put(x, NamedSharding(on, place)) for x, place in zip((q, k, v, r), places, strict=True)]
    got = jax.jit(partial(output_and_gradients, attending_by(parallax=True), {}))(
        *arrays, jax.device_put(g, NamedSharding(on, P(None, "x")))
    )
    assert_alike(got, on_one_device())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no array": ({"probe": 1.0}, TypeError, "probe must be an array, got float"),
    "shape": ({"probe": jnp.ones((2, 6, 3))}, ValueError, r"probe must have the query's shape, \(2, 6, 4\), got"),
    "dtype": ({"probe": jnp.ones((2, 6, 4), "bfloat16")}, TypeError, "the query's dtype, float32, got bfloat16"),
    "integers": ({"probe": jnp.ones((2, 6, 4), "int32")}, TypeError, "probe has dtype int32; allowed are bfloat16"),
    "key": ({"key": jnp.ones((2, 6, 3), "float32")}, ValueError, "the same head dimension"),
    "scale": ({"qk_scale": np.inf}, ValueError, "qk_scale must be finite, got inf"),
    "flag": ({"return_residuals": 1}, TypeError, "return_residuals must be True or False"),
    "implementation": ({"implementation": "cuda"}, ValueError, "implementation must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    changed, error, message = REFUSED[name]
    good = dict.fromkeys(("query", "probe", "key", "value"), jnp.ones((2, 6, 4), "float32"))
    with pytest.raises(error, match=message):
        parallax_attention(**(good | changed))


def test_triton_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = jnp.ones((1, 4, 300), "float32")
    with pytest.raises(NotImplementedError, match="its head dimension is at most 256, got 300"):
        parallax_attention(wide, wide, wide, wide, implementation="triton")
    monkeypatch.setattr(flashlla_jax.attention, "_no_triton", lambda: "it is not here")
    with pytest.raises(NotImplementedError, match=r'cannot serve this call: it is not here. implementation="xla"'):
        parallax_attention(*(jnp.ones((1, 4, 8), "float32"),) * 4, implementation="triton")


def test_no_array_is_quadratic() -> None:
    """Forward and backward hold strips of a block of queries, not (T, S)."""
    length = 4096
    x = jax.ShapeDtypeStruct((1, length, 1, 8), "float32")
    run = outputs_and_gradients(implementation="xla")
    memory = run.lower(Inputs(x, x, x, x), x, {}).compile().memory_analysis()  # type: ignore[attr-defined]
    assert memory.temp_size_in_bytes < length * length * 4 / 4
