"""The arguments of the public functions: checks, the one layout, and the part that is known when a call is traced.

An error names the argument, the value that came and the values that are allowed. Python's and NumPy's values are known
and checked now. Those of traced and device arrays cannot be.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from flashlla_jax.interface import LARGEST_RIDGE, Options, ParallaxOptions, SolverOptions, accumulation_dtype
from flashlla_jax.visibility import LARGEST_POSITION, Hiding

Implementation = Literal["triton", "xla", "reference"]

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_QKV = ("query", "key", "value")
_AXES = {3: "(B, T, D)", 4: "(B, T, N, H)"}


# Arguments of other attention functions, and the remedy.
_ELSEWHERE = {
    "scale": "the factor of the logits is qk_scale",
    "bias": "nothing is added to the logits; hide keys by mask, boolean and True where a key is visible",
    "dropout_rate": "there are no weights to drop; apply dropout to the output",
}

Function = TypeVar("Function", bound=Callable[..., Any])


def explains_names_from_elsewhere(function: Function) -> Function:
    """The function, with an error that helps for an argument that other attention functions have and it lacks."""

    @functools.wraps(function)
    def explaining(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name in _ELSEWHERE:
                raise TypeError(f"{function.__name__} got an unexpected keyword argument {name!r}: {_ELSEWHERE[name]}")
        return function(*args, **kwargs)

    return cast(Function, explaining)


def check_arrays(query: Any, key: Any, value: Any) -> tuple[Array, Array, Array]:
    """The three as JAX arrays of one dtype whose shapes fit."""
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if str(x.dtype) not in _DTYPES:  # as it was given: x64 may be off, and float64 be float32 to JAX
            raise TypeError(f"{name} has dtype {x.dtype}; allowed are {', '.join(_DTYPES)}")
        if len(x.shape) not in _AXES:
            raise ValueError(
                f"{name} must have rank 3, {_AXES[3]}, or rank 4, {_AXES[4]}, got shape {x.shape}; "
                "use jax.vmap for more axes"
            )
    query, key, value = (jnp.asarray(x) for x in arrays.values())
    arrays = {"query": query, "key": key, "value": value}
    shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
    if len({x.ndim for x in arrays.values()}) > 1:
        raise ValueError(f"query, key and value must have the same rank, got {shapes}")
    if len({str(x.dtype) for x in arrays.values()}) > 1:
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in arrays.items())
        raise TypeError(f"query, key and value must have the same dtype, got {dtypes}")
    for name, x in arrays.items():
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must not be empty in its length, heads or dimension, got shape {x.shape}")

    if len({x.shape[0] for x in arrays.values()}) > 1:
        raise ValueError(f"query, key and value must have the same batch size (first axis), got {shapes}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value must have the same length (second axis), got {shapes}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"query and key must have the same head dimension (last axis), got {shapes}")
    if query.ndim == 4:
        if key.shape[2] != value.shape[2]:
            raise ValueError(f"key and value must have the same number of heads (third axis), got {shapes}")
        check_groups(query, key, shapes)
    return query, key, value


def check_groups(query: Array, key: Array, shapes: str) -> None:
    """Whether every key/value head serves as many query heads; ``shapes`` names them for the error."""
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"the key/value heads (third axis) must divide the query heads, got {key.shape[2]} for {query.shape[2]}: "
            f"{shapes}"
        )


def check_hiding(
    query: Array,
    key: Array,
    is_causal: Any,
    local_window_size: Any = None,
    query_offset: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    segment_ids: Any = None,
    mask: Any = None,
    axes: tuple[str, ...] | None = None,
) -> Hiding:
    """All that hides keys; query and key have passed ``check_arrays``.

    If mesh axes divide the length, they are this device's part of it. Lengths and offset count along the whole.
    """
    is_causal = check_flag("is_causal", is_causal)
    shards = 1 if axes is None else lax.axis_size(axes)
    return Hiding(
        is_causal=is_causal,
        window=None if local_window_size is None else check_window(local_window_size),
        query_offset=_check_offset(query_offset, query, key, is_causal, shards),
        query_lengths=_check_lengths("query_seq_lengths", query_seq_lengths, query, shards),
        key_lengths=_check_lengths("key_value_seq_lengths", key_value_seq_lengths, key, shards),
        segment_ids=None if segment_ids is None else _check_segments(segment_ids, query, key),
        same_segments=segment_ids is not None and not isinstance(segment_ids, tuple | list),
        mask=None if mask is None else _check_mask(mask, query, key, shards),
    )


def check_window(window: Any) -> tuple[int, int]:
    """``local_window_size`` as (left, right)."""
    name = "local_window_size"
    pair = window if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2 or not all(_is_index(width) for width in pair):
        raise TypeError(f"{name} must be an int or a pair (left, right) of ints, got {window!r}")
    left, right = (operator.index(width) for width in pair)
    if min(left, right) < 0:
        raise ValueError(f"{name} must be >= 0, got {window!r}")
    return left, right


def _check_offset(offset: Any, query: Array, key: Array, is_causal: bool, shards: int) -> Any:
    name = "query_offset"
    queries, keys = shards * query.shape[1], shards * key.shape[1]
    if offset is None:
        if is_causal and queries > keys:
            raise ValueError(
                f"is_causal=True needs at least as many keys as queries (they are aligned at the end), got query "
                f"{query.shape}, key {key.shape}; pass query_offset for the position of the first query, or "
                "is_causal=False for attention over all keys"
            )
        return keys - queries
    if _is_index(offset):
        offset = operator.index(offset)
        if abs(offset) > LARGEST_POSITION:
            raise ValueError(f"{name} must lie between -2**29 and 2**29, got {offset}")
        return offset
    offset = check_integers(name, offset, "an int, or an integer array")
    if offset.shape not in ((), query.shape[:1]):
        raise ValueError(f"{name} must be a scalar or have the shape (B,) = {query.shape[:1]}, got {offset.shape}")
    if isinstance(offset, np.ndarray) and offset.size and np.max(np.abs(offset.astype(float))) > LARGEST_POSITION:
        raise ValueError(f"{name} must lie between -2**29 and 2**29, got {offset.min()} to {offset.max()}")
    return jnp.asarray(offset)


def _check_lengths(name: str, lengths: Any, of: Array, shards: int) -> Array | None:
    if lengths is None:
        return None
    lengths = check_integers(name, lengths, "an integer array")
    if lengths.shape != of.shape[:1]:
        raise ValueError(f"{name} must have the shape (B,) = {of.shape[:1]}, got {lengths.shape}")
    longest = shards * of.shape[1]
    if isinstance(lengths, np.ndarray) and lengths.size and not 0 <= lengths.min() <= lengths.max() <= longest:
        raise ValueError(f"{name} must lie between 0 and the length {longest}, got {lengths.min()} to {lengths.max()}")
    return jnp.asarray(lengths)


def _check_segments(segment_ids: Any, query: Array, key: Array) -> tuple[Array, Array]:
    name = "segment_ids"
    shapes = query.shape[:2], key.shape[:2]
    if not isinstance(segment_ids, tuple | list):
        ids = check_integers(name, segment_ids, "an integer array or a pair of them")
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"one {name} for queries and keys needs as many of one as of the other, got query {query.shape}, key "
                f"{key.shape}; pass a pair (query (B, T), key (B, S))"
            )
        if ids.shape != shapes[0]:
            raise ValueError(f"{name} must have the shape (B, S) = {shapes[0]}, got {ids.shape}")
        return jnp.asarray(ids), jnp.asarray(ids)
    if len(segment_ids) != 2:
        raise ValueError(f"{name} must be one array or a pair (query, key), got {len(segment_ids)} of them")
    pair = tuple(check_integers(name, ids, "an integer array or a pair of them") for ids in segment_ids)
    if pair[0].shape != shapes[0] or pair[1].shape != shapes[1]:
        raise ValueError(
            f"{name} must have the shapes (B, T) = {shapes[0]} and (B, S) = {shapes[1]}, got {pair[0].shape} and "
            f"{pair[1].shape}"
        )
    query_ids, key_ids = (jnp.asarray(ids) for ids in pair)
    if query_ids.dtype != key_ids.dtype:
        raise TypeError(f"{name} must have one dtype, got {query_ids.dtype} and {key_ids.dtype}")
    return query_ids, key_ids


def _check_mask(mask: Any, query: Array, key: Array, shards: int) -> Array:
    batch, length, key_length = *query.shape[:2], shards * key.shape[1]
    if shards > 1 and np.shape(mask)[-2:] == (1, key.shape[1]):  # divided as the keys are
        key_length = key.shape[1]
    if query.ndim == 3:
        return check_mask(mask, {"(B, T, S)": (batch, length, key_length)})
    return check_mask(mask, {"(B, N, T, S)": (batch, query.shape[2], length, key_length)})


def check_mask(mask: Any, allowed: dict[str, tuple[int, ...]]) -> Array:
    """A mask of one of the shapes allowed, by their axes' names and with 1 in place of any, as ``(#B, #N, #T, #S)``."""
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        raise TypeError(f"mask must be a boolean array, got {type(mask).__name__}")
    if mask.dtype != np.bool_:
        raise TypeError(
            f"mask must be boolean, True where a key is visible, got dtype {mask.dtype}. For a mask that is added to "
            "the logits, with 0 where a key is visible, pass mask == 0"
        )
    full = next((shape for shape in allowed.values() if len(shape) == len(mask.shape)), None)
    if full is None or any(n not in (1, m) for n, m in zip(mask.shape, full, strict=True)):
        shapes = " or ".join(f"{axes} = {shape}" for axes, shape in allowed.items())
        raise ValueError(f"mask must have the shape {shapes}, or 1 in place of any, got {mask.shape}")
    mask = jnp.asarray(mask)
    return mask if mask.ndim == 4 else mask[:, None]


