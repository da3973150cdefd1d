"""Decoding: through the cache, in any portions, every position gets what the full causal forward gives it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flashlla_jax import LLAttention, lla_attention
from flashlla_jax.nn import decode as decode_module
from flashlla_jax.nn.decode import decode_step
from flashlla_jax.nn.linen import LLAttention as LinenLLAttention
from tests.cases import KINDS, Shape, draw, relative_error
from tests.test_nn_modules import (
    FEATURES,
    VARIANTS,
    call,
    inputs,
    linen_parameters,
    module,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH, CAPACITY = 24, 29
# A prompt of more tokens than the exact step takes, as many more of them, then one at a time.
PORTIONS = (0, 11, 22, 23, 24)
ONE_BY_ONE = tuple(range(LENGTH + 1))

# Norm-wise at every position; the bounds.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture
def flax_promotes() -> Iterator[None]:
    """Flax's LayerNorm of bfloat16 and its own decode step mix dtypes, which conftest.py forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@nnx.jit
def step(layer: LLAttention, x: jax.Array, **kwargs: Any) -> jax.Array:
    return layer(x, decode=True, **kwargs)


def decode(layer: LLAttention, x: jax.Array, cuts: tuple[int, ...], poison: bool = True, **kwargs: Any) -> jax.Array:
    """All positions, in these portions, from a cache that holds NaN wherever nothing is written."""
    layer.init_cache((x.shape[0], x.shape[1] + CAPACITY - LENGTH, x.shape[-1]), x.dtype)
    if poison:
        for cached in (layer.cached_key, layer.cached_value):
            cached[...] = jnp.full_like(cached[...], jnp.nan)
    return jnp.concatenate([step(layer, x[:, a:b], **kwargs) for a, b in itertools.pairwise(cuts)], axis=1)


def worst(got: jax.Array, expected: jax.Array) -> float:
    """The largest relative error of a position."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.max(np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)))


@pytest.mark.parametrize(
    ("variant", "dtype", "cuts"),
    [
        ("plain", "float32", ONE_BY_ONE),
        ("all", "float32", PORTIONS),
        ("all", "bfloat16", PORTIONS),
    ],
    ids=["plain float32 one by one", "all float32 portions", "all bfloat16 portions"],
)
def test_nnx_decode_is_the_full_forward(variant: str, dtype: str, cuts: tuple[int, ...], flax_promotes: None) -> None:
    layer = module(**VARIANTS[variant], dtype=dtype)
    x = inputs(2, LENGTH, FEATURES, dtype=dtype)
    assert worst(decode(layer, x, cuts), call(layer, x)) <= BOUNDS[dtype]
    assert int(layer.cache_index[...]) == LENGTH  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("ridge", [0.1, 0.01])
def test_a_small_ridge_shows_the_rounding_of_both_sides(ridge: float) -> None:
    """The full forward iterates and the step solves directly: each is off by half an ulp times A's condition."""
    layer, x = module(num_heads=2, in_features=64, ridge_lambda=ridge), inputs(2, 96, 64)
    # the largest eigenvalue of a covariance of these keys is 18.4, at an early position; measured 1.1e-5 and 9e-5
    bound = float(jnp.finfo(jnp.float32).eps) * (1 + 18.4 / ridge)
    assert worst(decode(layer, x, (0, 3, 11, 48, 56, 96)), call(layer, x)) <= bound


def test_linen_decode_is_the_full_forward() -> None:
    """The cache collection is Flax's, made by init from inputs as long as it is to be."""
    x = inputs(2, LENGTH, FEATURES)
    twin = LinenLLAttention(4, decode=True, **VARIANTS["all"])
    variables = jax.eval_shape(lambda: twin.init(jax.random.key(0), inputs(2, CAPACITY, FEATURES)))
    kv_heads, head_dim = variables["params"]["key"]["kernel"].shape[1:]
    cache = {
        name: jnp.full((2, CAPACITY, kv_heads, head_dim), jnp.nan, jnp.float32)
        for name in ("cached_key", "cached_value")
    }
    cache["cache_index"] = jnp.zeros((), jnp.int32)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, variables["cache"])
    state: Any = {"params": linen_parameters(module(**VARIANTS["all"])), "cache": cache}
    apply = jax.jit(partial(twin.apply, mutable=["cache"]))
    outputs = []
    for i in range(LENGTH):
        o, cache = apply(state, x[:, i : i + 1])
        state = state | cache
        outputs.append(o)
    full = call(module(**VARIANTS["all"]), x)
    assert worst(jnp.concatenate(outputs, axis=1), full) <= BOUNDS["float32"]


