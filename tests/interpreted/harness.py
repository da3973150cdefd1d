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


def _wide(x: Any) -> np.ndarray:
    """A tensor's numbers in float64; the interpreter keeps bfloat16 as its bits."""
    return (x.data.view(ml_dtypes.bfloat16) if x.dtype.scalar == tl.bfloat16 else x.data).astype(np.float64)


@contextmanager
def tensor_cores(bits: int = 26) -> Iterator[None]:
    """bfloat16, and its products summed as a GPU of Hopper's generation does, as far as its results tell.

    Sixteen products and the sum so far are cut to ``bits`` bits of the largest of them, and their sum to 24.
    """
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def get_bf16(self: Any, value: float) -> Any:
        return interpreter.TensorHandle(np.array([value], ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    def cast(self: Any, x: Any, dtype: Any) -> Any:
        source, target = x.dtype.scalar, dtype.scalar
        if (source, target) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_wide(x).astype(np.float32), target)
        if (source, target) == (tl.float32, tl.bfloat16):  # to the nearest, which the interpreter does not
            return interpreter.TensorHandle(x.data.astype(ml_dtypes.bfloat16).view(np.uint16), target)
        return original(self, x, dtype)

    def cut(x: np.ndarray, largest: np.ndarray, kept: int) -> np.ndarray:
        unit = np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1))) + 1 - kept)
        return np.trunc(x / unit) * unit

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        left, right, total = _wide(a), _wide(b), _wide(d)
        for i in range(0, left.shape[1], 16):
            terms = np.concatenate([left.T[i : i + 16, :, None] * right[i : i + 16, None, :], total[None]])
            total = cut(terms, np.abs(terms).max(0), bits).sum(0)
            total = cut(total, np.abs(total), 24)
        return interpreter.TensorHandle(total.astype(np.float32), d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "get_bf16", get_bf16, raising=False)
        patch.setattr(builder, "cast_impl", cast)
        patch.setattr(builder, "create_dot", dot)
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
