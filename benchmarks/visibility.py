"""Times every way of hiding keys against the plain causal call, forward and backward, on one NVIDIA GPU.

    python -m benchmarks.visibility [--output benchmarks/results/visibility_NAME.txt]

bfloat16, D = 64, lambda 10, (8, 4096, 8 heads, 64); ratios are of this run. The log-uniform row packs documents of 16
to 4096 tokens; beside its time stands what plain causal attention takes for as many visible pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import described, environment, jax_timer, median_time, require_gpu
from flashlla_jax import lla_attention

BATCH, LENGTH, HEADS, DIM, DOCUMENT = 8, 4096, 8, 64, 512


def arrays(batch: int, length: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, (batch, length, HEADS, DIM), jnp.bfloat16) for key in keys)


def milliseconds(inputs: tuple[jax.Array, ...], hidden: dict[str, Any], **options: Any) -> float:
    """Of the output and the gradients of query, key, value and ridge."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, hidden: dict[str, Any]) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array) -> jax.Array:
            return lla_attention(q, k, v, ridge_lambda=ridge, **hidden, **options)

        o, vjp = jax.vjp(attend, q, k, v, jnp.full(q.shape[:3], 10.0, jnp.float32))
        return o, vjp(g)

    return 1e3 * median_time(jax_timer(run, (*inputs, hidden)), 9, 3.0).seconds


def documents(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Segment ids of rows packed with documents of log-uniform length, and the share of causal pairs they show."""
    ids, pairs = np.zeros((BATCH, LENGTH), np.int32), 0
    for row in ids:
        start = number = 0
        while start < LENGTH:
            length = min(LENGTH - start, int(np.exp(rng.uniform(np.log(16), np.log(4096)))))
            row[start : start + length] = number
            start, number, pairs = start + length, number + 1, pairs + length * (length + 1) / 2
    return ids, pairs / (BATCH * LENGTH * (LENGTH + 1) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    output = parser.parse_args().output
    device = require_gpu("benchmarks.visibility")
    inputs = arrays(BATCH, LENGTH)
    short = tuple(x.reshape(-1, DOCUMENT, HEADS, DIM) for x in inputs)
    packed = jnp.asarray(np.arange(LENGTH, dtype=np.int32)[None].repeat(BATCH, 0) // DOCUMENT)
    ids, share = documents(np.random.default_rng(0))
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]

    plain = milliseconds(inputs, {})
    batch = milliseconds(short, {})
    rows = [
        ("plain causal", plain, plain),
        ("key_value_seq_lengths = S - 100", milliseconds(inputs, {"key_value_seq_lengths": jnp.full(8, 3996)}), plain),
        (f"a batch of documents of {DOCUMENT}", batch, plain),
        ("the same packed by segment_ids", milliseconds(inputs, {"segment_ids": packed}), plain),
        ("local_window_size=(511, 0)", milliseconds(inputs, {}, local_window_size=(511, 0)), plain),
        ("a dense causal mask", milliseconds(inputs, {"mask": causal}, is_causal=False), plain),
        ("documents of log-uniform length", milliseconds(inputs, {"segment_ids": jnp.asarray(ids)}), share * plain),
    ]
    lines = [described(environment(device)), "", f"{'call':36}{'ms':>9}{'of plain':>10}"]
    lines += [f"{name:36}{time:9.3f}{time / beside:10.3f}" for name, time, beside in rows]
    lines += [f"the last one against {share:.3f} of plain; packed / batch = {rows[3][1] / batch:.3f}"]
    print("\n".join(lines))
    if output is not None:
        output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
