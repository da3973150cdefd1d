"""Time and memory of the blockwise XLA path on this machine, against the dense reference and softmax attention.

    python benchmarks/xla.py [--output benchmarks/results/xla_cpu.txt]

Forward and backward together, float32, causal, ridge 1, medians. Two promises are checked (and printed): at
(2, 1024, 64) at least twice as fast as the dense reference, and time growing no faster than S^2.1 from 1024 to 4096.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flashlla_jax import lla_attention

Array = jax.Array


def forward_backward(attend: Callable[..., Array]) -> Callable[..., Any]:
    def run(q: Array, k: Array, v: Array, g: Array) -> tuple[Array, tuple[Array, ...]]:
        o, vjp = jax.vjp(attend, q, k, v)
        return o, vjp(g)

    return jax.jit(run)


def lla(implementation: str) -> Callable[..., Array]:
    return lambda q, k, v: lla_attention(q, k, v, ridge_lambda=1.0, implementation=implementation)  # type: ignore[arg-type]


def softmax(q: Array, k: Array, v: Array) -> Array:
    q, k, v = (x[:, :, None] for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)[:, :, 0]


def draw(batch: int, length: int, dim: int) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(batch, length, dim)), jnp.float32) for _ in range(4)]


def median_seconds(run: Callable[..., Any], inputs: list[Array], repeats: int) -> float:
    jax.block_until_ready(run(*inputs))  # compile
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def temporary_mib(run: Callable[..., Any], inputs: list[Array]) -> float:
    analysis = run.lower(*inputs).compile().memory_analysis()  # type: ignore[attr-defined]
    return analysis.temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    shapes = [(2, 1024, 64), (1, 1024, 64), (1, 2048, 64), (1, 4096, 64), (1, 8192, 64)]
    runs = {"xla": forward_backward(lla("xla")), "softmax": forward_backward(softmax)}
    dense = forward_backward(lla("reference"))

    lines = [
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores; forward + backward, float32",
        f"{'B, S, D':>14} {'xla s':>9} {'xla MiB':>9} {'softmax s':>10} {'dense s':>9} {'dense / xla':>12}",
    ]
    seconds = {}
    speedup = math.nan
    for shape in tqdm(shapes, desc="shapes"):
        inputs = draw(*shape)
        times = {name: median_seconds(run, inputs, args.repeats) for name, run in runs.items()}
        seconds[shape] = times["xla"]
        row = f"{shape!s:>14} {times['xla']:9.3f} {temporary_mib(runs['xla'], inputs):9.1f} {times['softmax']:10.3f}"
        if shape == (2, 1024, 64):  # the dense form holds several (S, S, D) arrays: only here
            reference = median_seconds(dense, inputs, 3)
            speedup = reference / times["xla"]
            row += f" {reference:9.3f} {speedup:12.1f}"
        lines.append(row)
    exponent = math.log(seconds[1, 4096, 64] / seconds[1, 1024, 64], 4)
    lines.append(f"speed-up over the dense reference at (2, 1024, 64): {speedup:.1f} (promised: 2)")
    lines.append(f"growth of the time from S = 1024 to 4096: S^{exponent:.2f} (promised: at most 2.1)")
    table = "\n".join(lines)
    print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
