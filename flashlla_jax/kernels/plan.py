"""How a call is computed by the kernels: tile shapes, warps, pipeline stages and arithmetic, in one hashable value.

A plan is resolved once, from dtype, precision, head dimensions and GPU, and is part of what is traced: another plan is
another program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

_LARGEST_DIM = 256

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Launch(NamedTuple):
    """Queries and keys per tile, warps per program, and depth of the software pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# A launch by the least compute capability, (kernel, bytes of an operand) and padded head dimension.
LaunchTable = dict[int, dict[tuple[str, int], dict[int, Launch]]]


class Arithmetic(NamedTuple):
    """How products are computed, by dtype and precision; ``kernels/constants.py`` says more of each."""

    upcast: bool  # tiles to float32 after loading
    precision: str  # of a float32 product
    parts: int  # of x: one, hi and lo, or hi, lo and rest; u has two at the most
    split_all: bool  # the weights of all rows are hi and lo, not only those of hard ones
    hard_below: float  # a row is hard where lambda < hard_below * (variance of a key's feature) / sqrt(omega)
    last_above: float  # the last part of x is used where it moves kc.x by more than this
    corrected_below: float  # u is corrected once in rows where the b_ij keep less than this share of gamma's variance
    balanced_above: float  # the |x.kbar| above which the a_ij of a row are made to sum to 1
    forward_tau: tuple[float, float]  # the stop: |r|^2 <= tau lambda x.Ax, the second in hard rows
    backward_tau: tuple[float, float]
    finish: bool  # whether these stops count on a last step that takes no product, see kernels/solver.py

    @property
    def exact(self) -> bool:
        """Whether products keep all of float32, so that smaller losses beside them are worth avoiding."""
        return self.upcast and self.precision != "tf32"

    @property
    def balanced(self) -> bool:
        """Whether some a_ij are made to sum to 1."""
        return self.balanced_above < math.inf

    @property
    def most_care(self) -> int:
        """Of a tile's last passes: ``kernels/constants.py``. With hi and lo alone balanced rows are the fewer ones."""
        return 2 if self.parts == 2 and self.balanced else min(1, self.parts - 1)


class Plan(NamedTuple):
    """All that the kernels' shapes and arithmetic depend on beside the call itself."""

    arithmetic: Arithmetic
    forward: Launch
    query: Launch
    key: Launch


