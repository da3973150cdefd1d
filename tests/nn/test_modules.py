"""``LLAttention`` in NNX and Linen: Flax's modules with another attention in them."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from flashlla_jax import LLAttention, ParallaxAttention, lla_attention
from flashlla_jax.nn.linen import LLAttention as LinenLLAttention
from flashlla_jax.nn.nnx_options import FlaxOptions
from flashlla_jax.nn.rope import rotate
from tests.cases import relative_error

FEATURES = 16
SAME = 1e-5  # float32: some roundings of another order

# What the constructors leave to the call, and two modules with everything on.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "num_kv_heads": 2,
        "qkv_features": 32,
        "out_features": 8,
        "normalize_qk": True,
        "use_bias": False,
        "rope": 10000.0,
        "learn_ridge": True,
        "ridge_lambda": 0.5,
        "qk_scale": 0.7,
    },
}


def inputs(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape or (2, 9, FEATURES), jnp.float32).astype(dtype)


def module(**kwargs: Any) -> LLAttention:
    return LLAttention(**({"num_heads": 4, "in_features": FEATURES, "decode": False, "rngs": nnx.Rngs(0)} | kwargs))


@nnx.jit
def call(layer: nnx.Module, *args: Any, **kwargs: Any) -> jax.Array:
    return layer(*args, **kwargs)


def linen_parameters(layer: LLAttention) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def shapes(layer: nnx.Module) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(nnx.state(layer)))


class TestDropIn:
    """``nnx.MultiHeadAttention`` replaced, with nothing else changed."""

    @pytest.mark.parametrize(
        "kwargs",
        [{}, {"num_kv_heads": 2, "normalize_qk": True, "in_kv_features": 6}, {"use_bias": False, "out_features": 5}],
        ids=str,
    )
    def test_the_parameters_are_the_same(self, kwargs: dict[str, Any]) -> None:
        """Names, shapes, dtypes and, from the same rngs, values: checkpoints transfer both ways."""
        arguments = {"num_heads": 4, "in_features": FEATURES, "param_dtype": jnp.bfloat16} | kwargs
        stock = nnx.MultiHeadAttention(**arguments, rngs=nnx.Rngs(0))
        ours = LLAttention(**arguments, rngs=nnx.Rngs(0))
        assert shapes(ours) == shapes(stock)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(stock))
        nnx.update(ours, nnx.state(stock))

    def test_the_arguments_are_the_same(self) -> None:
        """Flax's, in its order and with its defaults, first; the exceptions are documented."""
        stock = inspect.signature(nnx.MultiHeadAttention.__call__).parameters
        ours = inspect.signature(LLAttention.__call__).parameters
        assert list(ours)[: len(stock)] == list(stock)
        differ = {n for n in stock if ours[n].kind != stock[n].kind or ours[n].default != stock[n].default}
        assert differ <= {"is_causal"}

    @pytest.mark.parametrize("cls", [LLAttention, ParallaxAttention])
    def test_the_constructor_takes_flax_arguments(self, cls: type) -> None:
        """The sizes by position, and every keyword: by name, or among those that are handed on as they are."""
        stock = inspect.signature(nnx.MultiHeadAttention.__init__).parameters
        ours = inspect.signature(cls.__init__).parameters
        sizes = [name for name, x in stock.items() if x.kind is x.POSITIONAL_OR_KEYWORD]
        assert list(ours)[: len(sizes)] == sizes
        assert all(ours[name].default == stock[name].default for name in sizes)
        assert set(stock) - set(ours) == set(FlaxOptions.__annotations__)

    def test_decode_must_be_given_as_in_flax(self) -> None:
        layer = LLAttention(num_heads=4, in_features=FEATURES, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="decode must be given, True or False"):
            layer(inputs())
        assert jax.eval_shape(lambda x: layer(x, decode=False), inputs()).shape == (2, 9, FEATURES)

    def test_softmax_attention_is_the_limit(self) -> None:
        """The same parameters, an infinite ridge, no causality: the same output, by Flax's own code."""
        stock = nnx.MultiHeadAttention(4, FEATURES, normalize_qk=True, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
        ours = module(normalize_qk=True, num_kv_heads=2, is_causal=False, ridge_lambda=1e15)
        mask = nnx.make_attention_mask(jnp.ones((2, 9)), jnp.asarray([[1.0] * 9, [1.0] * 4 + [0.0] * 5]))
        assert relative_error(call(ours, inputs(), mask=mask), call(stock, inputs(), mask=mask)) <= SAME

    def test_metadata_reaches_the_parameters(self) -> None:
        layer = module(kernel_metadata={"tag": "in"}, out_kernel_metadata={"tag": "out"}, bias_metadata={"tag": "b"})
        assert layer.query.kernel.get_metadata()["tag"] == "in"
        assert layer.out.kernel.get_metadata()["tag"] == "out"
        assert layer.value.bias.get_metadata()["tag"] == "b"  # pyright: ignore[reportOptionalMemberAccess]

    def test_a_view_for_decoding(self) -> None:
        layer = nnx.view(module(), decode=True, batch_size=2, max_length=12)
        assert layer.decode


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_is_the_operator_on_the_projections(variant: str) -> None:
    """Written out here: project, normalise, rotate, attend, project."""
    layer, x = module(**VARIANTS[variant]), inputs()
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    if layer.query_ln is not None and layer.key_ln is not None:
        q, k = layer.query_ln(q), layer.key_ln(k)
    if VARIANTS[variant].get("rope"):
        # as complex numbers: the pair (i, i + D/2) turned by t base^(-2 i / D)
        half = layer.head_dim // 2
        angle = np.arange(9)[:, None] * 10000.0 ** (-np.arange(half) / half)
        turn = jnp.asarray(np.exp(1j * angle), jnp.complex64)[None, :, None]
        for_pair = [jax.lax.complex(a[..., :half], a[..., half:]) * turn for a in (q, k)]
        q, k = (jnp.concatenate([a.real, a.imag], axis=-1) for a in for_pair)
    options = {name: x for name, x in VARIANTS[variant].items() if name in ("ridge_lambda", "qk_scale")}
    o = jax.jit(partial(lla_attention, **options))(q, k, v)
    assert relative_error(call(layer, x), layer.out(o)) <= SAME


@pytest.mark.parametrize("variant", VARIANTS)
def test_linen_is_nnx(variant: str) -> None:
    """The same parameters give the same output; ``init`` makes the tree that NNX has."""
    kwargs = VARIANTS[variant]
    layer, x = module(**kwargs), inputs()
    twin = LinenLLAttention(4, **kwargs)
    made = jax.eval_shape(twin.init, jax.random.key(0), x)["params"]
    parameters = linen_parameters(layer)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(lambda a: (a.shape, a.dtype), parameters)
    mask = jnp.ones((2, 1, 9, 9)).at[1, :, :, 3:5].set(0)
    got = jax.jit(twin.apply)({"params": parameters}, x, mask=mask)
    assert relative_error(got, call(layer, x, mask=mask)) <= SAME


def test_linen_parameters_are_flax_s() -> None:
    x = inputs()
    kwargs: dict[str, Any] = {"num_heads": 4, "normalize_qk": True, "out_features": 5}
    ours, stock = (
        jax.jit(m(**kwargs).init)(jax.random.key(0), x) for m in (LinenLLAttention, nn.MultiHeadDotProductAttention)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, stock)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_dtypes(dtype: Any) -> None:
    """The output has ``dtype``, parameters keep theirs; None infers it, as Flax does."""
    layer = module(dtype=dtype, rope=100.0, learn_ridge=True)
    x = inputs(dtype=jnp.float32)
    assert jax.eval_shape(layer, x).dtype == (dtype or "float32")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {jnp.dtype(jnp.float32)}
    twin = LinenLLAttention(4, dtype=dtype, rope=100.0)
    assert jax.eval_shape(lambda: twin.init_with_output(jax.random.key(0), x))[0].dtype == (dtype or "float32")


@pytest.mark.parametrize("batch", [(), (2, 1, 3)], ids=str)
def test_any_number_of_batch_axes(batch: tuple[int, ...]) -> None:
    """Each entry is what it is alone, with a mask that varies over the batch and one that does not."""
    layer = module(rope=100.0)
    x = inputs(*batch, 6, FEATURES)
    mask = jnp.asarray(np.random.default_rng(0).random((*batch, 1, 6, 6)) < 0.7)
    for one_mask in (mask, mask[(0,) * len(batch)]):
        got = call(layer, x, mask=one_mask)
        assert got.shape == x.shape
        index = tuple(n - 1 for n in batch)
        alone = call(layer, x[index], mask=mask[index] if one_mask is mask else one_mask)
        assert relative_error(got[index], alone) <= SAME


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [True, False])
def test_cross_attention(is_causal: bool) -> None:
    """Other lengths and features for keys and values; causal queries are the last ones, in rope too."""
    layer = module(in_kv_features=6, num_kv_heads=2, rope=100.0, is_causal=is_causal)
    x, kv = inputs(2, 5, FEATURES), inputs(2, 9, 6, seed=1)
    got = call(layer, x, kv, kv)
    assert got.shape == (2, 5, FEATURES)
    assert relative_error(call(layer, x, kv, 2 * kv), got) > 0.01
    changed = kv.at[:, -1].add(1.0)
    assert (relative_error(call(layer, x, changed, changed)[:, :-1], got[:, :-1]) == 0) == is_causal
    if is_causal:
        assert relative_error(call(layer, x, kv), got) == 0  # values are made of what keys are made of
        twin = LinenLLAttention(4, num_kv_heads=2, rope=100.0)
        assert relative_error(jax.jit(twin.apply)({"params": linen_parameters(layer)}, x, kv), got) <= SAME
    else:
        more_queries = jax.eval_shape(layer, inputs(2, 12, FEATURES), kv)
        assert more_queries.shape == (2, 12, FEATURES)


