"""Decoding on two devices: what one device gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashlla_jax.nn import core, decoding
from tests.nn.test_decode import BOUNDS, CAPACITY, linen_twin, step, worst
from tests.nn.test_modules import FEATURES, VARIANTS, call, inputs, module


@pytest.mark.slow
class TestOnTwoDevices:
    """Cache and tokens divided by batch or heads: what one device gives."""

    @staticmethod
    def tokens() -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(0)
        shapes = ((2, 1, 4, 8), (2, 1, 2, 8), (2, 1, 2, 8), (2, 12, 2, 8), (2, 12, 2, 8))
        return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    @staticmethod
    def run(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
        settings = core.Settings(None, 100.0, None, None, None, None, False, None, None, None)
        o, cache = decoding.decode(
            settings,
            q,
            k,
            v,
            decoding.Cache(keys, values, jnp.asarray(7, jnp.int32)),
            ridge_lambda=1.0,
            is_causal=True,
            mask=None,
            positions=None,
        )
        return o, cache.key, cache.value

    @pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=["batch", "heads"])
    @pytest.mark.parametrize("explicit", [True, False], ids=["explicit mesh", "shard_map"])
    def test_of_decoding(self, spec: P, explicit: bool) -> None:
        if len(jax.devices()) < 2:
            pytest.skip("needs two devices")
        kind = AxisType.Explicit if explicit else AxisType.Auto
        mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
        given = self.tokens()
        expected = jax.jit(self.run)(*given)
        if explicit:
            got = jax.jit(self.run)(*(jax.device_put(x, NamedSharding(mesh, spec)) for x in given))
        else:
            got = jax.jit(jax.shard_map(self.run, mesh=mesh, in_specs=spec, out_specs=spec))(*given)
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-5)

    def test_of_the_modules(self) -> None:
        """Tokens and cache on an explicit mesh, by batch; in a row's own places too."""
        if len(jax.devices()) < 2:
            pytest.skip("needs two devices")
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
        place = partial(jax.device_put, device=NamedSharding(mesh, P("x")))
        x = inputs(2, 14, FEATURES)
        expected = call(module(**VARIANTS["all"]), x)
        layer = module(**VARIANTS["all"])
        twin, state = linen_twin(CAPACITY)
        layer.init_cache((2, CAPACITY, FEATURES))
        for cached in (layer.cached_key, layer.cached_value):
            assert cached is not None
            cached.set_value(place(cached[...]))
        state["cache"] = {name: place(c) if c.ndim else c for name, c in state["cache"].items()}
        apply = jax.jit(partial(twin.apply, mutable=["cache"]))
        with jax.set_mesh(mesh):
            got = [step(layer, place(x[:, :12])), step(layer, place(x[:, 12:]))]
            first, new = apply(state, place(x[:, :12]))
            second, _ = apply(state | new, place(x[:, 12:]))
        for outputs in (got, [first, second]):
            assert worst(jnp.concatenate([np.asarray(o) for o in outputs], axis=1), expected) <= BOUNDS["float32"]