def test_the_cache_holds_what_flax_s_does(flax_promotes: None) -> None:
    """The same arrays as ``nnx.MultiHeadAttention`` with the same parameters puts there."""
    stock = nnx.MultiHeadAttention(4, FEATURES, num_kv_heads=2, decode=True, rngs=nnx.Rngs(0))
    ours = module(num_kv_heads=2, decode=True)
    x = inputs(2, 3, FEATURES)
    for layer in (stock, ours):
        layer.init_cache((2, 5, FEATURES))
        for i in range(3):
            step(layer, x[:, i : i + 1])
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-6), nnx.state(ours, nnx.Cache), nnx.state(stock, nnx.Cache)
    )


def test_any_number_of_batch_axes() -> None:
    layer, x = module(rope=100.0), inputs(2, 3, 12, FEATURES)
    layer.init_cache((2, 3, 12, FEATURES))
    got = jnp.concatenate([step(layer, x[..., a:b, :]) for a, b in ((0, 10), (10, 12))], axis=-2)
    assert worst(got, call(layer, x)) <= BOUNDS["float32"]


def test_padded_prompts() -> None:
    """A batch of prompts of two lengths, padded on the left: a mask and positions make each what it is alone."""
    layer, pad = module(rope=100.0), 4
    x = inputs(2, LENGTH, FEATURES)
    poisoned = x.at[1, :pad].set(jnp.nan)
    mask = jnp.ones((2, 1, 1, CAPACITY), bool).at[1, ..., :pad].set(False)
    positions = jnp.stack([jnp.arange(LENGTH), jnp.maximum(jnp.arange(LENGTH) - pad, 0)])
    layer.init_cache((2, CAPACITY, FEATURES))
    outputs = [
        step(layer, poisoned[:, a:b], mask=mask, input_positions=positions[:, a:b])
        for a, b in itertools.pairwise(PORTIONS)
    ]
    got = jnp.concatenate(outputs, axis=1)
    assert bool(jnp.isfinite(got[0]).all())
    assert worst(got[1:, pad:], call(layer, x[1:, pad:])) <= BOUNDS["float32"]


@pytest.mark.parametrize(("api", "masked"), [("nnx", False), ("linen", True)])
def test_a_window(api: str, masked: bool) -> None:
    """In every way through the cache: into an empty one, many tokens after others, and few; with a mask on top."""
    kwargs: dict[str, Any] = {"rope": 100.0, "local_window_size": (4, 1)}
    full, x, cuts = module(**kwargs), inputs(2, 22, FEATURES), (0, 10, 20, 22)
    mask = jnp.ones((2, 1, 1, CAPACITY - 2), bool).at[1, ..., 2::3].set(False) if masked else None
    if api == "nnx":
        got = decode(module(**kwargs), x, cuts, mask=mask)
    else:
        twin = LinenLLAttention(4, decode=True, **kwargs)
        shape = (2, CAPACITY - 2, 4, FEATURES // 4)
        cache: Any = {name: jnp.full(shape, jnp.nan, jnp.float32) for name in ("cached_key", "cached_value")}
        state: Any = {"params": linen_parameters(full), "cache": cache | {"cache_index": jnp.int32(0)}}
        apply, outputs = jax.jit(partial(twin.apply, mutable=["cache"])), []
        for a, b in itertools.pairwise(cuts):
            o, new = apply(state, x[:, a:b], mask=mask)
            state = state | new
            outputs.append(o)
        got = jnp.concatenate(outputs, axis=1)
    expected = call(full, x, mask=None if mask is None else mask[..., :22])
    assert worst(got, expected) <= BOUNDS["float32"]


@pytest.mark.parametrize("tokens", [1, 10])
def test_a_window_longer_than_any_cache(tokens: int) -> None:
    layer = module(local_window_size=2**40, decode=True)
    layer.init_cache((2, 12, FEATURES))
    graph, state = nnx.split(layer)
    x = inputs(2, tokens, FEATURES)
    with jax.enable_x64(False):  # where a Python int that is too large for int32 is an error, and no small number
        assert jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, x).shape == x.shape