def test_rope_sees_distances_only() -> None:
    """Positions counted from anywhere give the same output; without rope they are refused."""
    layer, x = module(rope=10000.0), inputs()
    positions = jnp.arange(9) + 1000
    assert relative_error(call(layer, x, input_positions=positions), call(layer, x)) <= 1e-4  # angles of 1000
    assert relative_error(call(layer, x, input_positions=positions * 2), call(layer, x)) > 1e-3
    with pytest.raises(ValueError, match="input_positions are for the rotary embedding"):
        module()(x, input_positions=positions)
    with pytest.raises(ValueError, match=r"broadcast to \[batch..., length\] = \(2, 9\), got \(5,\)"):
        layer(x, input_positions=positions[:5])


def test_positions_of_any_real_type() -> None:
    """NumPy's too; halves of a position are turned by half of the angle."""
    layer, x = module(rope=100.0), inputs()
    heads = inputs(2, 9, 4, 4)
    expected = rotate(heads, jnp.arange(9), 100.0)
    for dtype in ("uint8", "int64", "bfloat16", "float16", "float64"):
        positions = np.arange(9).astype(dtype)
        assert jax.eval_shape(lambda x, p=positions: layer(x, input_positions=p), x).shape == x.shape
        np.testing.assert_array_equal(rotate(heads, positions, 100.0), expected)
    halved = rotate(rotate(heads, np.arange(9) / 2, 100.0), np.arange(9) / 2, 100.0)
    assert relative_error(halved, expected) <= SAME


