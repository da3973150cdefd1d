"""Compiles the kernels of a decode step for GPUs that are not here: do they fit, and do they spill registers?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from flashlla_jax.kernels import decode_call, launch
from flashlla_jax.visibility import Visibility
from tests.kernels.test_compile import SHARED_MEMORY, Report, compile_call, workers

pytest.importorskip("triton", reason="Triton is not installed")


class Entry(NamedTuple):
    """A cache and an architecture, and the most bytes of spills that either kernel may have on it."""

    capability: int
    dtype: str
    dim: int
    spills: tuple[int, int]
    precision: lax.Precision = lax.Precision.DEFAULT
    masked: bool = False

    def __str__(self) -> str:
        mask = "-mask" if self.masked else ""
        return f"sm_{self.capability}-{self.dtype}-D{self.dim}-{self.precision.name.lower()}{mask}"


# The spills are the worse of what Triton 3.6, 3.8 and their assemblers make of them. A wrong shape spills thousands.
ENTRIES = [
    Entry(90, "bfloat16", 64, (0, 0)),
    Entry(90, "bfloat16", 128, (128, 0)),
    Entry(90, "bfloat16", 256, (220, 2340)),  # the second kernel's matrix is all the registers that there are
    Entry(90, "bfloat16", 64, (0, 0), masked=True),
    Entry(90, "float8_e4m3fn", 64, (88, 0)),
    Entry(90, "float32", 64, (0, 4)),
    Entry(90, "float32", 128, (216, 0), lax.Precision.HIGHEST),
    Entry(80, "bfloat16", 64, (0, 16)),
    Entry(80, "bfloat16", 128, (56, 0)),
]


def launches(entry: Entry) -> list[tuple[Any, ...]]:
    """What ``launch.call`` is given, kernel by kernel."""
    calls: list[tuple[Any, ...]] = []

    def call(kernel: Any, grid: int, arrays: Any, lengths: Any, out_shapes: Any, shape: Any, constants: Any) -> Any:
        calls.append((kernel, arrays, out_shapes, shape, constants))
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out_shapes)

    query = jax.ShapeDtypeStruct((2, 1, 8, entry.dim), "float32" if entry.dtype.startswith("float8") else entry.dtype)
    cache = jax.ShapeDtypeStruct((2, 4096, 2, entry.dim), entry.dtype)
    interval = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 8, 1, 4096), jnp.bool_) if entry.masked else None
    seen = Visibility(interval, interval, None, None, None, mask, False, False)
    plan = decode_call.plan_for(cache, cache, entry.precision, entry.capability)
    run = partial(decode_call.decode, qk_scale=0.1, precision=entry.precision, plan=plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "call", call)
        rows = (jax.ShapeDtypeStruct((2, 1, 8), dtype) for dtype in (jnp.float32, jnp.int32))
        jax.eval_shape(run, query, cache, cache, next(rows), seen, next(rows))
    return calls


def compile_entry(entry: Entry) -> list[Report]:
    return [compile_call(*call, entry.capability) for call in launches(entry)]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with workers() as pool:
        yield pool


@pytest.fixture(scope="module")
def report(pool: ProcessPoolExecutor) -> Callable[[Entry], list[Report]]:
    futures = {entry: pool.submit(compile_entry, entry) for entry in ENTRIES}
    return lambda entry: futures[entry].result()


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_fits_and_spills_no_more_than_known(entry: Entry, report: Callable[[Entry], list[Report]]) -> None:
    for compiled, most in zip(report(entry), entry.spills, strict=True):
        assert compiled.shared_memory <= SHARED_MEMORY[entry.capability]
        assert compiled.spill_stores <= 1.25 * most + 32, compiled.log  # and some room for the next version's
        assert not compiled.serialised, compiled.log


@pytest.mark.parametrize(
    ("rows", "heads", "length", "splits"),
    [
        (8, 16, 8192, 2),  # 256 programs of 264
        (64, 16, 4096, 1),  # 1024 programs: 3.9 rounds
        (1, 16, 131072, 16),
        (3, 1, 65536, 84),  # 252 programs
        (1, 1, 300, 2),  # four blocks a split, and no more splits than that
        (1, 1, 1, 1),
    ],
)
def test_splits_fill_whole_rounds_of_programs(rows: int, heads: int, length: int, splits: int) -> None:
    query = jax.ShapeDtypeStruct((rows, 1, heads, 64), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((rows, length, heads, 64), jnp.bfloat16)
    interval = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    seen = Visibility(interval, interval, None, None, None, None, False, False)
    plan = decode_call.plan_for(cache, cache, lax.Precision.DEFAULT, 90)
    constants = decode_call.constants(query, cache, cache, seen, 0.1, plan)
    assert splits == constants.SPLITS
