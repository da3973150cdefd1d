"""The operator: two primitives, a forward and a backward pass, which ``jax.custom_vjp`` pairs.

The type of the options says whether it is Local Linear Attention or Parallax.

A program that is traced once may be lowered for any platform. Each primitive is lowered to the Triton kernels for CUDA
and to blockwise XLA for every other platform, unless the call names an implementation. The kernels' side is traced when
the primitive is bound, and its jaxpr is a parameter of the primitive. It tells JAX the types of the results, and the
rule by which XLA may divide the call among devices.

If a call may be lowered for either platform, it keeps for the backward pass the arrays that the kernels keep. The XLA
path fills them with zeros and runs the forward pass again. A program that was traced beside a GPU seldom takes it.

Under ``jax.vmap`` a new axis is folded into the batch. If the length is divided among devices, the function behind the
primitive gathers the keys and scatters their gradients (context_parallel.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, xla
from jaxtyping import Array

from flashlla_jax import blockwise, blockwise_parallax
from flashlla_jax.context_parallel import Axes, over_length
from flashlla_jax.interface import Options, ParallaxOptions, ParallaxResiduals, Residuals, usable_ridge
from flashlla_jax.kernels import parallax_passes, passes
from flashlla_jax.kernels.ahead import compile_side_by_side
from flashlla_jax.kernels.plan import PARALLAX_TABLE, TABLE, plan_for
from flashlla_jax.sharding import divisible, varying_like
from flashlla_jax.visibility import Visibility, seeing_queries, without_hidden

# A jaxpr without free variables: ClosedJaxpr until JAX 0.11, Jaxpr since.
Closed = Any


@dataclass(frozen=True)
class _Call:
    """The static side of a call.

    Attributes:
        only: the implementation on every platform, or None for the one that fits the platform.
        plan: launch shapes and arithmetic of the kernels; None if they are not asked for.
        axes: the mesh axes over which the length is divided inside of ``jax.shard_map``, or None.
    """

    options: Options | ParallaxOptions
    only: Literal["triton", "xla"] | None
    plan: Any
    axes: Axes | None

    @property
    def kernels(self) -> Any:
        """The module that computes the method by Triton."""
        return parallax_passes if isinstance(self.options, ParallaxOptions) else passes

    @property
    def blockwise(self) -> Any:
        """The module that computes the method by XLA."""
        return blockwise_parallax if isinstance(self.options, ParallaxOptions) else blockwise


def attend(
    query: Array,
    key: Array,
    value: Array,
    own: Array,
    visibility: Visibility,
    options: Options | ParallaxOptions,
    *,
    only: Literal["triton", "xla"] | None = None,
    plan: Any = None,
    axes: Axes | None = None,
) -> tuple[Array, Residuals | ParallaxResiduals]:
    """Local Linear Attention or Parallax of the canonical call (interface.py). Its exact gradient can be taken once.

    Args:
        query: ``(B, T, N, D)``.
        key: ``(B, S, K, D)``.
        value: ``(B, S, K, Dv)``.
        own: the ridge, ``(B, T, N)``, in the accumulation dtype, or the probe, ``(B, T, N, D)``.
        visibility: which keys each query sees.
        options: the static options, whose type says which method it is.
        only: an implementation for every platform; None for Triton on CUDA and XLA elsewhere.
        plan: the launch of the kernels, from ``kernels.plan.plan_for``; None for the plan that fits this machine.
        axes: inside of ``jax.shard_map``, the mesh axes over which T and S are divided. ``visibility`` then says
            which of all keys this device's queries see.
    """
    if only == "xla":
        plan = None
    elif plan is None:
        table = PARALLAX_TABLE if isinstance(options, ParallaxOptions) else TABLE
        plan = plan_for(query, value, options.precision, few_keys=visibility.few_keys, table=table)
    given = (query, key, value, own, visibility)
    return _attend(*varying_like(given, given), _Call(options, only, plan, axes))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query: Array, key: Array, value: Array, own: Array, seen: Visibility, call: _Call) -> Any:
    return _attend_fwd(query, key, value, own, seen, call, differentiated=False)[0]


def _attend_fwd(
    query: Array, key: Array, value: Array, own: Array, seen: Visibility, call: _Call, differentiated: bool = True
) -> tuple[Any, Any]:
    if isinstance(call.options, Options):
        own = usable_ridge(own)
    o, saved, residuals = _bind(_forward_p, call, (query, key, value, own, seen), differentiated)
    return (o, residuals), (query, key, value, own, seen, saved)


def _attend_bwd(call: _Call, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    g, _ = cotangents
    return *_bind(_backward_p, call, (*kept, g)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


# The function behind a primitive takes its arrays. There is one for each static call, so JAX traces it once for each
# shape.


@cache
def _kernels(primitive: Primitive, call: _Call) -> Any:
    """The Triton side."""
    return jax.jit(_divided(partial(_run_kernels, backward=primitive is _backward_p, call=call), primitive, call))


@cache
def _blockwise(primitive: Primitive, call: _Call) -> Any:
    """The XLA side."""
    return jax.jit(_divided(_run_blockwise(primitive, call), primitive, call))


def _divided(run: Callable[..., Any], primitive: Primitive, call: _Call) -> Callable[..., Any]:
    """``run`` on the arrays of a call, or on one device's part of them."""
    backward = primitive is _backward_p
    lengthwise = partial(over_length, run, backward=backward)
    placed = divisible(run, lengthwise, (1, 2) if backward else ()) if call.axes is None else lengthwise(call.axes)
    return lambda *given: varying_like(placed(*given), given)