class TestStrictPromotion:
    """Nothing of ours promotes by accident, whatever JAX is told of promotion (here and in conftest.py: nothing is).

    Flax's own LayerNorm of 16-bit inputs does, so ``normalize_qk`` is not among these.
    """

    @pytest.mark.parametrize("rope", [None, 100.0])
    @pytest.mark.parametrize("decode", [0, 1, 10], ids=lambda n: f"decode {n}" if n else "forward")
    @pytest.mark.parametrize("api", ["nnx", "linen"])
    def test_bfloat16_throughout(self, api: str, decode: int, rope: float | None) -> None:
        """Forward, gradient of parameters and inputs, and steps of one and of many tokens, as shapes."""
        kwargs: dict[str, Any] = {"learn_ridge": True, "param_dtype": jnp.bfloat16, "rope": rope}
        x = inputs(2, decode or 9, FEATURES, dtype=jnp.bfloat16)
        if api == "nnx":
            layer = module(**kwargs, decode=bool(decode))
            layer.init_cache((2, 12, FEATURES), jnp.bfloat16)
            graph, parameters, cache = nnx.split(layer, nnx.Param, ...)
            apply = lambda p, x: nnx.merge(graph, p, cache, copy=True)(x)  # noqa: E731
        else:
            twin = LinenLLAttention(4, **kwargs, decode=bool(decode))
            full = inputs(2, 12, FEATURES, dtype=jnp.bfloat16)
            variables = jax.eval_shape(lambda: twin.init(jax.random.key(0), full))
            variables = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), variables)
            parameters, cache = variables["params"], {name: x for name, x in variables.items() if name != "params"}
            apply = lambda p, x: twin.apply({"params": p, **cache}, x, mutable=["cache"])[0]  # noqa: E731

        def loss(parameters: Any, x: jax.Array) -> Any:
            o = apply(parameters, x)
            return jnp.sum(o.astype(jnp.float32)), o

        with jax.numpy_dtype_promotion("strict"):
            gradients, o = jax.eval_shape(jax.grad(loss, argnums=(0, 1), has_aux=True), parameters, x)
        assert o.dtype == jnp.bfloat16
        assert {a.dtype for a in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}