def check_axis_name(name: Any, query: Array, key: Array, value: Array) -> tuple[str, ...] | None:
    """``axis_name`` as a tuple: axes of the ``jax.shard_map`` around the call, over which the arrays are divided."""
    if name is None:
        return None
    names = name if isinstance(name, tuple) else (name,)
    if not names or not all(isinstance(axis, str) for axis in names):
        raise TypeError(f"axis_name must be None, the name of a mesh axis or a tuple of them, got {name!r}")
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if len(set(names)) < len(names) or not set(names) <= set(manual):
        around = (
            f"those of the jax.shard_map around the call: {', '.join(map(repr, manual))}" if manual else "none here"
        )
        raise ValueError(
            f"axis_name must name different mesh axes out of {around}; got {name!r}. Outside of jax.shard_map leave it "
            "out: the arrays' shardings say how they are divided"
        )
    varying = {of: jax.typeof(x).manual_axis_type.varying for of, x in zip(_QKV, (query, key, value), strict=True)}
    for of, axes in varying.items():
        if any(varying.values()) and not set(names) <= axes:
            raise ValueError(
                f"axis_name={name!r} says that the length is divided over it, but {of} is the same on all of its "
                f"devices. Divide {of} too (in_specs), or leave axis_name out and give query_offset"
            )
    return names


