"""The Triton kernels with the length divided over two GPUs: ``pytest -m gpu``, skipped with fewer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.devices import Setting, call
from tests.cases import Shape, draw, relative_error
from tests.devices.meshes import WAYS, attending, collectives, compiled, output_and_gradients

pytestmark = pytest.mark.gpu

SHAPE = Shape(queries=2048, keys=2048, heads=4, kv_heads=4, dim=64, value_dim=64)
_IDS = np.sort(np.random.default_rng(0).integers(0, 5, (1, 2048)), axis=1)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "packed": ({"segment_ids": _IDS}, {}),
    "window": ({}, {"local_window_size": (300, 0)}),
}
NAMES = ("o", "dq", "dk", "dv", "dlambda")


def results(out: Any) -> dict[str, jax.Array]:
    o, _, gradients = out
    return {name: jnp.asarray(np.asarray(x)) for name, x in zip(NAMES, (o, *gradients), strict=True)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_equals_one_gpu_and_repeats(way: str, case: str, dtype: str) -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    hidden, static = CASES[case]
    q, k, v, g = draw(SHAPE, dtype)
    given = [q, k, v, jnp.full(SHAPE.ridge, 1.0, jnp.float32), g]
    static = static | {"implementation": "triton"}
    run, arrays = compiled(way, {"x": 2}, hidden, static, given, length="x")
    got = results(run(*arrays))
    one = jax.jit(partial(output_and_gradients, attending(**static)))(jax.tree.map(jnp.asarray, hidden), *given)
    # keys' gradients are sums of two that were rounded apart; tf32 products of float32 differ by tile
    bound = 6e-3 if dtype == "bfloat16" else 1e-3
    errors = {name: relative_error(got[name], x) for name, x in results(one).items()}
    assert max(errors.values()) < bound, errors

    again = results(run(*arrays))
    assert all(np.array_equal(np.asarray(got[name]), np.asarray(again[name])) for name in NAMES)
    # nothing of q's size is gathered but keys and values, in each pass at most
    assert sum(n for name, n in collectives(run).items() if name.startswith("all-gather ") and "64]" in name) <= 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("length", "bound"), [(32768, 0.75), (131072, 0.6)])
def test_each_gpu_holds_less_than_one_would(length: int, bound: float, way: str) -> None:
    """Forward and backward, with inputs and outputs; half of it would be what no device has for another."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    one, each = (call(Setting("length", way, 1, length, 8, False), devices).memory for devices in (1, 2))
    assert each <= bound * one