def _run_kernels(*given: Any, backward: bool, call: _Call) -> Any:
    run: Any = call.kernels.backward if backward else call.kernels.forward
    return run(*_shown(*given), call.options, call.plan)


def _run_blockwise(primitive: Primitive, call: _Call) -> Callable[..., Any]:
    return partial(_blockwise_backward if primitive is _backward_p else _blockwise_forward, call=call)


def _blockwise_forward(*given: Any, call: _Call) -> Any:
    run: Any = call.blockwise.forward
    o, saved, residuals = run(*_shown(*given), call.options)
    if call.only is None:
        _, types, _ = jax.eval_shape(partial(_run_kernels, backward=False, call=call), *given)
        saved = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    return varying_like((o, saved, residuals), given)


def _blockwise_backward(*given: Any, call: _Call) -> Any:
    *inputs, saved, g = _shown(*given)
    forward: Any = call.blockwise.forward
    backward: Any = call.blockwise.backward
    if call.only is None:
        _, saved, _ = forward(*inputs, call.options)
    return varying_like(backward(*inputs, saved, g, call.options), given)


def _shown(query: Array, key: Array, value: Array, own: Array, seen: Visibility, *rest: Any) -> tuple[Any, ...]:
    """The arguments of a pass, without hidden values that could do harm: NaN times a weight of 0 is NaN."""
    if seen.complete:
        return query, key, value, own, seen, *rest
    sees = seeing_queries(seen, key.shape[1])
    query, key, value = without_hidden(query, key, value, seen)
    if rest:
        saved, g = rest
        rest = saved, jnp.where(sees[..., None], g, 0)
    own = jnp.where(sees, own, 1) if own.ndim == 3 else jnp.where(sees[..., None], own, 0)
    return query, key, value, own, seen, *rest


def _bind(primitive: Primitive, call: _Call, given: tuple[Any, ...], differentiated: bool = False) -> Any:
    """``differentiated``: whether the backward pass follows this forward pass."""
    flat, tree = jax.tree.flatten(given)
    side = _blockwise if call.only == "xla" else _kernels
    traced = side(primitive, call).trace(*given)
    follows = None
    if differentiated and side is _kernels:
        o, saved, _ = traced.out_info
        follows = side(_backward_p, call).trace(*given, saved, o).jaxpr  # the cotangent is like o
    out = primitive.bind(*flat, call=call, tree=tree, jaxpr=traced.jaxpr, follows=follows)
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), out)


# The rules are the same for both primitives. Their parameters: the call, the structure of the arguments, the jaxpr of
# the named implementation (of the kernels if none is named), and that of the backward pass if it follows.


def _on_cuda(ctx: Any, *flat: Any, jaxpr: Closed, follows: Closed | None, **_: Any) -> Any:
    compile_side_by_side(*filter(None, (jaxpr, follows)))
    return _lowering(jaxpr_as_fun(jaxpr))(ctx, *flat)


def _elsewhere(primitive: Primitive, *flat: Any, call: _Call, tree: Any, jaxpr: Closed, follows: Closed | None) -> Any:
    if call.only is not None:
        return jaxpr_as_fun(jaxpr)(*flat)
    return jax.tree.leaves(_blockwise(primitive, call)(*tree.unflatten(flat)))


