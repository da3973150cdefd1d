"""``lla_decode`` by XLA and by the reference: every way of hiding keys, dtypes, arguments, transforms, devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flashlla_jax import decode_xla, lla_attention, lla_decode
from tests.cases import Shape, draw, relative_error
from tests.decode.decode_tests import CASES, SHAPE, Case, DecodeTests, poisoned, worst_row


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_xla, "_BLOCK_SIZE", 1)  # of D keys, the least
        jax.clear_caches()
        yield
        jax.clear_caches()


class TestXla(DecodeTests):
    implementation = "xla"


@pytest.mark.slow
class TestXlaInFloat64(DecodeTests):
    implementation = "xla"
    dtype = "float64"
    names = ("starts", "mask")


@pytest.mark.slow
class TestReference(DecodeTests):
    implementation = "reference"
    dtype = "float64"
    names = ("lengths below T", "starts", "window", "mask", "mask of three axes")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lengths below T", "mask"])
def test_gradients(name: str) -> None:
    """Of every argument, through a cache that holds NaN where nothing is seen, against the dense reference's."""
    case = CASES[name]
    q, k, v, g = poisoned(case, "float64")
    unseen = jnp.isnan(k[..., :1])
    lam = jnp.asarray(np.random.default_rng(1).uniform(0.1, 2, case.shape.heads))

    def gradients(implementation: Any, *qkv: Any) -> Any:
        def run(q: Any, k: Any, v: Any, lam: Any) -> Any:
            hidden = case.hidden() | {"local_window_size": case.window}
            return lla_decode(q, k, v, ridge_lambda=lam, implementation=implementation, **hidden)

        return jax.jit(lambda *x: jax.vjp(run, *x)[1](g))(*qkv, lam)

    got = gradients("xla", q, k, v)
    expected = gradients("reference", q, *(jnp.where(unseen, 0, x) for x in (k, v)))
    for x, y in zip(got, expected, strict=True):
        assert relative_error(x, y, 1e-3) <= 1e-10  # float64's rounding times conditions of 100 or so
    for x in got[1:3]:
        np.testing.assert_array_equal(jnp.where(unseen, x, 0), 0)
    blind = np.moveaxis(~case.visible().any(axis=3), 1, 2)
    np.testing.assert_array_equal(np.asarray(got[0])[blind], 0)


@pytest.mark.slow
def test_it_is_causal_attention() -> None:
    """What the full forward gives at the last positions of each row."""
    q, k, v, _ = draw(Shape(2, 20, 20, 4, 2, 8, 8), "float64")
    expected = lla_attention(q, k, v, ridge_lambda=0.5, cg_rtol=1e-28)
    for tokens, lengths in ((1, [20, 7]), (3, [20, 7])):
        last = jnp.stack([q[b, n - tokens : n] for b, n in enumerate(lengths)])
        got = lla_decode(last, k, v, jnp.asarray(lengths), ridge_lambda=0.5)
        for b, n in enumerate(lengths):
            assert worst_row(got[b], expected[b, n - tokens : n]) <= 1e-10


@pytest.mark.parametrize(
    ("cache_dtype", "bound"),
    [("bfloat16", 2e-5), ("float8_e4m3fn", 2e-5), ("float8_e5m2", 2e-5), ("float64", 2e-5)],
)
def test_the_cache_may_have_another_dtype(cache_dtype: str, bound: float) -> None:
    """It is widened as it is read: the error is float32's, against the truth of the rounded cache."""
    test = TestXla()
    got, expected = test.compare(Case(SHAPE, [60, 33]), 1.0, cache_dtype=cache_dtype)
    assert worst_row(got, expected) <= bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_queries(dtype: str) -> None:
    test = TestXla()
    test.dtype = dtype
    got, expected = test.compare(Case(SHAPE, [60, 33]), 0.1)
    assert worst_row(got, expected) <= float(jnp.finfo(dtype).eps)  # the output's own rounding


@pytest.mark.parametrize(
    ("lengths", "same"),
    [(33, [33, 33]), (np.int64(33), [33, 33]), (np.array([60, 33], np.uint8), [60, 33]), (jnp.int32(7), [7, 7])],
)
def test_lengths_of_any_kind(lengths: Any, same: list[int]) -> None:
    q, k, v, _ = draw(SHAPE, "float32")
    np.testing.assert_array_equal(lla_decode(q, k, v, lengths), lla_decode(q, k, v, jnp.asarray(same)))


