"""The Triton kernels with the length divided over two GPUs: ``pytest -m gpu``, skipped with fewer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import devices
from benchmarks.devices import Setting
from flashlla_jax.context_parallel import groups_of_heads
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


# (batch, length), of 8 heads, for two groups of heads a device in the forward pass, and four in the backward pass
IN_GROUPS = {"plain": (8, 8192), "packed": (32, 8192)}


# All ways in one test, and so in one process: they have their kernels in common, which take longest to compile.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_gpu_and_repeats(case: str, dtype: str) -> None:
    check(CASES[case], SHAPE, dtype, WAYS)


@pytest.mark.parametrize("case", IN_GROUPS)
def test_heads_in_groups(case: str) -> None:
    batch, length = IN_GROUPS[case]
    shape = Shape(batch=batch, queries=length, keys=length, heads=8, kv_heads=8, dim=32, value_dim=32)
    ids = np.sort(np.random.default_rng(0).integers(0, 9, (batch, length)), axis=1)
    on_a_device = [jax.ShapeDtypeStruct((batch, rows, 8, 32), jnp.bfloat16) for rows in (length // 2, length)]
    groups = [groups_of_heads(*on_a_device, few_keys=case == "packed", backward=x) for x in (False, True)]
    assert groups == [2, 4]
    check(({"segment_ids": ids} if case == "packed" else {}, {}), shape, "bfloat16", ("automatic", "shard_map"))


def check(case: tuple[dict[str, Any], dict[str, Any]], shape: Shape, dtype: str, ways: tuple[str, ...]) -> None:
    """Two GPUs give what one does, and the same again."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    hidden, static = case
    q, k, v, g = draw(shape, dtype)
    given = [q, k, v, jnp.full(shape.ridge, 1.0, jnp.float32), g]
    static = static | {"implementation": "triton"}
    one = jax.jit(partial(output_and_gradients, attending(**static)))(jax.tree.map(jnp.asarray, hidden), *given)
    expected = results(one)
    # keys' gradients are sums of two that were rounded apart; tf32 products of float32 differ by tile
    bound = 6e-3 if dtype == "bfloat16" else 1e-3
    for way in ways:
        run, arrays = compiled(way, {"x": 2}, hidden, static, given, length="x")
        got, again = results(run(*arrays)), results(run(*arrays))
        errors = {name: relative_error(got[name], x) for name, x in expected.items()}
        assert max(errors.values()) < bound, (way, errors)
        assert all(np.array_equal(np.asarray(got[name]), np.asarray(again[name])) for name in NAMES), way
        # nothing of q's size is gathered but keys and values, in each pass at most
        wide = f"{shape.dim}]"
        gathered = sum(n for name, n in collectives(run).items() if name.startswith("all-gather ") and wide in name)
        assert gathered <= 4, way


@pytest.mark.parametrize(("length", "bound"), [(32768, 0.75), (131072, 0.6)])
def test_each_gpu_holds_less_than_one_would(length: int, bound: float) -> None:
    """Forward and backward, with inputs and outputs; half of it would be what no device has for another."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")

    def held(way: str, count: int) -> int:
        return devices.held(devices.compiled(Setting("length", way, 1, length, 8, False), count)[0])

    one = held("automatic", 1)
    ratios = {way: held(way, 2) / one for way in WAYS}
    assert max(ratios.values()) <= bound, ratios
