"""Where the arrays of a training run lie: a mesh with four named axes, one small table, and the processes of a run.

``data`` divides the batch; ``fsdp`` the batch and, besides, parameters and optimizer state; ``context`` the length of
every sequence; ``tensor`` heads and the MLP's width. XLA does the rest: it divides what is computed as what goes in.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .runs import RunError

AXES = ("data", "fsdp", "context", "tensor")

# Of parameters, by the end of their path; the optimizer's moments lie as they do, all else whole on every device.
PLACES: dict[tuple[Any, ...], P] = {
    ("query", "kernel"): P("fsdp", "tensor"),  # (features, heads, head features)
    ("probe", "kernel"): P("fsdp", "tensor"),
    ("key", "kernel"): P("fsdp", "tensor"),
    ("value", "kernel"): P("fsdp", "tensor"),
    ("out", "kernel"): P("tensor", None, "fsdp"),  # (heads, head features, features)
    ("attention", "raw_ridge"): P("tensor"),  # (heads,)
    ("up", "kernel"): P("fsdp", "tensor"),  # (features, 4 features)
    ("down", "kernel"): P("tensor", "fsdp"),
    ("embed", "embedding"): P(None, "fsdp"),  # (bytes, features)
    ("head", "kernel"): P("fsdp"),  # (features, bytes)
}

# A process that has said nothing for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 20


@dataclass(frozen=True)
class Placement:
    """A mesh, and how a run's arrays lie on it."""

    mesh: Mesh

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def tokens(self) -> NamedSharding:
        """Of ``(batch, context)``."""
        return NamedSharding(self.mesh, P(("data", "fsdp"), "context"))

    def of(self, tree: Any) -> Any:
        """Of parameters, or of an optimizer's state."""

        def place(path: Any, x: Any) -> NamedSharding:
            name = tuple(getattr(key, "key", None) for key in path[-2:])
            return NamedSharding(self.mesh, PLACES.get(name, P()))

        return jax.tree.map_with_path(place, tree)

    def placed(self, types: Any) -> Any:
        """Shapes and dtypes, and where they lie."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), types, self.of(types))


def mesh_sizes(text: str) -> dict[str, int]:
    """An argparse type: ``data=2,context=2`` as a size for every axis."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"must be like data=2 or data=2,context=2, of {', '.join(AXES)} with sizes >= 1; got {part!r}"
            )
        sizes[name] = int(size)
    return sizes


def place(sizes: Mapping[str, int]) -> Placement:
    """On the first devices that there are; with several processes, on all of them."""
    count, devices = math.prod(sizes.values()), jax.devices()
    if count > len(devices) or (jax.process_count() > 1 and count != len(devices)):
        given = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one device"
        raise RunError(f"argument --mesh: {given} takes {count} devices, and there are {len(devices)}")
    shape, kinds = tuple(sizes[axis] for axis in AXES), (AxisType.Auto,) * len(AXES)
    return Placement(jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices[:count]))


def check_sizes(mesh: Mapping[str, int], sizes: Mapping[str, Any]) -> None:
    """Refuses a model that does not divide evenly; ``sizes`` are its flags."""
    rows = mesh["data"] * mesh["fsdp"]
    together = math.gcd(sizes["eval_windows"], sizes["batch"])  # validated at once
    for flag, value, axes, parts in (
        ("batch", sizes["batch"], "data x fsdp", rows),
        ("eval-windows", together, "data x fsdp", rows),
        ("context", sizes["context"], "context", mesh["context"]),
        ("heads", sizes["heads"], "tensor", mesh["tensor"]),
        ("features", sizes["features"], "fsdp", mesh["fsdp"]),
    ):
        if value % parts:
            raise RunError(f"argument --mesh: {axes} = {parts} must divide --{flag}, {value}")


def join(coordinator: str | None, process_id: int | None, processes: int | None) -> None:
    """Joins the other processes of a run, if there are any; before JAX looks for devices."""
    given = (coordinator, process_id, processes)
    if all(x is None for x in given):
        return
    if coordinator is None or process_id is None or processes is None:
        raise RunError("--coordinator, --process-id and --processes go together: give all three, or none")
    if process_id >= processes:
        raise RunError(f"argument --process-id: must be less than --processes, {processes}, got {process_id}")
    jax.distributed.initialize(
        coordinator, processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=120
    )


def agreed(signal: int | None) -> Any:
    """The greatest signal that any process has got, 0 without one: all of them stop after the same step.

    It is found out on the devices, after what they have been given before. Reading it waits for that.
    """
    own = np.int32(signal or 0)
    if jax.process_count() == 1:
        return own
    places = NamedSharding(Mesh(jax.devices(), ("devices",)), P("devices"))
    return _greatest(jax.make_array_from_process_local_data(places, np.full(jax.local_device_count(), own)))


@jax.jit
def _greatest(signals: jax.Array) -> jax.Array:
    return jnp.max(signals)


def wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