class TestOverrun:
    def layer(self) -> LLAttention:
        layer = module()
        layer.init_cache((2, 12, FEATURES))
        step(layer, inputs(2, 10, FEATURES))
        return layer

    def test_is_an_error(self) -> None:
        layer, before = self.layer(), self.layer()
        with pytest.raises(ValueError, match="room for 12 positions; 10 are used and 3 more were given"):
            layer(inputs(2, 3, FEATURES), decode=True)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), nnx.state(before))  # nothing was written

    def test_is_nan_under_jit(self) -> None:
        layer = self.layer()
        assert bool(jnp.all(jnp.isnan(step(layer, inputs(2, 10, FEATURES)))))
        assert bool(jnp.all(jnp.isnan(step(layer, inputs(2, 1, FEATURES)))))  # and stays so

    def test_filling_the_cache_is_not(self) -> None:
        layer = self.layer()
        for overrun in (False, False, True):
            assert bool(jnp.all(jnp.isnan(step(layer, inputs(2, 1, FEATURES))))) == overrun

    def test_more_tokens_than_the_cache_under_jit(self) -> None:
        with pytest.raises(ValueError, match="room for 12 positions"):
            step(self.layer(), inputs(2, 13, FEATURES))


def test_refusals() -> None:
    layer, x = module(), inputs(2, 1, FEATURES)
    with pytest.raises(ValueError, match="call init_cache first"):
        layer(x, decode=True)
    layer.init_cache((2, 5, FEATURES))
    with pytest.raises(ValueError, match=r"decode=True needs one token at least, got a query of shape \(2, 0, 4, 4\)"):
        layer(x[:, :0], decode=True)
    with pytest.raises(ValueError, match="decode=True needs is_causal=True"):
        layer(x, decode=True, is_causal=False)
    with pytest.raises(ValueError, match=r"must have keys and values of shape \(2, 1, 4, 4\)"):
        layer(inputs(3, 1, FEATURES), decode=True)
    with pytest.raises(ValueError, match=r"must have keys and values of shape \(2, 1, 4, 4\)"):
        layer(x, inputs(2, 2, FEATURES), decode=True)
    with pytest.raises(ValueError, match=r"mask must broadcast to .* = \(2, 4, 1, 5\), got shape \(1, 7\)"):
        layer(x, decode=True, mask=np.ones((1, 7), bool))


@cache
def jit_step(block_size: int) -> Any:
    """One trace for every size of block, which is not an argument."""
    return jax.jit(partial(decode_step, qk_scale=0.4))


jit_reference = jax.jit(partial(lla_attention, qk_scale=0.4, implementation="reference"))


