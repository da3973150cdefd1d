"""``sow_residuals``: a model's solves can be watched from outside, and cost nothing where they are not."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from flashlla_jax import ParallaxAttention, Residuals, lla_attention
from flashlla_jax.nn.linen import LLAttention as LinenLLAttention
from tests.cases import relative_error
from tests.nn.test_modules import FEATURES, SAME, inputs, linen_parameters, module

CAPPED = {"ridge_lambda": 0.1, "cg_max_iters": 1}


class Twice(nnx.Module):
    """Two layers, of which a user sees the outside."""

    def __init__(self, **kwargs: Any):
        self.layers = nnx.List([module(**kwargs), module(**kwargs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + layer(x)
        return x


def sown_by(api: str, x: jax.Array, **kwargs: Any) -> tuple[jax.Array, Any]:
    """The output of a module and what it sowed as residuals, in one program."""
    layer = module(**kwargs)
    if api == "nnx":
        graph, state = nnx.split(layer)
        out, sown = jax.jit(lambda state, x: nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x))(state, x)
        return out, nnx.to_pure_dict(sown).get("residuals")
    twin = LinenLLAttention(4, **kwargs)
    run = jax.jit(lambda params, x: twin.apply({"params": params}, x, mutable=["intermediates"]))
    out, sown = run(linen_parameters(layer), x)
    return out, sown.get("intermediates", {}).get("residuals")


def jaxpr_of(api: str, **kwargs: Any) -> str:
    layer = module(**kwargs)
    if api == "nnx":
        graph, state = nnx.split(layer)
        return str(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, inputs()))
    twin = LinenLLAttention(4, **kwargs)
    return str(jax.make_jaxpr(lambda params, x: twin.apply({"params": params}, x))(linen_parameters(layer), inputs()))


@pytest.mark.parametrize("api", ["nnx", "linen"])
class TestSowing:
    @pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
    def test_residuals_are_those_of_lla_attention(self, api: str, batch: tuple[int, ...]) -> None:
        x = inputs(*batch, 9, FEATURES)
        _, (sown,) = sown_by(api, x, ridge_lambda=0.1, sow_residuals=True)
        assert isinstance(sown, Residuals)
        layer = module()
        heads = [project(x.reshape(-1, 9, FEATURES)) for project in (layer.query, layer.key, layer.value)]
        _, expected = jax.jit(lambda *a: lla_attention(*a, ridge_lambda=0.1, return_residuals=True))(*heads)
        for got, want in zip(sown, expected, strict=True):
            assert got.shape == (*batch, 9, 4)
            np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-2, atol=1e-6)  # of noise-sized errors
        assert int(sown.iterations.max()) > 1

    def test_rows_that_hit_the_cap(self, api: str) -> None:
        _, (sown,) = sown_by(api, inputs(), **CAPPED, sow_residuals=True)
        assert int(sown.iterations.max()) == 1
        assert not bool(sown.converged.all())
        # a row that was cut off has a larger error than any that reached the stop
        assert sown.relative_error[~sown.converged].min() > sown.relative_error[sown.converged].max()

    @pytest.mark.slow
    def test_output_and_gradient_are_the_same(self, api: str) -> None:
        def loss(watched: bool) -> Any:
            return jax.value_and_grad(lambda x: jnp.sum(sown_by(api, x, sow_residuals=watched)[0] ** 2))(inputs())

        for watched, plain in zip(loss(True), loss(False), strict=True):
            assert relative_error(watched, plain) <= SAME

    def test_off_it_sows_nothing(self, api: str) -> None:
        assert sown_by(api, inputs())[1] is None

    def test_off_it_costs_nothing(self, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The program has no trace of it; on, it has."""
        off = jaxpr_of(api)
        monkeypatch.setattr("flashlla_jax.nn.core.attend", _without_sowing)
        assert off == jaxpr_of(api)
        monkeypatch.undo()
        warning = pytest.warns(DeprecationWarning, match="outside of 'nnx.capture")
        with warning if api == "nnx" else contextlib.nullcontext():
            assert off != jaxpr_of(api, sow_residuals=True)

    def test_a_cache_sows_nothing(self, api: str) -> None:
        """Neither a prompt nor a token: the one might, the other has no iterations to tell of."""
        x = inputs()
        layer = module(sow_residuals=True)
        if api == "nnx":
            layer.init_cache(x.shape)
            _, sown = nnx.capture(layer, nnx.Intermediate)(x[:, :1], decode=True)
            assert not nnx.to_pure_dict(sown)
            return
        twin = LinenLLAttention(4, sow_residuals=True, decode=True)
        made = twin.init(jax.random.key(0), x)
        assert set(made) == {"params", "cache"}
        _, state = twin.apply(made, x[:, :1], mutable=["cache", "intermediates"])
        assert set(state) == {"cache"}

    def test_it_is_a_flag(self, api: str) -> None:
        with pytest.raises(TypeError, match="sow_residuals must be True or False, got 'all'"):
            sown_by(api, inputs(), sow_residuals="all")


def _without_sowing(query: Any, key: Any, value: Any, *, sow: Any = None, **options: Any) -> Any:
    """``core.attend`` of one batch axis as it is without ``sow``."""
    assert sow is None
    used: Any = {name: x for name, x in options.items() if x is not None or name.startswith("cg_")}
    return lla_attention(query, key, value, **used)


def test_switched_on_in_a_whole_model() -> None:
    model = Twice(**CAPPED)
    model.set_attributes(sow_residuals=True)
    _, sown = nnx.capture(model, nnx.Intermediate)(inputs())
    layers = nnx.to_pure_dict(sown)["layers"]
    assert [layers[i]["residuals"][0].iterations.shape for i in (0, 1)] == [(2, 9, 4)] * 2


def test_popped_from_a_model() -> None:
    """Flax's older way, which it still serves and warns of."""
    model = module(sow_residuals=True)
    with pytest.warns(DeprecationWarning, match="outside of 'nnx.capture"):
        model(inputs())
    (residuals,) = nnx.to_pure_dict(nnx.pop(model, nnx.Intermediate))["residuals"]
    assert residuals.iterations.shape == (2, 9, 4)
    assert not nnx.state(model, nnx.Intermediate)


def test_stacked_layers_of_linen() -> None:
    """``nn.scan`` stacks what its layers sow."""
    stack = nn.scan(_Layer, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=3)
    x = inputs()
    made = stack().init(jax.random.key(0), x)
    _, state = jax.jit(lambda v: stack().apply(v, x, mutable=["intermediates"]))(made)
    (residuals,) = state["intermediates"]["attention"]["residuals"]
    assert residuals.iterations.shape == (3, 2, 9, 4)


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        return x + LinenLLAttention(4, sow_residuals=True, name="attention")(x), None


def test_parallax_has_no_solve_to_watch() -> None:
    layer = ParallaxAttention(num_heads=4, in_features=FEATURES, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sow_residuals"):
        layer.set_attributes(sow_residuals=True)
