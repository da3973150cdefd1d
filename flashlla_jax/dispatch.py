"""``implementation=None`` where there is a GPU: Triton where the program runs on CUDA, XLA elsewhere.

The choice is made when the program is lowered (``jax.lax.platform_dependent``), so that one traced, lowered or exported
program serves both. What is kept for the backward pass is what Triton keeps. Elsewhere, which is the exception for a
program that was traced beside a GPU, it is left empty and the backward pass runs the forward pass again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from flashlla_jax import blockwise
from flashlla_jax.interface import Options, differentiable
from flashlla_jax.kernels import attention as triton
from flashlla_jax.sharding import varying_like

# A program that is lowered for several platforms at once has every branch lowered for each of them. This holds a branch
# that only CUDA can lower; on other platforms, where it is never taken, zeros stand for it.
_on_cuda_p = Primitive("lla_on_cuda")
_on_cuda_p.multiple_results = True


def _lowered(run: Callable[..., Any]) -> Callable[..., Any]:
    return mlir.lower_fun(run, multiple_results=True)


def _run(*args: Array, jaxpr: ClosedJaxpr) -> Any:
    return jaxpr_as_fun(jaxpr)(*args)


def _stand_in(*_: Array, jaxpr: ClosedJaxpr) -> Any:
    outputs: list[Any] = list(jaxpr.out_avals)
    return [jnp.zeros(x.shape, x.dtype) for x in outputs]


def _batched(args: Any, axes: Any, *, jaxpr: ClosedJaxpr) -> Any:
    mapped = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes)))(*args)
    return _on_cuda_p.bind(*args, jaxpr=mapped), [0] * len(mapped.out_avals)


def _refuse_derivative(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "the gradient by Triton kernels cannot be differentiated again: use lla_attention(..., implementation='xla')"
    )


_on_cuda_p.def_impl(_run)
_on_cuda_p.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals)
mlir.register_lowering(_on_cuda_p, _lowered(_run), platform="cuda")
mlir.register_lowering(_on_cuda_p, _lowered(_stand_in))
batching.primitive_batchers[_on_cuda_p] = _batched
ad.primitive_jvps[_on_cuda_p] = _refuse_derivative


def _on_cuda(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        flat, tree = jax.tree.flatten(args)
        jaxpr, out = jax.make_jaxpr(lambda *flat: f(*tree.unflatten(flat)), return_shape=True)(*flat)
        return jax.tree.unflatten(jax.tree.structure(out), _on_cuda_p.bind(*flat, jaxpr=jaxpr))

    return run


def forward(query: Array, key: Array, value: Array, ridge_lambda: Array, options: Options) -> tuple[Any, Any]:
    """``((o, residuals), saved)``, saved being Triton's."""
    inputs = (query, key, value, ridge_lambda)

    def elsewhere(*inputs: Array) -> tuple[Any, Any]:
        out, _ = blockwise.forward(*inputs, options=options)
        _, saved = jax.eval_shape(partial(triton.forward, options=options), *inputs)
        return out, varying_like(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), saved), inputs)

    on_cuda = _on_cuda(partial(triton.forward, options=options))
    return lax.platform_dependent(*inputs, cuda=on_cuda, default=elsewhere)


def backward(
    query: Array, key: Array, value: Array, ridge_lambda: Array, saved: Any, g: Array, options: Options
) -> tuple[Array, Array, Array, Array]:
    """``(dquery, dkey, dvalue, dridge_lambda)`` for the cotangent g of the output."""
    inputs = (query, key, value, ridge_lambda)

    @_on_cuda
    def on_cuda(inputs: tuple[Array, Array, Array, Array], saved: Any, g: Array) -> tuple[Array, ...]:
        return triton.backward(*inputs, saved, g, options)

    def elsewhere(inputs: tuple[Array, Array, Array, Array], _: Any, g: Array) -> tuple[Array, ...]:
        _, saved = blockwise.forward(*inputs, options=options)
        return blockwise.backward(*inputs, saved, g, options)

    return lax.platform_dependent(inputs, saved, g, cuda=on_cuda, default=elsewhere)


# Local Linear Attention by the implementation that fits the platform which the program is lowered for.
attention = differentiable(forward, backward)