def test_is_causal_of_the_call() -> None:
    """It takes precedence over the constructor's, which it leaves alone."""
    layer, full, x = module(), module(is_causal=False), inputs()
    got = nnx.jit(lambda layer, x: layer(x, is_causal=False))(layer, x)
    assert relative_error(got, call(full, x)) <= SAME
    assert relative_error(call(layer, x), call(full, x)) > 0.01


class TestLearnedRidge:
    def test_starts_where_it_is_told_and_gets_a_gradient(self) -> None:
        layer, x = module(learn_ridge=True, ridge_lambda=0.3), inputs()
        np.testing.assert_allclose(layer.ridge, 0.3, rtol=1e-6)

        @nnx.jit
        def run(layer: LLAttention) -> Any:
            def total(layer: LLAttention) -> Any:
                o = layer(x)
                return jnp.sum(jnp.square(o)), o

            return nnx.grad(total, has_aux=True)(layer)

        gradients, o = run(layer)
        assert relative_error(o, call(module(ridge_lambda=0.3), x)) <= SAME
        gradient = gradients["raw_ridge"][...]
        assert gradient.shape == (4,)
        assert bool(jnp.all(jnp.isfinite(gradient) & (gradient != 0)))

    @pytest.mark.parametrize("raw", [-1e30, -1e4, 1e4, 1e30])
    def test_survives_any_step(self, raw: float) -> None:
        """Above the floor and finite, and so is the output, wherever an optimiser puts the parameter."""
        layer = module(learn_ridge=True, ridge_lambda=0.3, ridge_floor=0.05)
        assert layer.raw_ridge is not None
        layer.raw_ridge[...] = jnp.full((4,), raw, jnp.float32)
        ridge = layer.ridge
        assert bool(jnp.all(jnp.isfinite(ridge) & (ridge >= jnp.float32(0.05))))
        assert bool(jnp.all(jnp.isfinite(call(layer, inputs()))))

    def test_is_a_parameter_only_where_it_is_learned(self) -> None:
        assert "raw_ridge" in nnx.state(module(learn_ridge=True), nnx.Param)
        assert "raw_ridge" not in nnx.state(module())
        assert linen_parameters(module(learn_ridge=True))["raw_ridge"].shape == (4,)


def test_split_merge_and_a_checkpoint_round_trip() -> None:
    """The state as plain arrays is the whole module: what another instance takes from it computes the same."""
    layer, other = (module(learn_ridge=True, rope=100.0, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    x = inputs()
    assert relative_error(call(other, x), call(layer, x)) > 0.01
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(other, state)
    np.testing.assert_array_equal(call(other, x), call(layer, x))
    graph, parameters = nnx.split(layer)
    np.testing.assert_array_equal(call(nnx.merge(graph, parameters), x), call(layer, x))


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_ten_steps_of_training_reduce_the_loss(api: str) -> None:
    """Predict the mean of the tokens so far."""
    x = inputs(4, 16, FEATURES)
    target = jnp.cumsum(x, axis=1) / jnp.arange(1, 17, dtype=jnp.float32)[None, :, None]
    kwargs: dict[str, Any] = {"learn_ridge": True, "ridge_lambda": 1.0}
    if api == "nnx":
        graph, parameters = nnx.split(module(**kwargs))
        apply = lambda p: nnx.merge(graph, p)(x)  # noqa: E731
    else:
        twin = LinenLLAttention(4, **kwargs)
        parameters = jax.jit(twin.init)(jax.random.key(0), x)
        apply = lambda p: twin.apply(p, x)  # noqa: E731
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(parameters: Any, state: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean(jnp.square(apply(p) - target)))(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, loss

    state, losses = optimizer.init(parameters), []
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        for _ in range(11):
            parameters, state, loss = step(parameters, state)
            losses.append(float(loss))
    assert losses[10] < 0.8 * losses[0]


@pytest.mark.parametrize("ridge", [1, np.float32(1), np.int64(1)], ids=lambda ridge: type(ridge).__name__)
def test_a_ridge_of_any_number_type(ridge: Any) -> None:
    layer, x = module(ridge_lambda=ridge), inputs()
    expected = call(module(ridge_lambda=1.0), x)
    np.testing.assert_array_equal(call(layer, x), expected)
    twin = LinenLLAttention(4, ridge_lambda=ridge)
    assert relative_error(jax.jit(twin.apply)({"params": linen_parameters(layer)}, x), expected) <= SAME
