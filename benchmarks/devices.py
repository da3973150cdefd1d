"""Times calls and training steps that are divided over several devices against the same on one: strong scaling.

    python -m benchmarks.devices [--devices 2] [--quick] [--no-train] [--output benchmarks/results]

Forward and backward, bfloat16, D = 64, causal, lambda 10, of batch, heads and length, plain and packed with documents
of an eighth of the length; the length in all three ways that a call may be divided. Five calls or more follow each
other, as steps of a training do, after a second of the same calls. ``memory`` is what the compiled program holds on a
device at most, inputs and outputs included. Then the training step of examples/train_char_lm.py: the median over five
runs of 20 steps, a run timed as one, and their spread, (max - min) / median. Ratios are of this run.
``--quick`` takes tiny shapes, on any devices. Writes devices_DEVICE.txt.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.timing import Timing, described, environment, jax_timer, median_time, require_gpu, slug
from flashlla_jax import lla_attention

DIM = 64
PLACES = {"batch": P("x"), "heads": P(None, None, "x"), "length": P(None, "x")}
WAYS = ("automatic", "explicit", "shard_map")


class Setting(NamedTuple):
    """What is divided, in which way, and the call."""

    divided: str
    way: str
    batch: int
    length: int
    heads: int
    packed: bool

    def __str__(self) -> str:
        kind = "packed" if self.packed else "causal"
        return f"{self.divided:7}{self.way:11}({self.batch}, {self.length}, {self.heads}, {DIM}) {kind}"


SETTINGS = [
    Setting("batch", "automatic", 8, 4096, 8, False),
    Setting("heads", "automatic", 8, 4096, 8, False),
    *(Setting("length", way, 1, 32768, 8, False) for way in WAYS),
    Setting("length", "automatic", 1, 32768, 8, True),
    Setting("length", "shard_map", 1, 32768, 8, True),
    Setting("length", "automatic", 1, 16384, 8, False),
    Setting("length", "automatic", 1, 131072, 8, False),
    Setting("length", "automatic", 1, 131072, 8, True),
]
QUICK = [Setting("batch", "automatic", 4, 64, 2, False), *(Setting("length", way, 1, 64, 2, True) for way in WAYS)]

# (--mesh, and what differs from the preset)
TRAINING = [("data", {}), ("context", {"context": 16384, "batch": 4})]
QUICK_TRAINING: list[tuple[str, dict[str, Any]]] = [("data", {}), ("context", {})]
TINY = {"features": 16, "layers": 1, "heads": 2, "context": 16, "batch": 4, "steps": 20, "warmup": 2, "eval_windows": 4}


class Measured(NamedTuple):
    """Milliseconds, and bytes on a device."""

    time: float
    memory: int


def compiled(setting: Setting, devices: int) -> tuple[Any, tuple[Any, ...]]:
    """The program of output and gradients of query, key and value, and its arguments."""
    kind = AxisType.Explicit if setting.way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices])
    spec = PLACES[setting.divided]
    ids = np.arange(setting.length, dtype=np.int32)[None].repeat(setting.batch, 0) // (setting.length // 8)
    rows = spec if setting.divided != "heads" else P()
    hidden = {"segment_ids": jax.device_put(ids, NamedSharding(mesh, rows))} if setting.packed else {}
    in_shard_map = setting.way == "shard_map"

    def attend(hidden: dict[str, Any], *qkv: jax.Array) -> jax.Array:
        return lla_attention(*qkv, axis_name="x" if in_shard_map and setting.divided == "length" else None, **hidden)

    def run(hidden: dict[str, Any], g: jax.Array, *qkv: jax.Array) -> Any:
        o, vjp = jax.vjp(partial(attend, hidden), *qkv)
        return o, vjp(g)

    step: Any = run
    if in_shard_map:
        step = jax.shard_map(run, mesh=mesh, in_specs=(dict.fromkeys(hidden, rows), *(spec,) * 4), out_specs=spec)
    shape = (setting.batch, setting.length, setting.heads, DIM)
    keys = jax.random.split(jax.random.key(0), 4)
    draw = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16), out_shardings=NamedSharding(mesh, spec))
    inputs = (hidden, *(draw(key) for key in keys))
    return jax.jit(step).lower(*inputs).compile(), inputs


def held(program: Any) -> int:
    """The bytes on a device at most."""
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def call(setting: Setting, devices: int, quick: bool) -> Measured:
    program, inputs = compiled(setting, devices)
    timed = jax_timer(program, inputs)
    spent = 0.0
    while spent < (0 if quick else 1):  # a device that has rested has other clocks than one at work
        spent += timed(5)
    return Measured(1e3 * median_time(timed, 7, 4.0, least=5).seconds, held(program))


def training_step(mesh: str, devices: int, changes: dict[str, Any], quick: bool) -> Timing:
    """A step among others, as in a training: the devices get the next one before this process waits for the last."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    example, meshes, texts = (
        importlib.import_module(name) for name in ("train_char_lm", "common.meshes", "common.stdlib_text")
    )
    sizes = example.PRESETS["cpu" if quick else "h200"] | (TINY if quick else {}) | changes
    text = texts.load_text()
    config = example.Config(example.LLA, None, seed=0, text=text.sha256, **sizes)
    trainer = example.Trainer(config, text, meshes.place(meshes.mesh_sizes(f"{mesh}={devices}")))
    state, numbers = trainer.init(), itertools.count()

    def timed(steps: int) -> float:
        begin, loss = time.perf_counter(), None
        for number in itertools.islice(numbers, steps):
            loss = trainer.step(state, number)
        jax.block_until_ready(loss)
        return time.perf_counter() - begin

    return median_time(timed, 2 if quick else 5, 60.0, least=2 if quick else 20)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="how many; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on any devices")
    parser.add_argument("--no-train", action="store_true", help="the calls only")
    parser.add_argument("--output", type=Path, help="also write the table to this folder")
    args = parser.parse_args(argv)
    device = jax.devices()[0].device_kind if args.quick else require_gpu("benchmarks.devices")
    if len(jax.devices()) < args.devices:
        parser.error(f"argument --devices: {args.devices}, and there are {len(jax.devices())}")

    many = f"{args.devices} devices"
    lines = [described(environment(f"{args.devices} x {device}")), ""]
    lines += [f"{'divided, (B, S, N, D)':52}{'1 device':>10}{many:>12}{'speed-up':>10}{'memory, MiB':>16}{'ratio':>7}"]
    print("\n".join(lines))

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    for setting in QUICK if args.quick else SETTINGS:
        one, more = (call(setting, n, args.quick) for n in (1, args.devices))
        mib = f"{one.memory / 2**20:.0f} -> {more.memory / 2**20:.0f}"
        times = f"{one.time:10.3f}{more.time:12.3f}{one.time / more.time:10.3f}"
        tell(f"{setting!s:52}{times}{mib:>16}{more.memory / one.memory:7.2f}")
    for mesh, changes in () if args.no_train else QUICK_TRAINING if args.quick else TRAINING:
        one, more = (training_step(mesh, n, changes, args.quick) for n in (1, args.devices))
        name = f"training step, --mesh {mesh}={args.devices} {changes or ''}"
        times = f"{1e3 * one.seconds:10.3f}{1e3 * more.seconds:12.3f}{one.seconds / more.seconds:10.3f}"
        tell(f"{name:52}{times}   spread {one.spread:.1%}, {more.spread:.1%}")
    if args.output is not None:
        (args.output / f"devices_{slug(device)}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
