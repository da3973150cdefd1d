"""What the tests on several devices share: meshes, the placements of a call, and what a compiled program sends."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flashlla_jax import lla_attention, parallax_attention

# How the arrays of a call come to lie on several devices.
WAYS = ("shard_map", "explicit", "automatic")


def mesh(kind: AxisType, **axes: int) -> Mesh:
    """Of the first devices, by default of two along ``x``."""
    sizes = tuple((axes or {"x": 2}).values())
    count = int(np.prod(sizes))
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices")
    return jax.make_mesh(sizes, tuple(axes or "x"), axis_types=(kind,) * len(sizes), devices=jax.devices()[:count])


def collectives(compiled: Any) -> Counter[str]:
    """How often the devices send each other something, and what, as in ``all-gather f32[2,8]``."""
    found = re.findall(r"= \(?(\w+\[[\d,]*\]).* ([a-z-]+?)(?:-start)?\(", compiled.as_text())
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
    return Counter(f"{name} {shape}" for shape, name in found if name in kinds)


def output_and_gradients(attend: Any, hidden: dict[str, Any], *given: jax.Array) -> tuple[Any, ...]:
    """The output, the residuals and the four gradients; ``given`` is q, k, v, the ridge and the cotangent."""
    *inputs, g = given
    o, vjp, residuals = jax.vjp(partial(attend, hidden), *inputs, has_aux=True)
    return o, residuals, vjp(g)


def attending(implementation: Any = "xla", axis_name: Any = None, parallax: bool = False, **static: Any) -> Any:
    """``lla_attention`` or ``parallax_attention`` with its residuals, as ``output_and_gradients`` takes it."""

    def attend(hidden: dict[str, Any], q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array) -> Any:
        options = {"implementation": implementation, "return_residuals": True, "axis_name": axis_name}
        if parallax:
            return parallax_attention(q, own, k, v, **hidden, **options, **static)
        return lla_attention(q, k, v, ridge_lambda=own, **hidden, **options, **static)

    return attend


def specs(hidden: dict[str, Any], batch: Any, length: Any, heads: Any = None) -> tuple[dict[str, Any], P]:
    """Where the arrays of a call lie that are no q, k or v, and where these do."""
    rows = P(batch, length)
    of = {"segment_ids": rows, "query_seq_lengths": P(batch), "key_value_seq_lengths": P(batch), "query_offset": P()}
    of |= {"mask": P(batch, None, length, None)}
    return {name: of[name] for name in hidden}, P(batch, length, heads)


def compiled(
    way: str, on: dict[str, int], hidden: dict[str, Any], static: dict[str, Any], given: Any, **placed: Any
) -> tuple[Any, Any]:
    """The program of a call that is divided over the mesh axes ``placed``, and its arguments."""
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    of_hidden, of_given = specs(hidden, placed.get("batch"), placed["length"], placed.get("heads"))
    over = mesh(kind, **on)
    attend = attending(axis_name=placed["length"] if way == "shard_map" else None, **static)
    run: Any = partial(output_and_gradients, attend)
    if way == "shard_map":
        run = jax.shard_map(run, mesh=over, in_specs=(of_hidden, *(of_given,) * len(given)), out_specs=of_given)
    hidden = {name: jax.device_put(jnp.asarray(x), NamedSharding(over, of_hidden[name])) for name, x in hidden.items()}
    given = [jax.device_put(x, NamedSharding(over, of_given)) for x in given]
    return jax.jit(run).lower(hidden, *given).compile(), (hidden, *given)


def assert_alike(got: Any, expected: Any, atol: float = 2e-5) -> None:
    """The same operations on other tiles' worth of rows: float32 sums in another order, and a step more or less."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol if x.dtype != jnp.int32 else 1, rtol=0)