def _batched(
    primitive: Primitive,
    flat: Any,
    axes: Any,
    *,
    call: _Call,
    tree: Any,
    jaxpr: Closed,
    follows: Closed | None,
) -> tuple[Any, Any]:
    del jaxpr  # its shapes differ
    size = next(x.shape[axis] for x, axis in zip(flat, axes, strict=True) if axis is not None)
    flat = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(flat, axes, strict=True)]
    mapped = [axis is not None for axis in axes]
    batch = flat[0].shape[1 if mapped[0] else 0]

    fold = partial(folded, size, batch)

    def fold_all(arrays: Any, is_mapped: Any) -> Any:
        """For a visibility: arrays that serve the whole batch still do, unless one of them is mapped."""
        of_one = all(x.shape[0] == 1 for x in jax.tree.leaves(arrays)) and not any(jax.tree.leaves(is_mapped))
        return arrays if of_one else jax.tree.map(fold, arrays, is_mapped)

    def fold_argument(x: Any, is_mapped: Any) -> Any:
        if not isinstance(x, Visibility):
            return jax.tree.map(fold, x, is_mapped)
        names = ("start", "end", "query_ids", "key_ids", "contiguous")
        folds = fold_all(*({name: getattr(side, name) for name in names} for side in (x, is_mapped)))
        return dataclasses.replace(x, **folds, mask=fold_all(x.mask, is_mapped.mask))

    given = [fold_argument(*pair) for pair in zip(tree.unflatten(flat), tree.unflatten(mapped), strict=True)]
    out = jax.tree.leaves(_bind(primitive, call, tuple(given), follows is not None))
    return [x.reshape(size, batch, *x.shape[1:]) for x in out], [0] * len(out)


def folded(size: int, batch: int, x: Array, is_mapped: bool) -> Array:
    """Folds the new first axis, of ``size``, into the batch behind it. A batch of 1 stands for all."""
    x = x if is_mapped else x[None]
    x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
    return x.reshape(size * batch, *x.shape[2:])


_SECOND_DERIVATIVE = (
    "the gradient of lla_attention, or of parallax_attention, can be differentiated again in forward mode (jax.jvp of "
    "jax.grad, jax.jacfwd) with implementation='xla', and in any mode with implementation='reference', which is dense "
    "and for small problems"
)


def _refuse_derivative(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(_SECOND_DERIVATIVE)


def _derivative(
    primitive: Primitive, primals: Any, tangents: Any, *, call: _Call, tree: Any, jaxpr: Closed, follows: None
) -> tuple[Any, Any]:
    """The derivative in forward mode, for XLA only: of a gradient it gives Hessian-vector products."""
    if call.only != "xla":
        _refuse_derivative()
    out = primitive.bind(*primals, call=call, tree=tree, jaxpr=jaxpr, follows=follows)
    moving = tuple(i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    given = (*primals, *(tangents[i] for i in moving))
    pushed = iter(_tangent_p.bind(*given, of=primitive, call=call, tree=tree, jaxpr=jaxpr, moving=moving))
    return out, [next(pushed) if _is_float(x) else ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _push(*flat: Array, of: Primitive, call: _Call, tree: Any, jaxpr: Closed, moving: tuple[int, ...]) -> list[Array]:
    """The tangents of the floating results. ``flat`` has the primals, then the tangents of those that move.

    It does not differentiate the jaxpr itself: a call that XLA is told to divide cannot be differentiated.
    """
    count = len(jaxpr.in_avals)
    primals, tangents = flat[:count], flat[count:]
    plain = _run_blockwise(of, call)
    if call.axes is not None:
        plain = over_length(plain, call.axes, backward=of is _backward_p)

    def run(*moved: Array) -> list[Array]:
        given = list(primals)
        for i, x in zip(moving, moved, strict=True):
            given[i] = x
        return [x for x in jax.tree.leaves(plain(*tree.unflatten(given))) if _is_float(x)]

    return jax.jvp(run, tuple(primals[i] for i in moving), tangents)[1]


def _tangent_primitive() -> Primitive:
    """``_push`` as a primitive. Its error says that it cannot be transposed: XLA's loops do not run backwards."""
    made = _named("lla_tangent")
    made.def_abstract_eval(lambda *_, jaxpr, **__: [x for x in jaxpr.out_avals if _is_float(x)])
    mlir.register_lowering(made, _lowering(_push))
    ad.primitive_transposes[made] = _refuse_derivative
    ad.primitive_jvps[made] = _refuse_derivative

    def batched(flat: Any, axes: Any, **parameters: Any) -> tuple[Any, Any]:
        out = jax.vmap(partial(_push, **parameters), in_axes=tuple(axes))(*flat)
        return out, [0] * len(out)

    batching.primitive_batchers[made] = batched
    return made


def _named(name: str) -> Primitive:
    """A primitive of several results, whose eager call is compiled once."""
    made = Primitive(name)
    made.multiple_results = True
    made.def_impl(partial(xla.apply_primitive, made))
    return made


def _primitive(name: str) -> Primitive:
    made = _named(name)
    made.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
    mlir.register_lowering(made, _on_cuda, platform="cuda")
    mlir.register_lowering(made, _lowering(partial(_elsewhere, made)))
    batching.primitive_batchers[made] = partial(_batched, made)
    ad.primitive_jvps[made] = partial(_derivative, made)
    return made


def _lowering(run: Callable[..., Any]) -> Any:
    return mlir.lower_fun(run, multiple_results=True)


_tangent_p = _tangent_primitive()
_forward_p = _primitive("lla_forward")
_backward_p = _primitive("lla_backward")
