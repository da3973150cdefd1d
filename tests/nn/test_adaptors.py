"""``attention_fn``: Local Linear Attention inside both of Flax's own attention modules."""

from __future__ import annotations

import inspect
import pickle
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from flashlla_jax.nn import LLAttention, attention_fn
from flashlla_jax.nn.linen import LLAttention as LinenLLAttention
from tests.cases import relative_error
from tests.nn.test_modules import (
    FEATURES,
    SAME,
    call,
    inputs,
    linen_parameters,
    module,
)

RIDGE = 0.5


@pytest.fixture(autouse=True)
def flax_promotes() -> Iterator[None]:
    """Flax's decode step compares indices of two dtypes, which conftest.py forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def stock(api: str, **kwargs: Any) -> Any:
    """``x, ... -> output`` of Flax's own module with the adaptor in it, and the parameters of ``module()``."""
    ours = module()
    function = attention_fn(ridge_lambda=RIDGE, **kwargs)
    if api == "nnx":
        layer = nnx.MultiHeadAttention(4, FEATURES, attention_fn=function, decode=False, rngs=nnx.Rngs(0))
        nnx.update(layer, nnx.state(ours))
        return layer
    twin = nn.MultiHeadDotProductAttention(4, attention_fn=function)
    return lambda *args, **options: twin.apply({"params": linen_parameters(ours)}, *args, **options)


@jax.jit
def our_gradient(x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(jnp.square(module(ridge_lambda=RIDGE)(x))))(x)


@pytest.mark.parametrize("api", ["nnx", "linen"])
class TestInside:
    @pytest.mark.slow
    def test_is_llattention(self, api: str) -> None:
        x = inputs()
        expected = call(module(ridge_lambda=RIDGE), x)
        assert relative_error(jax.jit(stock(api, is_causal=True))(x), expected) <= SAME

    def test_a_causal_mask_is_causal(self, api: str) -> None:
        """As Flax makes it, in float32."""
        x = inputs()
        mask = nn.make_causal_mask(jnp.ones((2, 9)))
        expected = call(module(ridge_lambda=RIDGE), x)
        assert relative_error(jax.jit(stock(api))(x, mask=mask), expected) <= SAME
        if api == "nnx":
            assert relative_error(jax.jit(stock(api))(x), expected) > 0.01

    @pytest.mark.slow
    def test_batch_axes_and_gradients(self, api: str) -> None:
        x = inputs(2, 3, 5, FEATURES)
        apply = stock(api, is_causal=True)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(apply(x)))))(x)
        assert relative_error(gradient, our_gradient(x)) <= SAME

    @pytest.mark.slow
    def test_window_and_bound_arrays(self, api: str) -> None:
        """As ``LLAttention`` has them, with two batch axes; known arrays in NNX, and traced ones in Linen, where a
        function made in the trace is how segments that differ from call to call get there."""
        x = inputs(2, 3, 5, FEATURES)
        rng = np.random.default_rng(0)
        bound = {
            "segment_ids": rng.integers(2, size=(2, 3, 5)),
            "query_seq_lengths": rng.integers(2, 6, size=(2, 3)),
            "key_value_seq_lengths": jnp.asarray(rng.integers(2, 6, size=(2, 3))),
        }
        apply = lambda x, bound: stock(api, is_causal=True, local_window_size=(2, 0), **bound)(x)  # noqa: E731
        got = jax.jit(apply)(x, bound) if api == "linen" else jax.jit(lambda x: apply(x, bound))(x)
        expected = call(module(ridge_lambda=RIDGE, local_window_size=(2, 0)), x, **bound)
        assert relative_error(got, expected) <= SAME

    def test_sowing_weights_is_refused(self, api: str) -> None:
        with pytest.raises(NotImplementedError, match="sow_weights must be False"):
            stock(api)(inputs(), sow_weights=True)

    def test_dropout_is_refused_unless_deterministic(self, api: str) -> None:
        function, x = attention_fn(), inputs(2, 3, FEATURES)
        if api == "nnx":
            layer: Any = nnx.MultiHeadAttention(
                4, FEATURES, dropout_rate=0.5, attention_fn=function, decode=False, rngs=nnx.Rngs(0)
            )
        else:
            twin = nn.MultiHeadDotProductAttention(4, dropout_rate=0.5, attention_fn=function)
            parameters = jax.eval_shape(lambda: twin.init(jax.random.key(0), x, deterministic=True))
            parameters = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), parameters)
            layer = lambda x, **kwargs: twin.apply(parameters, x, rngs={"dropout": jax.random.key(0)}, **kwargs)  # noqa: E731
        assert jax.eval_shape(lambda x: layer(x, deterministic=True), x).shape == x.shape
        with pytest.raises(NotImplementedError, match=r"dropout_rate must be 0, got 0.5"):
            layer(x, deterministic=False)


def test_is_causal_of_the_nnx_call() -> None:
    x = inputs()
    layer = stock("nnx")
    got = nnx.jit(lambda layer, x: layer(x, is_causal=True))(layer, x)
    assert relative_error(got, call(module(ridge_lambda=RIDGE), x)) <= SAME


