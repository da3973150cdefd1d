"""Decoding: through the cache, in any portions, every position gets what the full causal forward gives it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flashlla_jax import LLAttention
from flashlla_jax.nn.linen import LLAttention as LinenLLAttention
from tests.cases import relative_error
from tests.nn.test_modules import (
    FEATURES,
    VARIANTS,
    call,
    inputs,
    linen_parameters,
    module,
)

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
        pytest.param("plain", "float32", ONE_BY_ONE, marks=pytest.mark.slow),
        pytest.param("all", "float32", PORTIONS, marks=pytest.mark.slow),
        ("all", "bfloat16", PORTIONS),
    ],
    ids=["plain float32 one by one", "all float32 portions", "all bfloat16 portions"],
)
def test_nnx_decode_is_the_full_forward(variant: str, dtype: str, cuts: tuple[int, ...], flax_promotes: None) -> None:
    layer = module(**VARIANTS[variant], dtype=dtype)
    x = inputs(2, LENGTH, FEATURES, dtype=dtype)
    assert worst(decode(layer, x, cuts), call(layer, x)) <= BOUNDS[dtype]
    assert int(layer.cache_index[...]) == LENGTH  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.slow
@pytest.mark.parametrize("ridge", [0.1, 0.01])
def test_a_small_ridge_shows_the_rounding_of_both_sides(ridge: float) -> None:
    """The full forward iterates and the step solves directly: each is off by half an ulp times A's condition."""
    layer, x = module(num_heads=2, in_features=64, ridge_lambda=ridge), inputs(2, 96, 64)
    # the largest eigenvalue of a covariance of these keys is 18.4, at an early position; measured 1.1e-5 and 9e-5
    bound = float(jnp.finfo(jnp.float32).eps) * (1 + 18.4 / ridge)
    assert worst(decode(layer, x, (0, 3, 11, 48, 56, 96)), call(layer, x)) <= bound


@pytest.mark.slow
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


@pytest.mark.slow
def test_any_number_of_batch_axes() -> None:
    layer, x = module(rope=100.0), inputs(2, 3, 12, FEATURES)
    layer.init_cache((2, 3, 12, FEATURES))
    got = jnp.concatenate([step(layer, x[..., a:b, :]) for a, b in ((0, 10), (10, 12))], axis=-2)
    assert worst(got, call(layer, x)) <= BOUNDS["float32"]


# Two prompts of a batch, and the tokens after each.
PROMPTS, AFTER = (13, 9), 4


def alone(layer: LLAttention, x: jax.Array) -> list[jax.Array]:
    """What each row gives at the last position of its prompt and at those after it, from the full forward."""
    return [call(layer, x[b : b + 1, : prompt + AFTER])[0, prompt - 1 :] for b, prompt in enumerate(PROMPTS)]


def padded(x: jax.Array, left: bool) -> tuple[jax.Array, jax.Array]:
    """The prompts in one array, NaN where padded, and the tokens after them, ``(2, AFTER, features)``."""
    longest, rows = max(PROMPTS), []
    for b, prompt in enumerate(PROMPTS):
        pad = (longest - prompt, 0) if left else (0, longest - prompt)
        rows.append(jnp.pad(x[b, :prompt], (pad, (0, 0)), constant_values=jnp.nan))
    return jnp.stack(rows), jnp.stack([x[b, n : n + AFTER] for b, n in enumerate(PROMPTS)])


def check_rows(outputs: list[jax.Array], expected: list[jax.Array]) -> None:
    """``outputs``: the prompts' last positions, then the tokens' one by one, ``(2, 1, features)`` each."""
    got = jnp.concatenate(outputs, axis=1)
    assert max(worst(got[b], expected[b]) for b in range(2)) <= BOUNDS["float32"]