class TestStep:
    """The exact step against the dense reference in float64: every kind of keys, over many blocks of the cache."""

    @pytest.fixture
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode_module, "_BLOCK_SIZE", 1)  # of D = 8 keys, the least

    def compare(self, dtype: str, kind: str, ridge: float, mask: Any = None, filled: int = 60) -> float:
        """Three tokens over ``filled`` positions of a cache of 70; the error of the worst row."""
        shape = Shape(2, 3, 70, 4, 2, 8, 6)
        q, k, v, _ = draw(shape, dtype, kind)
        poison = jnp.asarray(jnp.nan, k.dtype)
        k, v = (x.at[:, filled:].set(poison) for x in (k, v))
        got = jit_step(decode_module._BLOCK_SIZE)(q, k, v, jnp.full((4,), ridge), jnp.int32(filled - 3), mask=mask)
        wide = (x.astype(jnp.float64) for x in (q, k[:, :filled], v[:, :filled]))
        mask = None if mask is None else mask[..., :filled]
        expected = jit_reference(*wide, ridge_lambda=ridge, mask=mask)
        return worst(got, expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_float64(self, kind: str, small_blocks: None) -> None:
        # the reference's own error in the paper's form: on peaky and shifted keys it loses seven of sixteen digits
        assert self.compare("float64", kind, 0.1) <= 1e-8

    @pytest.mark.parametrize("kind", ["iid", "peaky", "shifted"])
    def test_float32(self, kind: str) -> None:
        assert self.compare("float32", kind, 1.0) <= 1e-5

    def test_blocks_make_no_difference(self, small_blocks: None) -> None:
        assert self.compare("float32", "iid", 1.0) <= 1e-5

    def test_mask(self, small_blocks: None) -> None:
        """Per head and token; the first keys hidden from some, so that whole blocks are."""
        mask = jnp.asarray(np.random.default_rng(0).random((2, 4, 3, 70)) < 0.4).at[:, 1, :, :30].set(False)
        assert self.compare("float64", "iid", 0.1, mask) <= 1e-10

    def test_a_token_without_keys_is_zero(self) -> None:
        q, k, v, _ = draw(Shape(1, 1, 5, 1, 1, 4, 4), "float32")
        o = jit_step(0)(q, k, v, jnp.ones(1), jnp.int32(4), mask=jnp.zeros((1, 1, 1, 5), bool))
        np.testing.assert_array_equal(o, 0)

    def test_a_bad_ridge_is_nan(self) -> None:
        q, k, v, _ = draw(Shape(1, 1, 5, 4, 1, 4, 4), "float32")
        o = jit_step(0)(q, k, v, jnp.asarray([0.0, -1.0, jnp.nan, 1.0]), jnp.int32(4))
        assert bool(jnp.isnan(o[:, :, :3]).all())
        assert bool(jnp.isfinite(o[:, :, 3]).all())


@pytest.mark.parametrize("tokens", [1, 10])
def test_an_empty_batch(tokens: int) -> None:
    layer, x = module(), inputs(2, tokens, FEATURES)[:0]
    layer.init_cache((0, 12, FEATURES))
    assert step(layer, x).shape == x.shape
    assert step(layer, x[:, :1], mask=np.ones((0, 1, 1, 12), bool)).shape == (0, 1, FEATURES)


class TestGradient:
    """In float64, through a cache that holds NaN wherever nothing is written, against the full causal forward's."""

    # The full forward's solves stop at |r| = 1e-12 |r0|, which the condition of A, about 100 at most here, multiplies.
    BOUND = 1e-10

    @pytest.mark.parametrize(
        ("scan", "cuts"),
        [(True, (0, 1, 2, 3, 4)), (False, (0, 10, 11, 12)), (False, (0, 3, 13))],
        ids=["one by one in a scan", "ten, one, one", "three, ten"],
    )
    def test_of_a_module(self, scan: bool, cuts: tuple[int, ...], flax_promotes: None) -> None:
        """Of tokens and parameters, from the cache of earlier tokens too."""
        layer = module(rope=100.0, learn_ridge=True, num_kv_heads=2, param_dtype=jnp.float64)
        layer.init_cache((2, CAPACITY, FEATURES), jnp.float64)
        for cached in (layer.cached_key, layer.cached_value):
            cached[...] = jnp.full_like(cached[...], jnp.nan)
        graph, parameters, cache = nnx.split(layer, nnx.Param, nnx.Cache)
        x = inputs(2, cuts[-1], FEATURES, dtype=jnp.float64)

        def append(parameters: Any, cache: Any, x: jax.Array) -> Any:
            layer = nnx.merge(graph, parameters, cache, copy=True)  # whose variables belong to this trace
            o = layer(x, decode=True)
            return nnx.state(layer, nnx.Cache), o

        def decoded(parameters: Any, x: jax.Array, cache: Any) -> jax.Array:
            if scan:
                tokens = jnp.moveaxis(x, 1, 0)[:, :, None]
                o = jax.lax.scan(partial(append, parameters), cache, tokens)[1]
                return jnp.sum(jnp.sin(o))
            outputs = []
            for a, b in itertools.pairwise(cuts):
                cache, o = append(parameters, cache, x[:, a:b])
                outputs.append(o)
            return jnp.sum(jnp.sin(jnp.concatenate(outputs, axis=1)))

        def full(parameters: Any, x: jax.Array, cache: Any) -> jax.Array:
            return jnp.sum(jnp.sin(nnx.merge(graph, parameters, cache)(x, decode=False)))

        got, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(parameters, x, cache) for f in (decoded, full))
        errors = jax.tree.map(partial(relative_error, floor=1e-3), got, expected)
        assert max(jax.tree.leaves(errors)) <= self.BOUND

    @pytest.mark.parametrize("masked", [False, True])
    def test_of_the_step(self, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of every argument, over many blocks; by a mask, one token sees nothing and one key is seen by none."""
        monkeypatch.setattr(decode_module, "_BLOCK_SIZE", 1)  # of D = 8 keys, the least
        filled, capacity = 20, 29
        q, k, v, g = draw(Shape(2, 3, capacity, 4, 2, 8, 6), "float64")
        mask = None
        if masked:
            mask = jnp.asarray(np.random.default_rng(0).random((2, 4, 3, capacity)) < 0.6)
            mask = mask.at[1, :, 2].set(False).at[0, ..., 7].set(False)
        ridge = jnp.asarray([0.1, 0.3, 1.0, 3.0])
        unseen = jnp.zeros((2, capacity, 1, 1), bool).at[:, filled:].set(True).at[0, 7].set(masked)
        k, v = (jnp.where(unseen, jnp.nan, a) for a in (k, v))

        def step(q: Any, k: Any, v: Any, ridge: Any) -> Any:
            return jnp.vdot(g, decode_step(q, k, v, ridge, jnp.int32(filled - 3), qk_scale=0.4, mask=mask))

        def dense(q: Any, k: Any, v: Any, ridge: Any) -> Any:
            k, v = (jnp.where(unseen, 0, a)[:, :filled] for a in (k, v))
            seen = None if mask is None else mask[..., :filled]
            o = lla_attention(q, k, v, ridge_lambda=ridge, qk_scale=0.4, mask=seen, implementation="reference")
            return jnp.vdot(g, o)

        got, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(q, k, v, ridge) for f in (step, dense))
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) <= self.BOUND
        for a in got[1:3]:
            np.testing.assert_array_equal(jnp.where(unseen, a, 0), 0)

    def test_of_a_cache_per_example(self) -> None:
        """Under vmap over the position, where the block loop's end is not one number."""
        q, k, v, _ = draw(Shape(2, 1, 9, 1, 1, 4, 4), "float64")
        index = jnp.asarray([3, 8], jnp.int32)
        k, v = (a.at[0, 4:].set(jnp.nan) for a in (k, v))

        def step(q: Any, k: Any, v: Any, index: Any) -> Any:
            o = decode_step(q[None], k[None], v[None], jnp.ones(1), index, qk_scale=0.4)
            return jnp.sum(jnp.sin(o))

        gradient = jax.grad(step, argnums=(0, 1, 2))
        got = jax.jit(jax.vmap(gradient))(q, k, v, index)
        for i in range(2):
            alone = jax.jit(gradient)(q[i], k[i], v[i], index[i])
            assert all(relative_error(a[i], b) <= self.BOUND for a, b in zip(got, alone, strict=True))


def test_other_widths_of_the_cache() -> None:
    """A float32 cache under a bfloat16 module, Flax's default, and a bfloat16 cache under a float32 one."""
    x = inputs(2, 4, FEATURES)
    for dtype, cache_dtype in (("bfloat16", "float32"), ("float32", "bfloat16")):
        layer = module(dtype=dtype)
        layer.init_cache(x.shape, cache_dtype)
        got = jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(4)], axis=1)
        assert got.dtype == dtype
        assert worst(got, call(layer, x)) <= BOUNDS["bfloat16"]


def test_relative_error_measures_positions() -> None:
    """The measure above is stricter than the norm-wise one: an error at one short row shows."""
    full = jnp.ones((1, 100, 4)).at[0, 3].set(1e-3)
    assert relative_error(full.at[0, 3].mul(1.1), full) < 1e-4 < worst(full.at[0, 3].mul(1.1), full)