def check_integers(name: str, value: Any, allowed: str) -> Any:
    """An integer array of any kind, as it is."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got dtype {value.dtype}")
    return value


def check_ridge(ridge_lambda: Any, query: Array) -> Array:
    """The ridge in the accumulation dtype, broadcast to one number per query and head."""
    dtype = accumulation_dtype(query.dtype)
    number = _is_number(ridge_lambda)
    if not number and not (hasattr(ridge_lambda, "shape") and hasattr(ridge_lambda, "dtype")):
        raise TypeError(f"ridge_lambda must be a real number or an array, got {type(ridge_lambda).__name__}")
    if not number and str(ridge_lambda.dtype) not in _DTYPES and not jnp.issubdtype(ridge_lambda.dtype, jnp.integer):
        raise TypeError(f"ridge_lambda must be real, {', '.join(_DTYPES)} or integer, got dtype {ridge_lambda.dtype}")
    # a known value is checked now, in the dtype of its use: there a tiny number may be 0
    if number:
        ridge_lambda = _as_float("ridge_lambda", ridge_lambda)
    known = None
    if number or isinstance(ridge_lambda, np.ndarray | np.generic):
        with np.errstate(over="ignore"):  # beyond float32's range is infinite: softmax attention
            known = np.asarray(ridge_lambda).astype(dtype)
    if known is not None and not np.all(known > 0):
        what = "an array whose minimum is " if known.ndim else ""
        given: Any = np.asarray(ridge_lambda)
        raise ValueError(f"ridge_lambda must be > 0 (in {dtype.name}), got {what}{given.min()}")
    if known is not None:
        known = np.minimum(known, dtype.type(LARGEST_RIDGE))  # finite, for jax_debug_infs
    target = query.shape[:-1]
    axes = "(B, T)" if query.ndim == 3 else "(B, T, N)"
    shape = np.shape(ridge_lambda)
    try:
        broadcast = jnp.broadcast_shapes(shape, target)  # knows symbolic sizes (jax.export)
    except ValueError:
        broadcast = None
    if broadcast != target:
        raise ValueError(
            f"ridge_lambda of shape {shape} does not broadcast to {axes} = {target}"
            + (f"; a ridge per token has shape {(*shape, 1)}" if shape == target[:2] and query.ndim == 4 else "")
        )
    return jnp.broadcast_to(jnp.asarray(ridge_lambda if known is None else known).astype(dtype), target)


def check_options(
    query: Array,
    qk_scale: Any,
    delta_eps: Any,
    cg_atol: Any,
    cg_rtol: Any,
    cg_max_iters: Any,
    cg_use_preconditioner: Any,
    precision: Any,
) -> Options:
    """The options of a call, with the defaults that depend on the query."""
    solver = SolverOptions(
        atol=None if cg_atol is None else check_number("cg_atol", cg_atol),
        rtol=None if cg_rtol is None else max(check_number("cg_rtol", cg_rtol), _least_rtol(query)),
        max_iters=_default_max_iters(query) if cg_max_iters is None else check_count("cg_max_iters", cg_max_iters),
        use_preconditioner=check_flag("cg_use_preconditioner", cg_use_preconditioner),
    )
    return Options(
        qk_scale=check_scale(qk_scale, query),
        delta_eps=check_number("delta_eps", delta_eps),
        solver=solver,
        precision=check_precision(precision),
    )


def check_probe(probe: Any, query: Array) -> Array:
    """The probe as a JAX array, shaped as the query and in its dtype."""
    if not hasattr(probe, "shape") or not hasattr(probe, "dtype"):
        raise TypeError(f"probe must be an array, got {type(probe).__name__}")
    if tuple(probe.shape) != query.shape:
        raise ValueError(f"probe must have the query's shape, {query.shape}, got {tuple(probe.shape)}")
    if str(probe.dtype) not in _DTYPES:  # as it was given, as in check_arrays
        raise TypeError(f"probe has dtype {probe.dtype}; allowed are {', '.join(_DTYPES)}")
    probe = jnp.asarray(probe)
    if probe.dtype != query.dtype:
        raise TypeError(f"probe must have the query's dtype, {query.dtype}, got {probe.dtype}")
    return probe


def check_parallax_options(query: Array, qk_scale: Any, precision: Any) -> ParallaxOptions:
    """The options of a call of Parallax, with the defaults that depend on the query."""
    return ParallaxOptions(check_scale(qk_scale, query), check_precision(precision))


def check_scale(qk_scale: Any, query: Array) -> float:
    """``qk_scale``, or its default."""
    return query.shape[-1] ** -0.5 if qk_scale is None else check_number("qk_scale", qk_scale, -math.inf)


def _default_max_iters(query: Array) -> int:
    """In exact arithmetic D steps are enough. Rounding costs more: up to 3 D were seen in float64, more than 2 D in
    bfloat16 (peaky keys, ridge 0.01)."""
    return max(32, 4 * query.shape[-1])


def _least_rtol(query: Array) -> float:
    """|r| = eps^2 |r0|: x got its last digit long before, and further steps would follow rounding errors."""
    return float(jnp.finfo(accumulation_dtype(query.dtype)).eps) ** 4


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _as_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float") from None


def check_number(name: str, value: Any, minimum: float = 0.0) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} must be a Python number, known at trace time, got {type(value).__name__}")
    value = _as_float(name, value)
    if not (math.isfinite(value) and value >= minimum):
        allowed = "finite" if minimum == -math.inf else f"finite and >= {minimum:g}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return value


def check_count(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or None, got {value!r}")
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {count}")
    if count >= 2**31:  # steps are counted in int32
        raise ValueError(f"{name} must be < 2**31, got {count}")
    return count


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_precision(precision: Any) -> lax.Precision:
    source = "precision"
    if precision is None:
        source = "jax_default_matmul_precision"
        precision = getattr(jax.config, source)
        if precision is None:
            return lax.Precision.DEFAULT
    try:
        if isinstance(precision, tuple):  # of the two operands
            return max((_named_precision(p) for p in precision), key=lambda p: p.value)
        return _named_precision(precision)
    except (ValueError, TypeError):
        names = ", ".join(repr(p.name.lower()) for p in lax.Precision)
        raise ValueError(
            f"{source} must be None, a jax.lax.Precision or one of {names}, a pair of these or a "
            f"jax.lax.DotAlgorithmPreset, got {precision!r}"
        ) from None


def _named_precision(name: Any) -> lax.Precision:
    """Of a ``jax.lax.Precision``, its name or alias, or the one that a ``jax.lax.DotAlgorithmPreset`` comes nearest."""
    if isinstance(name, str) and name in lax.DotAlgorithmPreset.__members__:
        name = lax.DotAlgorithmPreset[name]
    if not isinstance(name, lax.DotAlgorithmPreset):
        return lax.Precision(name)
    if name.name.endswith(("_X6", "_X9")) or name.name in ("F32_F32_F32", "F64_F64_F64"):
        return lax.Precision.HIGHEST
    return lax.Precision.HIGH if name.name.endswith("_X3") else lax.Precision.DEFAULT


def check_implementation(name: Any) -> None:
    if name is not None and name not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation must be one of {allowed} or None, got {name!r}")
