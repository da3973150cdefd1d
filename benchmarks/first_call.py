"""Seconds of the first call in a process, in the next process, and of a program that was exported to a file.

    python -m benchmarks.first_call [--dims 64 128] [--output FILE]

Forward and backward, bfloat16, (8, 1024, 4 heads, D). Every row is a process of its own. ``lower`` is JAX's tracing and
Triton's compilation (of a loaded program: reading the file), ``compile`` is XLA's, and ``run`` is the first execution,
which assembles the kernels. JAX's persistent compilation cache is on, in an empty folder that the processes share.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import described, environment, require_gpu
from flashlla_jax import lla_attention

_SHAPE = (8, 1024, 4)
_ROWS = ("first process", "second process", "exported, loaded")


def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    def loss(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(lla_attention(*inputs).astype(jnp.float32))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)


def first_call(dim: int, file: Path, load: bool) -> list[float]:
    """Seconds to lower, to compile and to run, of this process's first call."""
    inputs = [jax.random.normal(key, (*_SHAPE, dim), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)]
    jax.block_until_ready(inputs)
    times = [time.perf_counter()]
    run = jax.jit(jax.export.deserialize(bytearray(file.read_bytes())).call if load else gradients)
    lowered = run.lower(*inputs)
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    jax.block_until_ready(compiled(*inputs))
    times.append(time.perf_counter())
    if not file.exists():
        checks = [jax.export.DisabledSafetyCheck.custom_call(f"triton_kernel_call{end}") for end in ("", "_ffi")]
        file.write_bytes(jax.export.export(jax.jit(gradients), disabled_checks=checks)(*inputs).serialize())
    return [after - before for before, after in itertools.pairwise(times)]


def in_a_process(dim: int, folder: Path, load: bool) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.first_call", "--child", str(dim), str(folder / f"{dim}.jax")]
    settings = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        command + ["--load"] * load, env=os.environ | settings, check=True, capture_output=True, text=True
    )
    return [float(seconds) for seconds in done.stdout.splitlines()[-1].split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(*first_call(int(args.child[0]), Path(args.child[1]), args.load))
        return

    lines = [f"{'D':>4} {'':<18} {'lower':>7} {'compile':>7} {'run':>7} {'all':>7}   seconds"]
    with tempfile.TemporaryDirectory() as folder:
        for dim in args.dims:
            for row in _ROWS:
                seconds = in_a_process(dim, Path(folder), row == _ROWS[2])
                lines.append(f"{dim:>4} {row:<18} " + " ".join(f"{s:7.2f}" for s in (*seconds, sum(seconds))))
    device = require_gpu("benchmarks/first_call.py")
    text = "\n".join([described(environment(device)), *lines])
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
