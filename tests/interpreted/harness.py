"""Runs the kernels in Triton's interpreter on the CPU, behind the same ``launch.call`` that jax-triton serves on a GPU.

TRITON_INTERPRET=1 must be set before Triton is imported, and such a process can do nothing else with Triton. So these
tests have a command of their own: TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from flashlla_jax.kernels.constants import Constants
from flashlla_jax.kernels.plan import Launch

_NAMES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32, "int32": tl.int32, "int8": tl.int8}
_LOCK = threading.Lock()  # the interpreter keeps its state in globals


class _NpTensor:
    """What the interpreter asks of a tensor, over a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = _NAMES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _NpTensor:
        return self

    def cpu(self) -> _NpTensor:
        return self

    def copy_(self, other: _NpTensor) -> None:
        """The device copy is the host's own memory."""

    def new_empty(self, *_: Any, **__: Any) -> _NpTensor:
        return _NpTensor.__new__(_NpTensor)

    def set_(self, storage: _NpTensor, *_: Any) -> None:
        self.array, self.dtype = storage.array, storage.dtype

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)


def _guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of ``array`` between two pages of NaN (or of -1), and the whole buffer."""
    guard = 4096
    fill = np.nan if array.dtype.name in ("float16", "bfloat16", "float32") else -1
    buffer = np.full(array.size + 2 * guard, fill, array.dtype)
    inner = buffer[guard : guard + array.size].reshape(array.shape)
    inner[...] = array
    return inner, buffer


class _Kept:
    def restore(self) -> None:
        """Not before the kernel has ended."""


@contextmanager
def _patched_once() -> Iterator[None]:
    """The interpreter patches Triton's language, as a module has it, anew for every call: that is half of its time."""
    patch = interpreter._patch_lang
    scopes: dict[int, Any] = {}

    def once(fn: Any) -> _Kept:
        if id(fn.__globals__) not in scopes:
            scopes[id(fn.__globals__)] = patch(fn)
        return _Kept()

    interpreter._patch_lang = once
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        for scope in reversed(scopes.values()):
            scope.restore()


@contextmanager
def products_in_order() -> Iterator[None]:
    """float32 products summed feature by feature, each sum rounded once, as the GPU's fused multiply-adds are.

    Then K Q^T has the bits of Q K^T, and so the key kernel those of the others, which BLAS does not promise.
    """
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32:
            return original(self, a, b, d, *options)
        left, right = (x.data.astype(np.float64) for x in (a, b))
        total = d.data
        for i in range(left.shape[1]):
            total = (left[:, i, None] * right[None, i] + total).astype(np.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


def call(
    kernel: Any,
    grid: int,
    arrays: tuple[jax.Array, ...],
    lengths: tuple[int, int],
    out_shapes: tuple[jax.ShapeDtypeStruct, ...],
    shape: Launch,
    constants: Constants,
) -> tuple[jax.Array, ...]:
    """Stands in for ``flashlla_jax.kernels.launch.call``; what lies around the arrays is poisoned with NaN."""

    def host(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        with _LOCK, _patched_once():
            ins = [_guarded(np.asarray(x))[0] for x in inputs]
            poison = [np.full(o.shape, -1 if o.dtype == np.int32 else np.nan, o.dtype) for o in out_shapes]
            guarded = [_guarded(x) for x in poison]
            kernel[(grid,)](
                *map(_NpTensor, ins),
                *lengths,
                *(_NpTensor(inner) for inner, _ in guarded),
                c=constants,
            )
            for inner, buffer in guarded:
                around = np.concatenate([buffer[:4096], buffer[4096 + inner.size :]]).astype(np.float64)
                assert np.all(np.isnan(around) | (around == -1)), "the kernel wrote outside of an output"
            return tuple(inner for inner, _ in guarded)

    return tuple(jax.pure_callback(host, out_shapes, *arrays, vmap_method="sequential"))


assert ml_dtypes  # registers bfloat16 with NumPy