def test_arrays_of_numpy_without_float64() -> None:
    """As under jit: float64 is float32 where x64 is off, and the cache's dtype is the query's."""
    q, k, v, _ = (np.asarray(x) for x in draw(SHAPE, "float64"))
    with jax.enable_x64(False):
        o = lla_decode(q, k, v.astype(np.float32), 60)
    assert o.dtype == jnp.float32


def change(**changed: Any) -> dict[str, Any]:
    q, k, v, _ = draw(SHAPE, "float32")
    return {"query": q, "key_cache": k, "value_cache": v, "lengths": 60} | changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be an array, got list"),
        ({"query": jnp.zeros((2, 2, 4, 8), "int32")}, TypeError, "query has dtype int32; allowed are bfloat16"),
        ({"query": jnp.zeros((2, 2, 8))}, ValueError, r"query must have rank 4, \(B, T, N, D\), got shape \(2, 2, 8\)"),
        ({"query": jnp.zeros((2, 0, 4, 8))}, ValueError, "query must not be empty"),
        ({"query": jnp.zeros((2, 9, 4, 8))}, ValueError, r"query must have 1 to 8 tokens .* more go through lla_atten"),
        ({"query": jnp.zeros((3, 2, 4, 8))}, ValueError, "must have the same batch size"),
        ({"query": jnp.zeros((2, 2, 3, 8))}, ValueError, "must divide the query heads, got 2 for 3"),
        ({"query": jnp.zeros((2, 2, 4, 9))}, ValueError, "query and key_cache must have the same head dimension"),
        ({"key_cache": jnp.zeros((2, 69, 2, 8), "float32")}, ValueError, "must have the same length and heads"),
        ({"key_cache": jnp.zeros((2, 70, 2, 8), "bfloat16")}, TypeError, "must have one dtype, got bfloat16 and flo"),
        ({"key_cache": jnp.zeros((2, 70, 2, 8), "int8")}, TypeError, "key_cache has dtype int8; allowed are .*e5m2"),
        ({"lengths": 71}, ValueError, "lengths must lie between 0 and the cache's 70 positions, got 71 to 71"),
        ({"lengths": -1}, ValueError, "lengths must lie between 0 .* got -1 to -1"),
        ({"lengths": np.array([3, 2**40])}, ValueError, "lengths must lie between 0"),
        ({"lengths": 3.0}, TypeError, "lengths must be an int, or an integer array, got float"),
        ({"lengths": True}, TypeError, "lengths must be an int, or an integer array, got bool"),
        ({"lengths": jnp.zeros(3, "int32")}, ValueError, r"lengths must be a scalar or have the shape \(B,\) = \(2,\)"),
        ({"starts": 3}, TypeError, "starts must be an integer array, got int"),
        ({"starts": jnp.zeros((), "int32")}, ValueError, r"starts must have the shape \(B,\) = \(2,\), got \(\)"),
        ({"mask": np.ones((2, 2, 71), bool)}, ValueError, r"mask must have the shape \(B, T, S\) = \(2, 2, 70\) or"),
        ({"mask": np.ones((2, 2, 70))}, TypeError, "mask must be boolean"),
        ({"local_window_size": -1}, ValueError, "local_window_size must be >= 0, got -1"),
        ({"ridge_lambda": 0.0}, ValueError, "ridge_lambda must be > 0"),
        ({"ridge_lambda": jnp.ones(3)}, ValueError, r"ridge_lambda of shape \(3,\) does not broadcast to \(B, T, N\)"),
        ({"qk_scale": math.inf}, ValueError, "qk_scale must be finite"),
        ({"precision": "exact"}, ValueError, "precision must be"),
        ({"implementation": "cuda"}, ValueError, "implementation must be one of"),
        ({"implementation": "triton"}, NotImplementedError, "cannot serve this call: .*'xla'|\"xla\" runs on every"),
    ],
)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lla_decode(**change(**changed))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"query": jnp.zeros((1, 1, 1, 8)), "key_cache": jnp.zeros((1, 4, 1, 8))}, "does not compute in float64"),
        ({"query": jnp.zeros((1, 1, 1, 300), "float32")}, "head dimension is at most 256, got 300"),
    ],
)
def test_what_triton_does_not_serve(given: dict[str, Any], reason: str) -> None:
    query = given["query"]
    key = given.get("key_cache", jnp.zeros((1, 4, 1, query.shape[-1]), "float32"))
    with pytest.raises(NotImplementedError, match=reason):
        lla_decode(query, key, key, 4, implementation="triton")


