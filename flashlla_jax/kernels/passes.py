"""Stand-in for the kernels' passes, with their interface, by the blockwise path."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from flashlla_jax import blockwise
from flashlla_jax.interface import Options
from flashlla_jax.visibility import Visibility

_LARGEST_DIM = 256


class Saved(NamedTuple):
    """What the backward pass needs beside the inputs."""

    top: Array
    kbar: Array
    x: Array
    damping: Array


class Plan(NamedTuple):
    """Launch shapes and arithmetic."""

    capability: int


def forward(query: Array, key: Array, value: Array, lam: Array, seen: Visibility, options: Options, plan: Plan) -> Any:
    o, saved, residuals = blockwise.forward(query, key, value, lam, seen, options)
    return o, Saved(*saved), residuals


def backward(
    query: Array,
    key: Array,
    value: Array,
    lam: Array,
    seen: Visibility,
    saved: Saved,
    g: Array,
    options: Options,
    plan: Plan,
) -> tuple[Array, Array, Array, Array]:
    return blockwise.backward(query, key, value, lam, seen, blockwise.Saved(*saved), g, options)


def plan_for(query: Any, value: Any, precision: Any, capability: int | None = None) -> Plan:
    return Plan(capability or 80)


def refusal(query: Array, value: Array) -> str | None:
    """Why these kernels cannot serve this call, or None."""
    if query.dtype == jnp.float64:
        return "it does not compute in float64"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > _LARGEST_DIM:
        return f"its head dimension is at most {_LARGEST_DIM}, got {widest}"
    return None
