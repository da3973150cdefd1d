"""The Triton kernels on an NVIDIA GPU: ``pytest -m gpu``. A green CI says nothing about these: it has no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flashlla_jax import default_implementation, lla_attention
from tests.cases import ALL_KINDS, GRADIENTS, RIDGES, Inputs, Shape, draw, evaluate, relative_error, truth
from tests.hard_key_tests import HardKeyTests
from tests.implementation_tests import SHAPES, ImplementationTests

pytestmark = pytest.mark.gpu

TILE_SHAPES = (
    *SHAPES,
    Shape(queries=63, keys=63, dim=64, value_dim=64),
    Shape(queries=65, keys=65, dim=64, value_dim=64),
    Shape(queries=1000, keys=1000, dim=8, value_dim=8),
    Shape(queries=100, keys=300, heads=2, kv_heads=1, dim=80, value_dim=48),
    Shape(queries=200, keys=200, dim=128, value_dim=128),
    Shape(queries=130, keys=70, dim=256, value_dim=200, is_causal=False),
)


class TestTriton(ImplementationTests):
    """float32 at HIGHEST, bfloat16 and float16 at HIGH."""

    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")
    shapes = TILE_SHAPES

    @pytest.fixture(autouse=True)
    def exact_float32(self) -> Iterator[None]:
        with jax.default_matmul_precision("highest"):
            yield

    def options(self, dtype: str) -> dict[str, Any]:
        return {} if dtype == "float32" else {"precision": "high"}

    def bound(self, dtype: str, kind: str, ridge: float, name: str, dense_error: float) -> float:
        if dtype == "float32":
            return 2e-5 if math.isnan(dense_error) else max(2e-5, 5 * dense_error)
        nearly_singular = kind == "peaky" and ridge < 0.1  # a condition number of 1e4, x of 4e3
        if nearly_singular and dtype == "float16":
            # not promised; measured 1.8e-2 with the steps capped at 2 D
            return 4e-2
        # the promise of precision="high"; twice that where sums in float32 round x.k, 1e4, to 1e-3
        slack = 2 if nearly_singular else 1
        if name == "o" or name == "dv":
            return slack * (3e-3 if name == "o" else 6e-3)
        return slack * (6e-3 if ridge >= 0.1 else 1e-2)


class TestHardKeys(HardKeyTests):
    implementation = "triton"
    # sums in the order of the features round the logits of a row that two keys share more than BLAS's do: measured 5.1
    factor = 10


# The promise of bfloat16 at DEFAULT by ridge: o, and the worst gradient; for keys N(0, 1), and for any.
DEFAULT_BOUNDS = {10.0: (3e-3, 4e-3), 1.0: (4e-3, 6e-3), 0.1: (6e-3, 1.7e-2), 0.01: (1.1e-2, 5e-2)}
HARD_BOUNDS = {10.0: (8e-3, 1.5e-2), 1.0: (8e-3, 1.5e-2), 0.1: (1e-2, 3e-2), 0.01: (2e-2, 1e-1)}


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dim", [64, 128])
def test_bfloat16_default_accuracy(dim: int, kind: str, ridge: float) -> None:
    shape = Shape(queries=512, keys=512, dim=dim, value_dim=dim)
    inputs = draw(shape, "bfloat16", kind)
    lam = jnp.full(shape.ridge, ridge, jnp.float32)
    got, expected = evaluate(inputs, lam, implementation="triton"), truth(inputs, lam)
    errors = {name: relative_error(got[name], expected[name]) for name in ("o", *GRADIENTS)}
    o, gradient = (DEFAULT_BOUNDS if kind == "iid" else HARD_BOUNDS)[ridge]
    # the promise was made for D = 64; a quarter more at 128, where rows of few keys are twice as many
    slack = 1.0 if dim == 64 else 1.25
    assert all(errors[name] <= slack * (o if name in ("o", "dv") else gradient) for name in errors), errors


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("ridge", RIDGES)
def test_float32_highest_against_xla(kind: str, ridge: float) -> None:
    """At most three times the XLA path's error on the same inputs, or 2e-6, a few roundings of a sum.

    If keys are of very different lengths, the rounding of the long ones' logits decides. Sums in the order of the
    features round more than BLAS's do: measured 4.6 times, on a GPU, and 2 to 4 times in the interpreter.
    """
    shape = Shape(queries=300, keys=300, dim=64, value_dim=64)
    inputs = draw(shape, "float32", kind)
    lam = jnp.full(shape.ridge, ridge, jnp.float32)
    expected = truth(inputs, lam)
    ours = evaluate(inputs, lam, implementation="triton", precision="highest")
    theirs = evaluate(inputs, lam, implementation="xla", precision="highest")
    for name in ("o", *GRADIENTS):
        bound = max(2e-6, (6 if kind == "varied" else 3) * relative_error(theirs[name], expected[name]))
        assert relative_error(ours[name], expected[name]) <= bound, name


@pytest.mark.parametrize("precision", ["default", "high"])
def test_bitwise_repeatable(precision: str) -> None:
    shape = Shape(batch=2, queries=1000, keys=1000, heads=4, kv_heads=2, dim=64, value_dim=64)
    inputs = draw(shape, "bfloat16")
    lam = jnp.asarray(np.random.default_rng(0).choice([0.01, 0.1, 10.0], shape.ridge), jnp.float32)
    first, second = (evaluate(inputs, lam, implementation="triton", precision=precision) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(np.asarray(first[name]), np.asarray(second[name]), err_msg=name)


def test_hidden_keys_do_not_matter_in_bfloat16() -> None:
    shape = Shape(queries=300, keys=300, dim=64, value_dim=64)
    inputs = draw(shape, "bfloat16")
    lam = jnp.full(shape.ridge, 0.1, jnp.float32)
    changed = inputs._replace(k=inputs.k.at[:, 290:].mul(-100), v=inputs.v.at[:, 290:].add(7))
    before, after = (evaluate(x, lam, implementation="triton")["o"][:, :290] for x in (inputs, changed))
    np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def test_memory_beyond_the_arrays_is_not_read() -> None:
    """The inputs are slices between NaN in one buffer; a ragged length, so that tiles reach past the end."""
    shape = Shape(queries=77, keys=77, heads=2, kv_heads=1, dim=40, value_dim=24)
    inputs = draw(shape, "bfloat16")
    lam = jnp.full(shape.ridge, 0.5, jnp.float32)
    clean = evaluate(inputs, lam, implementation="triton")
    noise = [jnp.full((1 << 20,), jnp.nan, jnp.bfloat16) + 0 for _ in range(64)]  # what the pool then hands out again
    jax.block_until_ready(noise)
    del noise
    again = evaluate(Inputs(*(x + 0 for x in inputs)), lam, implementation="triton")
    for name in clean:
        assert bool(jnp.isfinite(again[name].astype(jnp.float32)).all()), name
        np.testing.assert_array_equal(np.asarray(clean[name]), np.asarray(again[name]), err_msg=name)


def test_transforms() -> None:
    """vmap folds into the batch; checkpoint and scan give the plain gradient."""
    shape = Shape(batch=3, queries=70, keys=70, heads=2, kv_heads=1, dim=32, value_dim=32)
    inputs = draw(shape, "bfloat16")

    def one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return lla_attention(q, k, v, ridge_lambda=0.5, implementation="triton")

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(one(q, k, v).astype(jnp.float32)))

    q, k, v = inputs[:3]
    stacked = jax.vmap(one, in_axes=(0, None, None))(jnp.stack([q, 2 * q]), k, v)
    np.testing.assert_array_equal(np.asarray(stacked[1]), np.asarray(one(2 * q, k, v)))
    plain = jax.jit(jax.grad(loss))(q, k, v)
    np.testing.assert_array_equal(np.asarray(jax.jit(jax.grad(jax.checkpoint(loss)))(q, k, v)), np.asarray(plain))
    mapped = jax.vmap(jax.grad(loss), in_axes=(0, None, None))(jnp.stack([q, 2 * q]), k, v)
    np.testing.assert_array_equal(np.asarray(mapped[0]), np.asarray(plain))

    def layers(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (one(x, x[:, :, :1], x[:, :, :1]), None), x, None, length=3)[0]

    looped = q
    for _ in range(3):
        looped = one(looped, looped[:, :, :1], looped[:, :, :1])
    np.testing.assert_array_equal(np.asarray(jax.jit(layers)(q)), np.asarray(looped))


def test_training_follows_the_xla_path() -> None:
    """300 steps of a small regression: the loss falls, and is where the XLA path's is."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(4, 128, 32)), jnp.float32)
    targets = inputs @ jnp.asarray(rng.normal(size=(32, 32)) / 32**0.5, jnp.float32)

    def train(implementation: Any) -> list[float]:
        eye = jnp.eye(32, dtype=jnp.float32)
        params = {"q": eye, "k": eye, "v": eye}
        optimizer = optax.adam(1e-3)
        state = optimizer.init(params)

        @jax.jit
        def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
            def loss(params: Any) -> jax.Array:
                q, k, v = ((inputs @ params[n]).astype(jnp.bfloat16) for n in "qkv")
                o = lla_attention(q, k, v, ridge_lambda=1.0, implementation=implementation)
                return jnp.mean(jnp.square(o.astype(jnp.float32) - targets))

            value, gradient = jax.value_and_grad(loss)(params)
            with jax.numpy_dtype_promotion("standard"):  # optax relies on it
                updates, state = optimizer.update(gradient, state)
                return optax.apply_updates(params, updates), state, value

        losses = []
        for _ in range(300):
            params, state, value = step(params, state)
            losses.append(float(value))
        return losses

    ours, theirs = train("triton"), train("xla")
    assert ours[-1] < 0.5 * ours[0]
    # bfloat16's rounding of the inputs, 2^-9, is the noise of either curve
    np.testing.assert_allclose(ours, theirs, rtol=2e-2)


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets are 64-bit: the last head of an array of 2^31 elements and more is computed like a small one."""
    heads, length, dim = 64, 1024, 256
    batch = 129  # 129 * 1024 * 64 * 256 > 2^31
    one = draw(Shape(queries=length, keys=length, dim=dim, value_dim=dim), "bfloat16")
    q, k, v = (jnp.zeros((batch, length, heads, dim), jnp.bfloat16).at[-1, :, -1].set(x[0, :, 0]) for x in one[:3])
    o = lla_attention(q, k, v, implementation="triton", cg_max_iters=4)[-1:, :, -1:]
    expected = lla_attention(*one[:3], implementation="triton", cg_max_iters=4)
    np.testing.assert_array_equal(np.asarray(o), np.asarray(expected))


def test_none_picks_triton() -> None:
    """Eagerly, under jit and under grad; XLA where the kernels cannot serve."""
    assert default_implementation() == "triton"
    shape = Shape(queries=100, keys=100, heads=2, kv_heads=1, dim=32, value_dim=32)
    inputs = draw(shape, "bfloat16")
    lam = jnp.full(shape.ridge, 0.5, jnp.float32)
    chosen, named, other = (evaluate(inputs, lam, implementation=name) for name in (None, "triton", "xla"))
    for name in chosen:
        np.testing.assert_array_equal(np.asarray(chosen[name]), np.asarray(named[name]), err_msg=name)
    assert any(
        bool((chosen[name] != other[name]).any()) for name in chosen
    )  # else this test would not see a difference
    eager = lla_attention(*inputs[:3], ridge_lambda=lam)
    np.testing.assert_array_equal(np.asarray(eager), np.asarray(chosen["o"]))
    mapped = jax.vmap(lambda q: lla_attention(q, *inputs[1:3], ridge_lambda=lam))(jnp.stack([inputs.q, inputs.q]))
    np.testing.assert_array_equal(np.asarray(mapped[1]), np.asarray(chosen["o"]))
    wide = draw(shape, "float64")
    o = lla_attention(*wide[:3], ridge_lambda=lam)
    np.testing.assert_array_equal(
        np.asarray(o), np.asarray(lla_attention(*wide[:3], ridge_lambda=lam, implementation="xla"))
    )


def test_one_exported_program_runs_on_gpu_and_cpu() -> None:
    shape = Shape(queries=100, keys=100, heads=2, kv_heads=1, dim=32, value_dim=32)
    inputs = draw(shape, "float32")

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.grad(lambda *x: jnp.sum(jnp.sin(lla_attention(*x, ridge_lambda=0.5))), argnums=(0, 1, 2))(q, k, v)

    exported = jax.export.export(
        jax.jit(gradients),
        platforms=("cuda", "cpu"),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")],
    )(*inputs[:3])
    exported = jax.export.deserialize(exported.serialize())
    on_gpu = exported.call(*inputs[:3])
    on_cpu = exported.call(*jax.device_put(inputs[:3], jax.devices("cpu")[0]))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert relative_error(ours, theirs) < 1e-2  # tf32's products against float32's
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(gradients)(*inputs[:3])
    for theirs, truth_ in zip(on_cpu, expected, strict=True):
        assert relative_error(theirs, truth_) < 1e-4
