"""``ParallaxAttention`` for NNX and Linen: softmax attention when new, the operator's call, decoding, both alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from flashlla_jax import LLAttention, ParallaxAttention, parallax_attention
from flashlla_jax.nn.linen import ParallaxAttention as LinenParallaxAttention

pytestmark = pytest.mark.usefixtures("as_a_script")

X = jax.random.normal(jax.random.key(1), (2, 20, 32))
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope, grouped, normalised": {"rope": 100.0, "num_kv_heads": 2, "normalize_qk": True},
    "window": {"rope": 100.0, "local_window_size": (5, 0)},
}


def trained(seed: int = 0, **settings: Any) -> ParallaxAttention:
    """A layer whose probe is not 0."""
    init = nnx.initializers.normal(0.1)
    return ParallaxAttention(4, 32, decode=False, rngs=nnx.Rngs(seed), probe_kernel_init=init, **settings)


def test_a_new_layer_is_flax_softmax_attention() -> None:
    """The same parameters from the same keys, and the same output, forward and backward."""
    ours = ParallaxAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
    theirs = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
    mask = nnx.make_causal_mask(X[..., 0])
    np.testing.assert_allclose(ours(X), theirs(X, mask=mask), atol=1e-5)  # float32, 20 keys
    got = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X))))(ours)
    expected = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X, mask=mask))))(theirs)
    for name in ("query", "key", "value", "out"):
        np.testing.assert_allclose(got[name]["kernel"][...], expected[name]["kernel"][...], atol=1e-4, err_msg=name)
    assert float(jnp.abs(got["probe"]["kernel"][...]).max()) > 1e-3  # so it learns


def test_a_softmax_checkpoint_loads() -> None:
    theirs = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(3))
    ours = ParallaxAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
    nnx.update(ours, nnx.state(theirs, nnx.Param))  # what it lacks, the probe, stays 0
    np.testing.assert_allclose(ours(X), theirs(X, mask=nnx.make_causal_mask(X[..., 0])), atol=1e-5)


def test_the_layer_is_the_operator() -> None:
    layer = trained()
    q, r, k, v = (f(X) for f in (layer.query, layer.probe, layer.key, layer.value))
    np.testing.assert_allclose(layer(X), layer.out(parallax_attention(q, r, k, v)), atol=1e-6)
    wide = layer(X, segment_ids=jnp.repeat(jnp.asarray([[0, 1]] * 2), 10, axis=1))
    np.testing.assert_allclose(wide[:, 10:], layer(X[:, 10:]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_decoding_equals_the_whole(name: str) -> None:
    """A prompt of more than a decode step takes, then single tokens, then three."""
    layer = trained(**SETTINGS[name])
    whole = layer(X)
    layer.init_cache((2, 24, 32))
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    got = [step(layer, X[:, at]) for at in (slice(0, 12), slice(12, 13), slice(13, 14), slice(14, 17), slice(17, 20))]
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), whole, atol=2e-5)


@pytest.mark.slow
def test_ragged_prompts() -> None:
    layer = trained(rope=100.0)
    layer.init_cache((2, 24, 32))
    layer(X[:, :12], decode=True, decode_lengths=jnp.array([12, 7]))
    got = layer(X[:, 12:13], decode=True)
    np.testing.assert_allclose(got[0], layer(X[:1, :13])[0, 12:], atol=2e-5)
    alone = jnp.concatenate([X[1:, :7], X[1:, 12:13]], axis=1)
    np.testing.assert_allclose(got[1], layer(alone)[0, 7:], atol=2e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_linen_is_the_same(name: str) -> None:
    settings = SETTINGS[name]
    layer = trained(**settings)
    twin = LinenParallaxAttention(4, **settings)
    made = twin.init(jax.random.key(0), X)["params"]
    assert not np.any(made["probe"]["kernel"])
    parameters = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, made)
    np.testing.assert_allclose(twin.apply({"params": parameters}, X), layer(X), atol=1e-6)


@pytest.mark.slow
def test_linen_decodes() -> None:
    settings = SETTINGS["rope, grouped, normalised"]
    layer = trained(**settings)
    parameters = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    twin = LinenParallaxAttention(4, decode=True, **settings)
    variables = {"params": parameters, "cache": twin.init(jax.random.key(0), X)["cache"]}
    outputs = []
    for at in (slice(0, 12), slice(12, 13), slice(13, 20)):
        o, changed = twin.apply(variables, X[:, at], mutable=["cache"])
        variables |= changed
        outputs.append(o)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), layer(X), atol=2e-5)


def test_bfloat16() -> None:
    layer = trained(dtype=jnp.bfloat16)
    assert layer(X).dtype == jnp.bfloat16
    layer.init_cache((2, 24, 32), jnp.bfloat16)
    np.testing.assert_allclose(layer(X[:, :8], decode=True), layer(X)[:, :8], atol=2e-2)  # a few roundings of 2^-9


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"dropout_rate": 0.1}, NotImplementedError, "dropout_rate must be 0, got 0.1"),
        ({"attention_fn": linen.dot_product_attention}, NotImplementedError, "attention_fn must be None"),
        ({"rope": -1.0}, ValueError, "rope must be None or"),
        ({"ridge_lambda": 1.0}, TypeError, "ridge_lambda"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refusals(argument: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ParallaxAttention(4, 32, rngs=nnx.Rngs(0), **argument)


def test_it_is_not_local_linear_attention() -> None:
    assert not isinstance(trained(), LLAttention)
    with pytest.raises(ValueError, match="decode must be given, True or False, to ParallaxAttention or to its call"):
        ParallaxAttention(4, 32, rngs=nnx.Rngs(0))(X)
