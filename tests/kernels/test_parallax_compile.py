"""Compiles Parallax's kernels for GPUs that are not here, as test_compile.py does those of LLA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from flashlla_jax.interface import ParallaxOptions
from flashlla_jax.kernels import parallax_decode_call, parallax_passes, plan
from flashlla_jax.visibility import Hiding, Visibility, visibility
from tests.kernels.test_compile import LENGTH, SHARED_MEMORY, Report, compile_call, recorded, workers

pytestmark = pytest.mark.slow


class Entry(NamedTuple):
    """A kernel of PARALLAX_TABLE, or one of a step's: "gather" or "merge"."""

    capability: int
    kernel: str
    dtype: str
    dim: int

    def __str__(self) -> str:
        return f"sm_{self.capability}-{self.kernel}-{self.dtype}-D{self.dim}"


# Bytes of register spills (stores) that an entry may have: what Triton 3.8 and its assembler make of it, as measured,
# with a quarter and 64 for another version's. The usual ones, and float32's; a head dimension of 256 is right, but slow
# to compile.
SPILLS = {
    Entry(90, "forward", "bfloat16", 64): 0,
    Entry(90, "query", "bfloat16", 64): 0,
    Entry(90, "key", "bfloat16", 64): 0,
    Entry(90, "gather", "bfloat16", 64): 0,
    Entry(90, "gather", "float8_e4m3fn", 64): 0,
    Entry(90, "gather", "float32", 64): 48,
    Entry(90, "merge", "bfloat16", 64): 0,
    Entry(90, "forward", "bfloat16", 128): 132,
    Entry(90, "query", "bfloat16", 128): 0,
    Entry(90, "key", "bfloat16", 128): 56,
    Entry(90, "gather", "bfloat16", 128): 0,
    Entry(90, "gather", "bfloat16", 256): 0,
    Entry(90, "merge", "bfloat16", 256): 0,
    Entry(80, "forward", "bfloat16", 64): 68,
    Entry(80, "query", "bfloat16", 64): 0,
    Entry(80, "key", "bfloat16", 64): 24,
    Entry(80, "gather", "bfloat16", 128): 0,
    Entry(80, "forward", "float32", 64): 24,
    Entry(80, "query", "float32", 64): 0,
    Entry(80, "key", "float32", 64): 0,
}

# What Triton 3.6 makes of some.
SPILLS_BY_TRITON_3_6 = {Entry(90, "forward", "bfloat16", 128): 324}


def compile_entry(entry: Entry) -> Report:
    options = ParallaxOptions(entry.dim**-0.5, lax.Precision.DEFAULT)

    def gradients(q: jax.Array, r: jax.Array, k: jax.Array, v: jax.Array) -> object:
        seen = visibility(Hiding(True, None, 0, None, None, None, True, None), LENGTH, LENGTH)
        chosen = plan.plan_for(q, v, options.precision, entry.capability, table=plan.PARALLAX_TABLE)
        o, saved, _ = parallax_passes.forward(q, k, v, r, seen, options, chosen)
        return parallax_passes.backward(q, k, v, r, seen, saved, o, options, chosen)

    def step(q: jax.Array, r: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        end = jnp.full((1, 1), LENGTH, jnp.int32)
        seen = Visibility(0 * end, end, None, None, None, None, False, False)
        first = jnp.zeros((1, 1, 2), jnp.int32)
        chosen = parallax_decode_call.plan_for(k, v, options.precision, entry.capability)
        return parallax_decode_call.decode(
            q, k, v, r, seen, first, qk_scale=options.qk_scale, precision=options.precision, plan=chosen
        )

    decodes = entry.kernel in ("gather", "merge")
    dtype = "bfloat16" if entry.dtype.startswith("float8") else entry.dtype
    q = jax.ShapeDtypeStruct((1, 1 if decodes else LENGTH, 2, entry.dim), dtype)
    k = jax.ShapeDtypeStruct((1, LENGTH, 1, entry.dim), entry.dtype)
    return compile_call(*recorded(step if decodes else gradients, q, q, k, k)[entry.kernel], entry.capability)


@pytest.fixture(scope="module")
def report() -> Iterator[Callable[[Entry], Report]]:
    with workers() as pool:
        futures = {entry: pool.submit(compile_entry, entry) for entry in SPILLS}
        try:
            yield lambda entry: futures[entry].result()
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("entry", SPILLS, ids=str)
def test_fits_and_runs_freely(entry: Entry, report: Callable[[Entry], Report]) -> None:
    found = report(entry)
    known = SPILLS | (SPILLS_BY_TRITON_3_6 if version("triton").startswith("3.6.") else {})
    assert found.shared_memory <= SHARED_MEMORY[entry.capability]
    assert found.spill_stores <= 1.25 * known[entry] + 64, found.log
    assert entry.capability < 90 or not found.serialised, found.log


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("operand_bytes", [2, 4])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_tiles_fit_each_other(capability: int, operand_bytes: int, dim: int) -> None:
    """The key kernel's tiles of queries divide the query kernel's; float32's share an origin of 32 rows."""
    query, key, forward = (
        plan.entries(name, operand_bytes, capability, plan.PARALLAX_TABLE)[dim].BM
        for name in ("query", "key", "forward")
    )
    assert query % key == 0
    assert operand_bytes == 2 or max(query, key, forward) <= 32
