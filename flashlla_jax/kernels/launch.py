"""How the kernels are launched: tile shapes, warps and pipeline stages, and the one call into jax-triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from flashlla_jax.sharding import varying_like


class Launch(NamedTuple):
    """Queries and keys per tile, warps per program, and depth of the software pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By the least compute capability, (kernel, bytes of a product's operand) and padded head dimension, the larger of the
# key's and the value's. 64 and 128 of capability 90 were chosen by time on an H200 (benchmarks/tune.py times candidates
# like those again), the rest by what the compiler makes of them, the least register spills. The key kernel's BM divides
# the query's; for 4 bytes BM is 32 at the most (kernels/tiles.py, load_origin).
_TABLE: dict[int, dict[tuple[str, int], dict[int, Launch]]] = {
    90: {
        ("forward", 2): {64: Launch(64, 64, 4, 3), 128: Launch(64, 32, 4, 3), 256: Launch(64, 32, 4, 2)},
        ("query", 2): {64: Launch(64, 64, 4, 3), 128: Launch(64, 32, 4, 3), 256: Launch(64, 32, 4, 1)},
        ("key", 2): {64: Launch(32, 64, 4, 3), 128: Launch(32, 128, 8, 2), 256: Launch(32, 64, 4, 1)},
    },
    80: {
        ("forward", 2): {64: Launch(64, 64, 4, 3), 128: Launch(64, 32, 8, 2), 256: Launch(16, 16, 4, 1)},
        ("query", 2): {64: Launch(64, 64, 4, 3), 128: Launch(64, 32, 8, 2), 256: Launch(16, 16, 4, 1)},
        ("key", 2): {64: Launch(32, 64, 4, 3), 128: Launch(32, 64, 8, 2), 256: Launch(16, 32, 8, 1)},
        ("forward", 4): {64: Launch(32, 32, 4, 2), 128: Launch(32, 32, 4, 2), 256: Launch(16, 16, 4, 1)},
        ("query", 4): {64: Launch(32, 32, 4, 2), 128: Launch(32, 16, 4, 1), 256: Launch(16, 16, 4, 1)},
        ("key", 4): {64: Launch(32, 32, 4, 2), 128: Launch(32, 32, 8, 1), 256: Launch(16, 16, 4, 1)},
    },
}


def entries(kernel: str, operand_bytes: int, capability: int) -> dict[int, Launch]:
    """By padded head dimension, of the newest GPU in the table that is not newer than this one."""
    tables = [_TABLE[least] for least in sorted(_TABLE, reverse=True) if least <= capability]
    return next(table[kernel, operand_bytes] for table in tables if (kernel, operand_bytes) in table)


def launch(kernel: str, operand_bytes: int, padded_dim: int, capability: int) -> Launch:
    return entries(kernel, operand_bytes, capability)[max(64, padded_dim)]


def capability() -> int:
    """Of JAX's default device, 90 for 9.0; where that is no NVIDIA GPU, the least that the kernels are made for."""
    found = getattr(jax.devices()[0], "compute_capability", None)
    return max(80, round(10 * float(found))) if found else 80


def call(
    kernel: Any,
    grid: int,
    arrays: tuple[jax.Array, ...],
    lengths: tuple[int, int],
    out_shapes: tuple[jax.ShapeDtypeStruct, ...],
    shape: Launch,
    constants: dict[str, Any],
) -> tuple[jax.Array, ...]:
    """Runs a kernel whose parameters are ``arrays``, ``lengths``, the outputs, then ``constants`` by keyword.

    In that order, and with every constexpr given, jax-triton 0.3 and 0.4 agree.
    """
    import jax_triton as jt

    out = (
        {"out_shape": out_shapes}
        if tuple(map(int, jt.__version__.split(".")[:2])) < (0, 4)
        else {"out_type": out_shapes}
    )
    results = jt.triton_call(
        *arrays,
        *lengths,
        kernel=kernel,
        grid=(grid,),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        BM=shape.BM,
        BN=shape.BN,
        **out,
        **constants,
    )
    return varying_like(tuple(results), arrays)