def test_a_second_eager_call_compiles_nothing() -> None:
    q, k, v, _ = draw(SHAPE, "float32")

    def gradient(q: jax.Array, lengths: Any) -> jax.Array:
        return jax.grad(lambda q: jnp.sum(lla_decode(q, k, v, lengths, starts=jnp.zeros(2, "int32"))))(q)

    count = 0

    def listen(name: str, *_: Any, **__: Any) -> None:
        nonlocal count
        count += name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    for lengths in (40, 41):
        before = count
        lla_decode(q, k, v, lengths)
        gradient(q, lengths)
    assert before > 0  # the first calls did: the listener hears
    assert count == before


def test_in_a_scan() -> None:
    """Token by token, with the cache as the carry: what one call for all of them gives."""
    q, k, v, _ = draw(Shape(2, 4, 20, 2, 1, 8, 8), "float32")

    def step(cache: Any, t: Any) -> Any:
        k_cache, v_cache = (
            c.at[:, 16 + t].set(jax.lax.dynamic_index_in_dim(x, 16 + t, 1, keepdims=False))
            for c, x in zip(cache, (k, v), strict=True)
        )
        o = lla_decode(jax.lax.dynamic_slice_in_dim(q, t, 1, 1), k_cache, v_cache, 17 + t)
        return (k_cache, v_cache), o

    empty = tuple(x.at[:, 16:].set(jnp.nan) for x in (k, v))
    o = jax.jit(lambda: jax.lax.scan(step, empty, jnp.arange(4, dtype=jnp.int32))[1])()
    assert worst_row(jnp.moveaxis(o[:, :, 0], 0, 1), lla_decode(q, k, v, 20)) <= 1e-5


BATCH, HEADS = P("x"), P(None, None, "x")


def mesh(kind: AxisType) -> Mesh:
    return jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])


def with_gradients(q: Any, k: Any, v: Any, hidden: dict[str, Any]) -> Any:
    def run(*qkv: Any) -> Any:
        return lla_decode(*qkv, implementation="xla", local_window_size=40, **hidden)

    return run(q, k, v), jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x))), argnums=(0, 1, 2))(q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how", "spec"),
    [
        ("starts", "explicit", BATCH),
        ("mask", "explicit", HEADS),
        ("mask", "automatic", BATCH),
        ("mask", "shard_map", HEADS),
    ],
)
def test_on_two_devices(name: str, how: str, spec: P) -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    case = CASES[name]
    q, k, v, _ = draw(case.shape, "float32")
    hidden = case.hidden()
    expected = jax.jit(with_gradients)(q, k, v, hidden)
    if how == "shard_map":
        rows = P("x") if spec == BATCH else P()
        masks = P("x") if spec == BATCH else P(None, "x")
        places = {n: masks if n == "mask" else rows for n in hidden}

        def local(*qkv: Any, hidden: dict[str, Any]) -> Any:
            return lla_decode(*qkv, implementation="xla", local_window_size=40, **hidden)

        sharded = jax.shard_map(
            lambda q, k, v, hidden: local(q, k, v, hidden=hidden),
            mesh=mesh(AxisType.Auto),
            in_specs=(spec, spec, spec, places),
            out_specs=spec,
        )
        loss = jax.grad(lambda *x: jnp.sum(jnp.sin(sharded(*x, hidden))), argnums=(0, 1, 2))
        got = jax.jit(lambda *x: (sharded(*x, hidden), loss(*x)))(q, k, v)
    else:
        on = mesh(AxisType.Explicit if how == "explicit" else AxisType.Auto)
        placed = [jax.device_put(x, NamedSharding(on, spec)) for x in (q, k, v)]
        got = jax.jit(with_gradients)(*placed, hidden)
        if how == "explicit":
            assert jax.typeof(got[0]).sharding.spec == jax.typeof(placed[0]).sharding.spec
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=2e-5)  # float32 sums in another order


def test_an_empty_batch() -> None:
    q, k, v, _ = (x[:0] for x in draw(SHAPE, "float32"))
    assert lla_decode(q, k, v, 3).shape == (0, 2, 4, 12)


def test_a_bad_key_that_is_seen_shows() -> None:
    q, k, v, _ = draw(Shape(1, 2, 10, 1, 1, 4, 4), "float32")
    o = lla_decode(q, k.at[0, 9].set(jnp.nan), v, 10, implementation="xla")
    assert bool(jnp.isnan(o[0, 1]).all())