# By the least compute capability, (kernel, bytes of a product's operand) and padded head dimension, the larger of the
# key's and the value's. 64 and 128 of capability 90 were chosen by time on an H200 (benchmarks/tune.py times candidates
# like those again), the rest by the fewest register spills in the compiled kernel. The key kernel's BM divides
# the query's; for 4 bytes BM is 32 at the most (kernels/tiles.py, load_origin).
TABLE: LaunchTable = {
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


# Of Parallax (kernels/parallax.py), with the same keys and the same rules. Chosen by register spills.
PARALLAX_TABLE: LaunchTable = {
    90: {
        ("forward", 2): {64: Launch(64, 64, 4, 3), 128: Launch(128, 32, 8, 3), 256: Launch(64, 32, 4, 2)},
        ("query", 2): {64: Launch(64, 64, 4, 3), 128: Launch(128, 32, 8, 3), 256: Launch(64, 32, 4, 1)},
        ("key", 2): {64: Launch(32, 64, 4, 3), 128: Launch(32, 128, 8, 2), 256: Launch(32, 64, 4, 1)},
    },
    80: {
        ("forward", 2): {64: Launch(64, 64, 4, 3), 128: Launch(64, 32, 8, 2), 256: Launch(32, 32, 4, 1)},
        ("query", 2): {64: Launch(64, 32, 4, 3), 128: Launch(64, 32, 8, 2), 256: Launch(32, 16, 4, 1)},
        ("key", 2): {64: Launch(32, 64, 4, 3), 128: Launch(32, 64, 8, 2), 256: Launch(16, 32, 8, 1)},
        ("forward", 4): {64: Launch(32, 32, 4, 2), 128: Launch(32, 32, 4, 2), 256: Launch(16, 16, 4, 1)},
        ("query", 4): {64: Launch(32, 32, 4, 2), 128: Launch(32, 16, 4, 1), 256: Launch(16, 16, 4, 1)},
        ("key", 4): {64: Launch(32, 32, 4, 2), 128: Launch(32, 32, 8, 1), 256: Launch(16, 16, 4, 1)},
    },
}

# Entries that replace TABLE's if queries see few keys. A program has a cost of its own. Most of it is for the arrays
# that it keeps in memory between its passes over the keys; smaller tiles leave more registers for them. On an H100,
# bfloat16, D = 64, 512 keys a row: forward 0.63 ms against 0.74, query 0.88 against 1.12; equal at 1500 keys; 10 % more
# at 4096.
FEW_KEYS: dict[tuple[int, str, int, int], Launch] = {
    (90, "forward", 2, 64): Launch(64, 32, 4, 3),
    (90, "query", 2, 64): Launch(64, 32, 4, 3),
}


def entries(kernel: str, operand_bytes: int, capability: int, table: LaunchTable = TABLE) -> dict[int, Launch]:
    """By padded head dimension."""
    return newest(table, (kernel, operand_bytes), capability)


def newest(tables: Mapping[int, Mapping[_Key, _Value]], key: _Key, capability: int) -> _Value:
    """A table's entry, of the newest GPU that has one and is not newer than this one."""
    fitting = (tables[least] for least in sorted(tables, reverse=True) if least <= capability)
    return next(table[key] for table in fitting if key in table)


def plan_for(
    query: Any,
    value: Any,
    precision: lax.Precision,
    capability: int | None = None,
    few_keys: bool = False,
    table: LaunchTable = TABLE,
) -> Plan:
    """The plan for arrays of these dtypes and dimensions; ``capability`` is 90 for 9.0, None the default device's.

    ``table`` is TABLE or PARALLAX_TABLE.
    """
    arithmetic = _arithmetic(jnp.dtype(query.dtype), precision)
    capability = capability_here() if capability is None else capability
    operand_bytes = 4 if arithmetic.upcast else query.dtype.itemsize
    widest = max(64, padded(query.shape[-1]), padded(value.shape[-1]))
    launches = {name: entries(name, operand_bytes, capability, table)[widest] for name in ("forward", "query", "key")}
    if few_keys and table is TABLE:
        launches |= {
            name: launch
            for (least, name, size, dim), launch in FEW_KEYS.items()
            if (size, dim) == (operand_bytes, widest) and least <= capability
        }
    return Plan(arithmetic, **launches)


def padded(dim: int) -> int:
    """A head dimension as a tile has it: a power of two, 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


def refusal(query: Any, value: Any) -> str | None:
    """Why these kernels cannot serve this call, or None."""
    if query.dtype == jnp.float64:
        return "it does not compute in float64"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > _LARGEST_DIM:
        return f"its head dimension is at most {_LARGEST_DIM}, got {widest}"
    return None


def _arithmetic(dtype: jnp.dtype, precision: lax.Precision) -> Arithmetic:
    if dtype == jnp.bfloat16 and precision != lax.Precision.HIGHEST:
        if precision == lax.Precision.HIGH:
            return Arithmetic(False, "tf32", 3, True, 0.1, 1e-4, 0.03, 512.0, (1e-7, 1e-7), (1e-8, 1e-8), True)
        return Arithmetic(False, "tf32", 2, False, 0.3, 1e-3, 0.0, 2048.0, (1.5e-5, 7.5e-7), (6e-6, 1e-8), True)
    if precision == lax.Precision.DEFAULT:
        return Arithmetic(True, "tf32", 2, False, 0.0, 0.0, 0.0, math.inf, (1e-7, 1e-7), (1e-7, 1e-7), False)
    name, tau = ("tf32x3", 1e-12) if precision == lax.Precision.HIGH else ("ieee", 1e-13)
    return Arithmetic(True, name, 1, False, 0.0, 0.0, 0.0, math.inf, (tau, tau), (tau, tau), False)


def capability_here() -> int:
    """Of JAX's default device, 90 for 9.0; where that is no NVIDIA GPU, the least that the kernels are made for."""
    found = getattr(jax.devices()[0], "compute_capability", None)
    return max(80, round(10 * float(found))) if found else 80
