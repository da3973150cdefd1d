"""What the second call costs without ``jax.jit``: milliseconds, compilations, and bytes that the process keeps.

    python -m benchmarks.eager [--output benchmarks/results/eager_cpu.txt]

Small shapes, so that it is the call that is timed and not its arithmetic: (2, 128, 4 heads, 32), float32.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flashlla_jax import LLAttention, lla_attention

_CALLS = 20


def calls() -> dict[str, Callable[[], Any]]:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 128, 4, 32)) for key in keys[:3])
    x = jax.random.normal(keys[3], (2, 128, 64))
    layer = LLAttention(4, 64, learn_ridge=True, decode=False, rngs=nnx.Rngs(0))
    decoder = LLAttention(4, 64, decode=True, rngs=nnx.Rngs(0))
    decoder.init_cache((2, 128 + 2 * _CALLS, 64))
    decoder(x, decode=True)
    return {
        "lla_attention": lambda: lla_attention(q, k, v),
        "its gradient": lambda: jax.grad(lambda *qkv: jnp.sum(lla_attention(*qkv)), argnums=(0, 1, 2))(q, k, v),
        "LLAttention": lambda: layer(x),
        "its gradient ": lambda: nnx.grad(lambda layer: jnp.sum(layer(x)))(layer),
        "a decode step": lambda: decoder(x[:, :1], decode=True),
    }


def measure(call: Callable[[], Any], compilations: list[str]) -> str:
    jax.block_until_ready(call())
    compilations.clear()
    jax.block_until_ready(call())
    second = len(compilations)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(_CALLS // 2):
        jax.block_until_ready(call())
    gc.collect()
    kept = (tracemalloc.get_traced_memory()[0] - before) / (_CALLS // 2)
    tracemalloc.stop()
    seconds = []
    for _ in range(_CALLS // 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return f"{1e3 * statistics.median(seconds):10.2f} {second:12d} {kept:12.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    compilations: list[str] = []

    def record(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(record)
    lines = [
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: the second call and those after it, without jax.jit"
    ]
    lines.append(f"{'':16}{'ms a call':>10} {'compilations':>12} {'bytes kept':>12}")
    for name, call in calls().items():
        lines.append(f"{name:16}" + measure(call, compilations))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
