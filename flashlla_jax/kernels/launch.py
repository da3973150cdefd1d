"""The one call into jax-triton."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

from flashlla_jax.sharding import varying_like

_Constants = TypeVar("_Constants")  # a dataclass


def call(
    kernel: Any,
    grid: int,
    arrays: tuple[jax.Array, ...],
    lengths: tuple[int, int],
    out_shapes: tuple[jax.ShapeDtypeStruct, ...],
    shape: Any,
    constants: Any,
) -> tuple[jax.Array, ...]:
    """Runs a kernel whose parameters are ``arrays``, ``lengths``, the outputs, and the constants as ``c``.

    In that order jax-triton 0.3 and 0.4 agree. ``shape`` has the fields num_warps and num_stages, ``constants`` is a
    dataclass.
    """
    import jax_triton as jt

    old = tuple(map(int, jt.__version__.split(".")[:2])) < (0, 4)
    out: dict[str, Any] = {"out_shape" if old else "out_type": out_shapes}
    results = jt.triton_call(
        *arrays,
        *lengths,
        kernel=kernel,
        grid=(grid,),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        c=as_constexpr(constants),
        **out,
    )
    return varying_like(tuple(results), arrays)


def as_constexpr(constants: _Constants) -> _Constants:
    """Each of them a ``tl.constexpr``: Triton 3.6 does not convert values inside an argument."""
    import triton.language as tl

    values = {field.name: getattr(constants, field.name) for field in dataclasses.fields(constants)}  # type: ignore[arg-type]
    return type(constants)(**{name: tl.constexpr(value) for name, value in values.items()})
