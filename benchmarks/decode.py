"""Times a decode step against Flax's softmax decode step and against reading the cache once.

    python -m benchmarks.decode [--quick] [--output benchmarks/results]

One token a row, bfloat16, lambda 10, the cache full. ``module`` is ``LLAttention`` and ``softmax`` Flax's
``nnx.MultiHeadAttention``, projections and writing the cache included; ``operator`` is ``lla_decode`` alone. ``floor``
is the cache's bytes over the bandwidth that a copy of a large array reaches in the same run. Ratios are of one run.
``--quick`` takes tiny shapes, on any device. Writes decode_DEVICE.json and decode_DEVICE.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.timing import described, environment, jax_timer, median_time, require_gpu, slug
from flashlla_jax import LLAttention, lla_decode


class Setting(NamedTuple):
    """Batch, cache length, query heads, key/value heads, head dimension."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def cache_bytes(self) -> int:
        return 2 * 2 * self.batch * self.length * self.kv_heads * self.dim


# The first eight are those that bounds were set for; the rest fills in the lengths.
SETTINGS = [
    *(Setting(8, 8192, 16, 16, dim) for dim in (64, 128)),
    *(Setting(64, 4096, 16, 16, dim) for dim in (64, 128)),
    *(Setting(4, 32768, 32, 8, dim) for dim in (64, 128)),
    *(Setting(1, 131072, 16, 16, dim) for dim in (64, 128)),
    *(Setting(batch, length, 16, 16, 64) for batch, length in ((1, 1024), (1, 8192), (8, 1024), (8, 32768))),
    *(Setting(batch, length, 32, 8, 128) for batch, length in ((1, 131072), (64, 4096))),
]
QUICK = [Setting(1, 64, 2, 2, 8), Setting(2, 32, 4, 2, 8)]


class Row(NamedTuple):
    """Milliseconds."""

    setting: Setting
    floor: float
    softmax: float
    module: float
    operator: float


def bandwidth(size: int) -> float:
    """Bytes a second that a copy of ``size`` bytes reads and writes."""
    x = jnp.ones(size // 2, jnp.bfloat16)
    return 2 * size / median_time(jax_timer(jax.jit(lambda x: x + 1), (x,)), 9, 3.0).seconds


def stepper(kind: Callable[..., Any], setting: Setting) -> Callable[[int], float]:
    """``timed`` of ``median_time``: steps of a module at the last place of its cache, which is updated in place."""
    features = setting.heads * setting.dim
    layer = kind(
        setting.heads,
        features,
        num_kv_heads=setting.kv_heads,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        decode=True,
        rngs=nnx.Rngs(0),
    )
    layer.init_cache((setting.batch, setting.length, features), jnp.bfloat16)
    for seed, cached in enumerate((layer.cached_key, layer.cached_value)):
        cached.set_value(jax.random.normal(jax.random.key(seed), cached.shape, jnp.bfloat16))
    graph, parameters, cache = nnx.split(layer, nnx.Param, ...)
    token = jax.random.normal(jax.random.key(2), (setting.batch, 1, features), jnp.bfloat16)

    @partial(jax.jit, donate_argnums=1)
    def step(parameters: Any, cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        layer = nnx.merge(graph, parameters, cache)
        layer.cache_index.set_value(jnp.asarray(setting.length - 1, jnp.int32))
        o = layer(token)
        return nnx.state(layer, nnx.Not(nnx.Param)), o

    state = [cache]

    def timed(calls: int) -> float:
        def run() -> jax.Array:
            state[0], o = step(parameters, state[0], token)
            return o

        return jax_timer(run, ())(calls)

    return timed


def operator(setting: Setting) -> Callable[[int], float]:
    """``timed`` of ``median_time``: calls of ``lla_decode``."""
    b, s, n, k, d = setting
    shapes = ((b, 1, n, d), (b, s, k, d), (b, s, k, d))
    arrays = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    return jax_timer(jax.jit(lla_decode), (*arrays, jnp.full(b, s, jnp.int32)))


def in_turns(timers: Sequence[Callable[[int], float]]) -> list[float]:
    """Milliseconds: the least of three medians of each, taken in turns.

    A step is as short as its launches take the host, and a rented host is disturbed for tenths of a second at a time.
    """
    rounds = [[median_time(timed, 9, 1.0).seconds for timed in timers] for _ in range(3)]
    return [1e3 * min(times) for times in zip(*rounds, strict=True)]


def measure(setting: Setting, bytes_per_second: float) -> Row:
    floor = 1e3 * setting.cache_bytes / bytes_per_second
    steps = [stepper(kind, setting) for kind in (nnx.MultiHeadAttention, LLAttention)]
    return Row(setting, floor, *in_turns([*steps, operator(setting)]))


def header() -> str:
    names = f"{'B':>3} {'cache':>7} {'N/K':>6} {'D':>4} {'floor':>9} {'softmax':>9} {'module':>9} {'operator':>9}"
    return f"{names}  module/softmax  operator/floor   (ms)"


def line(row: Row) -> str:
    b, s, n, k, d = row.setting
    times = " ".join(f"{x:9.3f}" for x in row[1:])
    ratios = f"{row.module / row.softmax:16.2f}{row.operator / row.floor:16.2f}"
    return f"{b:3} {s:7} {f'{n}/{k}':>6} {d:4} {times}{ratios}"


def plot(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    rows = sorted(rows, key=lambda row: row.setting.cache_bytes)
    size = [row.setting.cache_bytes / 2**20 for row in rows]
    ax.plot(size, [row.floor for row in rows], color="#777777", label="reading the cache once")
    for name, mark, color in (("softmax", "s", "#D55E00"), ("module", "o", "#0072B2"), ("operator", "^", "#009E73")):
        ax.plot(size, [getattr(row, name) for row in rows], mark, color=color, markersize=4, label=name)
    ax.set(xscale="log", yscale="log", xlabel="cache, MiB", ylabel="ms a step")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--output", type=Path, help="also write the figures and the plot to this folder")
    args = parser.parse_args(argv)
    device = jax.devices()[0].device_kind if args.quick else require_gpu("benchmarks.decode")
    about = environment(device)
    print(described(about))
    bytes_per_second = bandwidth(2**20 if args.quick else 2**31)
    print(f"a copy reaches {bytes_per_second / 1e12:.2f} TB/s\n")
    print(header())
    rows = []
    for setting in QUICK if args.quick else SETTINGS:
        rows.append(measure(setting, bytes_per_second))
        print(line(rows[-1]), flush=True)
    if args.output is not None:
        stem = args.output / f"decode_{slug(device)}"
        results = [row.setting._asdict() | {name: getattr(row, name) for name in Row._fields[1:]} for row in rows]
        report = {**about, "bytes_per_second": bytes_per_second, "milliseconds": results}
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        plot(rows, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