@pytest.mark.slow
def test_grouped_heads_and_dtypes() -> None:
    x, kwargs = inputs(), {"num_kv_heads": 2, "dtype": jnp.bfloat16}
    function = attention_fn(ridge_lambda=RIDGE, is_causal=True)
    layer = nnx.MultiHeadAttention(4, FEATURES, attention_fn=function, decode=False, rngs=nnx.Rngs(0), **kwargs)
    got, expected = call(layer, x), call(module(ridge_lambda=RIDGE, **kwargs), x)
    assert got.dtype == expected.dtype
    assert relative_error(got, expected) <= SAME


def test_nnx_decodes() -> None:
    """Flax's own decode step, a token at a time, with its mask over the cache."""
    layer, x = stock("nnx"), inputs(2, 9, FEATURES)[:, :5]
    layer.init_cache((2, 7, FEATURES))
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    got = jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(5)], axis=1)
    assert relative_error(got, call(module(ridge_lambda=RIDGE), x)) <= SAME


@pytest.mark.slow
def test_linen_decodes() -> None:
    x = inputs(2, 5, FEATURES)
    twin = nn.MultiHeadDotProductAttention(4, decode=True, attention_fn=attention_fn(ridge_lambda=RIDGE))
    cache = {name: jnp.zeros((2, 7, 4, FEATURES // 4), jnp.float32) for name in ("cached_key", "cached_value")}
    state: Any = {"params": linen_parameters(module()), "cache": cache | {"cache_index": jnp.int32(0)}}
    apply = jax.jit(lambda state, x: twin.apply(state, x, mutable=["cache"]))
    outputs = []
    for i in range(5):
        o, new = apply(state, x[:, i : i + 1])
        state = state | new
        outputs.append(o)
    assert relative_error(jnp.concatenate(outputs, axis=1), call(module(ridge_lambda=RIDGE), x)) <= SAME


@pytest.mark.parametrize("bound", [{"local_window_size": 2}, {"query_seq_lengths": jnp.ones(2, int)}], ids=list)
def test_what_needs_a_position_is_refused_where_flax_decodes(bound: Any) -> None:
    """A token does not say where in the cache it is: at its end, by the alignment, it would see the wrong keys."""
    x, message = inputs(2, 1, FEATURES), f"{next(iter(bound))} cannot be served with decode=True.*LLAttention"
    layer = stock("nnx", **bound)
    layer.init_cache((2, 7, FEATURES))
    with pytest.raises(NotImplementedError, match=message):
        layer(x, decode=True)
    twin = nn.MultiHeadDotProductAttention(4, decode=True, attention_fn=attention_fn(**bound))
    variables = jax.eval_shape(lambda: twin.init(jax.random.key(0), inputs(2, 7, FEATURES)))
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda variables: twin.apply(variables, x, mutable=["cache"]), variables)


def test_bound_arrays_under_strict_promotion() -> None:
    q = inputs(2, 9, 4, 4, dtype=jnp.bfloat16)
    function = attention_fn(
        ridge_lambda=jnp.ones(4, jnp.bfloat16),
        segment_ids=np.zeros((2, 9), np.uint8),
        query_seq_lengths=np.full(2, 9, np.int16),
        key_value_seq_lengths=jnp.full(2, 9, jnp.int32),
    )
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(function, q, q, q).dtype == jnp.bfloat16


def test_refusals() -> None:
    q = jnp.ones((2, 5, 4, 8), jnp.float32)
    function: Any = attention_fn()
    with pytest.raises(NotImplementedError, match="takes no bias"):
        function(q, q, q, bias=jnp.zeros((1, 1, 5, 5)))
    for name in ("qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(NotImplementedError, match=name):
            function(q, q, q, **{name: jnp.einsum})
    with pytest.raises(NotImplementedError, match="input_positions must be None"):
        function(q, q, q, input_positions=jnp.arange(5))
    with pytest.raises(ValueError, match="the same batch axes"):
        function(q, q[:1], q[:1])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"ridge_lambda": -1.0}, ValueError, "ridge_lambda must be > 0, got -1.0"),
        ({"ridge_lambda": [1.0]}, TypeError, "ridge_lambda must be a Python number, got list"),
        ({"implementation": "cuda"}, ValueError, r"implementation must be one of .* or None, got 'cuda'"),
        ({"cg_max_iters": 0}, ValueError, "cg_max_iters must be >= 1, got 0"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
        ({"local_window_size": (1, -1)}, ValueError, r"local_window_size must be >= 0, got \(1, -1\)"),
        ({"local_window_size": 1.5}, TypeError, r"local_window_size must be an int or a pair .*, got 1.5"),
        ({"segment_ids": 3}, TypeError, "segment_ids must be an integer array or a pair of them, got int"),
        ({"segment_ids": [0, 0, 1]}, ValueError, r"segment_ids must be one array or a pair .*, got 3 of them"),
        ({"query_seq_lengths": [3]}, TypeError, "query_seq_lengths must be an integer array, got list"),
        ({"key_value_seq_lengths": np.ones(2)}, TypeError, "key_value_seq_lengths must be integers, got dtype float64"),
        ({"ridge": 1.0}, TypeError, "attention_fn has no argument ridge"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_at_once(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        attention_fn(**kwargs)


def test_forgotten_parentheses() -> None:
    forgotten: Any = attention_fn
    layer = nnx.MultiHeadAttention(4, FEATURES, attention_fn=forgotten, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"attention_fn=attention_fn\(\), with parentheses"):
        layer(inputs())
    with pytest.raises(TypeError, match=r"attention_fn=attention_fn\(\), with parentheses"):
        nn.MultiHeadDotProductAttention(4, attention_fn=forgotten).init(jax.random.key(0), inputs())


class TestIsAValue:
    """Two models that are made alike are the same to whatever compares them."""

    def layer(self, seed: int) -> nnx.MultiHeadAttention:
        function = attention_fn(ridge_lambda=RIDGE)
        return nnx.MultiHeadAttention(4, FEATURES, attention_fn=function, decode=False, rngs=nnx.Rngs(seed))

    def test_of_its_settings(self) -> None:
        assert attention_fn(ridge_lambda=RIDGE) == attention_fn(ridge_lambda=np.float64(RIDGE))
        assert hash(attention_fn(ridge_lambda=RIDGE)) == hash(attention_fn(ridge_lambda=RIDGE))
        assert attention_fn(ridge_lambda=RIDGE) != attention_fn(ridge_lambda=RIDGE, is_causal=True)
        assert attention_fn() != nnx.dot_product_attention
        assert pickle.loads(pickle.dumps(attention_fn(cg_max_iters=5))) == attention_fn(cg_max_iters=5)

    def test_arrays_are_the_same_as_one_object(self) -> None:
        ridge = jnp.ones(4)
        assert attention_fn(ridge_lambda=ridge) == attention_fn(ridge_lambda=ridge)
        assert hash(attention_fn(ridge_lambda=ridge)) == hash(attention_fn(ridge_lambda=ridge))
        assert attention_fn(ridge_lambda=ridge) != attention_fn(ridge_lambda=jnp.ones(4))
        ids, lengths = jnp.zeros((2, 9), int), np.full(2, 9)
        pair = attention_fn(segment_ids=(ids, ids), key_value_seq_lengths=lengths)
        assert pair == attention_fn(segment_ids=[ids, ids], key_value_seq_lengths=lengths)
        assert hash(pair) == hash(attention_fn(segment_ids=[ids, ids], key_value_seq_lengths=lengths))
        assert pair != attention_fn(segment_ids=(ids, ids + 0), key_value_seq_lengths=lengths)
        assert pair != attention_fn(segment_ids=(ids, ids), key_value_seq_lengths=lengths.copy())

        @jax.jit
        def traced(ridge: jax.Array) -> jax.Array:
            function = attention_fn(ridge_lambda=ridge)
            assert function == attention_fn(ridge_lambda=ridge) != attention_fn()
            assert hash(function) == hash(attention_fn(ridge_lambda=ridge))
            q = jnp.ones((1, 3, 4, 4))
            return function(q, q, q)

        assert traced(ridge).shape == (1, 3, 4, 4)

    def test_of_models(self) -> None:
        a, b = self.layer(0), self.layer(1)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
        kernels = (layer.query.kernel[...] for layer in (a, b))
        np.testing.assert_allclose(mean.query.kernel[...], sum(kernels) / 2, rtol=1e-6)
        picked = jax.lax.cond(True, lambda: a, lambda: b)
        np.testing.assert_array_equal(picked.query.kernel[...], a.query.kernel[...])
        pickle.dumps(nnx.split(a)[0])

    def test_is_traced_once(self) -> None:
        traces = 0

        @nnx.jit
        def apply(layer: nnx.MultiHeadAttention, x: jax.Array) -> jax.Array:
            nonlocal traces
            traces += 1
            return layer(x)

        for seed in range(2):
            apply(self.layer(seed), inputs())
        assert traces == 1


def test_no_parameter_forbids_all_values() -> None:
    """Runtime type checkers resolve the hints of each call, and ``Never`` lets nothing through."""
    functions = (attention_fn, LLAttention.__init__, LLAttention.__call__, LinenLLAttention.__call__)
    assert all(typing.Never not in typing.get_type_hints(function).values() for function in functions)


def test_the_signature_names_all_that_flax_passes() -> None:
    """Linen drops what a signature does not name; nothing may be dropped unseen."""
    ours = set(inspect.signature(attention_fn()).parameters)
    source = inspect.getsource(nn.MultiHeadDotProductAttention.__call__)
    passed = {name for name in inspect.signature(nn.dot_product_attention).parameters if f"{name}=" in source}
    assert {"mask", "dropout_rate", "dtype", "qk_attn_weights_einsum"} <= passed <= ours
    assert set(inspect.signature(nnx.dot_product_attention).parameters) <= ours


@pytest.mark.slow
def test_masks_of_any_number_type() -> None:
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 4)))
    mask = np.tril(np.ones((4, 4)))
    got = [jax.jit(attention_fn())(q, q, q, mask=mask.astype(t)) for t in ("bool", "float32")]
    np.testing.assert_array_equal(*got)