@pytest.mark.slow
class TestPromptsOfTwoLengths:
    """In one batch, each row gives what it gives alone."""

    def test_padded_on_the_left(self) -> None:
        layer, x = module(**VARIANTS["all"]), inputs(2, LENGTH, FEATURES)
        expected = alone(layer, x)
        prompts, after = padded(x, left=True)
        starts = jnp.asarray([max(PROMPTS) - n for n in PROMPTS], jnp.int32)
        layer.init_cache((2, CAPACITY, FEATURES))
        outputs = [step(layer, prompts, decode_starts=starts)[:, -1:]]
        outputs += [step(layer, after[:, i : i + 1], decode_starts=starts) for i in range(AFTER)]
        check_rows(outputs, expected)
        assert layer.cache_index is not None
        assert layer.cache_index.shape == ()

    def test_padded_on_the_right(self) -> None:
        layer, x = module(**VARIANTS["all"]), inputs(2, LENGTH, FEATURES)
        expected = alone(layer, x)
        prompts, after = padded(x, left=False)
        layer.init_cache((2, max(PROMPTS) + AFTER, FEATURES))
        lengths = jnp.asarray(PROMPTS, jnp.int32)
        o = step(layer, prompts, decode_lengths=lengths)
        assert layer.cached_key is not None
        assert bool(jnp.isfinite(layer.cached_key[...]).all())  # the padding, NaN, was not written
        outputs = [jnp.stack([o[b, n - 1 : n] for b, n in enumerate(PROMPTS)])]
        outputs += [step(layer, after[:, i : i + 1]) for i in range(AFTER)]
        check_rows(outputs, expected)
        assert layer.cache_index is not None
        np.testing.assert_array_equal(layer.cache_index[...], lengths + AFTER)

    def test_more_tokens_of_some_rows_only(self) -> None:
        """Speculative decoding: 3 tokens of one row and none of the other, then one of each."""
        layer, x = module(**VARIANTS["plain"]), inputs(2, LENGTH, FEATURES)
        expected = [call(layer, x[b : b + 1]) for b in range(2)]
        layer.init_cache((2, CAPACITY, FEATURES))
        step(layer, x[:, :10])
        step(layer, x[:, 10:13], decode_lengths=jnp.asarray([3, 0]))
        o = step(layer, jnp.stack([x[0, 13:14], x[1, 10:11]]))
        assert worst(o[0], expected[0][0, 13:14]) <= BOUNDS["float32"]
        assert worst(o[1], expected[1][0, 10:11]) <= BOUNDS["float32"]

    @pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
    def test_linen(self, left: bool) -> None:
        x = inputs(2, LENGTH, FEATURES)
        layer = module(**VARIANTS["all"])
        twin, state = linen_twin(CAPACITY)
        apply = jax.jit(partial(twin.apply, mutable=["cache"]))
        prompts, after = padded(x, left)
        starts = {"decode_starts": jnp.asarray([max(PROMPTS) - n for n in PROMPTS])} if left else {}
        o, new = apply(state, prompts, **starts or {"decode_lengths": jnp.asarray(PROMPTS)})
        outputs = [o[:, -1:] if left else jnp.stack([o[b, n - 1 : n] for b, n in enumerate(PROMPTS)])]
        for i in range(AFTER):
            o, new = apply(state | new, after[:, i : i + 1], **starts)
            outputs.append(o)
        check_rows(outputs, alone(layer, x))


def linen_twin(capacity: int, **changed: Any) -> tuple[LinenLLAttention, dict[str, Any]]:
    """The Linen module of ``module(**VARIANTS["all"])`` with an unwritten cache of two rows."""
    twin = LinenLLAttention(4, decode=True, **VARIANTS["all"], **changed)
    variables = jax.eval_shape(lambda: twin.init(jax.random.key(0), inputs(2, capacity, FEATURES)))
    cache = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan if x.ndim else 0, x.dtype), variables["cache"])
    return twin, {"params": linen_parameters(module(**VARIANTS["all"])), "cache": cache}


@pytest.mark.slow
def test_rows_can_be_reordered_and_tokens_taken_back() -> None:
    """Beam search and speculative decoding: the cache is arrays, to be indexed, and the index a number, to be set."""
    layer, x = module(**VARIANTS["all"]), inputs(2, LENGTH, FEATURES)
    expected = call(layer, x)
    layer.init_cache((2, CAPACITY, FEATURES))
    step(layer, x[:, :12])
    step(layer, 3 * x[:, 12:17])  # a draft that is rejected
    assert layer.cached_key is not None
    assert layer.cached_value is not None
    assert layer.cache_index is not None
    layer.cache_index[...] = layer.cache_index[...] - 5
    assert worst(step(layer, x[:, 12:14]), expected[:, 12:14]) <= BOUNDS["float32"]
    for cached in (layer.cached_key, layer.cached_value):
        cached[...] = cached[...][jnp.asarray([1, 0])]
    assert worst(step(layer, x[::-1, 14:15]), expected[::-1, 14:15]) <= BOUNDS["float32"]


@pytest.mark.slow
def test_linen_rows_can_be_reordered_and_tokens_taken_back() -> None:
    layer, x = module(**VARIANTS["all"]), inputs(2, LENGTH, FEATURES)
    expected = call(layer, x)
    twin, state = linen_twin(CAPACITY)
    apply = jax.jit(partial(twin.apply, mutable=["cache"]))
    _, new = apply(state, x[:, :12])
    _, new = apply(state | new, 3 * x[:, 12:17])
    cache = jax.tree.map(lambda c: c[::-1] if c.ndim else c - 5, new["cache"])
    o, _ = apply(state | {"cache": cache}, x[::-1, 12:14])
    assert worst(o, expected[::-1, 12:14]) <= BOUNDS["float32"]


class TestNegativeIndex:
    """Taken back too far."""

    def layer(self) -> LLAttention:
        layer = module()
        layer.init_cache((2, 12, FEATURES))
        assert layer.cache_index is not None
        layer.cache_index[...] = jnp.asarray(-2, jnp.int32)
        return layer

    def test_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="cache_index must be >= 0, got -2"):
            self.layer()(inputs(2, 3, FEATURES), decode=True)

    def test_is_nan_under_jit(self) -> None:
        layer = self.layer()
        assert bool(jnp.isnan(step(layer, inputs(2, 4, FEATURES))).all())
        assert bool(jnp.isnan(step(layer, inputs(2, 1, FEATURES))).all())  # and stays so


@pytest.mark.slow
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


@pytest.mark.parametrize("tokens", [1, 10])
def test_an_empty_batch(tokens: int) -> None:
    layer, x = module(), inputs(2, tokens, FEATURES)[:0]
    layer.init_cache((0, 12, FEATURES))
    assert step(layer, x).shape == x.shape
    assert step(layer, x[:, :1], mask=np.ones((0, 1, 1, 12), bool)).shape == (0, 1, FEATURES)


@pytest.mark.slow
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
