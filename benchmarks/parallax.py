"""Times Parallax beside cuDNN's softmax attention and LLA, forward and forward + backward, on one NVIDIA GPU.

    python -m benchmarks.parallax [--output benchmarks/results/parallax_NAME.txt]
    python -m benchmarks.parallax --decode          # a step of generation, beside Flax's softmax attention
    python -m benchmarks.parallax --errors          # against the float64 reference, every kind of keys
    python -m benchmarks.parallax --launches        # candidates for PARALLAX_TABLE, each kernel by itself

bfloat16, causal; the probe is such that k.r has a feature's size. Ratios are of this run. LLA is at ridge 10.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.decode import Setting, in_turns, stepper
from benchmarks.timing import described, environment, jax_timer, median_time, one_line, require_gpu
from flashlla_jax import ParallaxAttention, lla_attention, operator, parallax_attention
from flashlla_jax.interface import ParallaxOptions
from flashlla_jax.kernels.plan import PARALLAX_TABLE, Launch, Plan, plan_for
from flashlla_jax.visibility import Hiding, visibility

# (batch times heads, length, head dimension); the first and the fourth are those with a goal: 2.6 and 3.2
SHAPES = ((64, 4096, 64), (256, 1024, 64), (16, 16384, 64), (32, 4096, 128), (32, 2048, 128))
# (batch, cache, heads, key heads, head dimension)
CACHES = ((8, 8192, 16, 16, 64), (8, 8192, 16, 16, 128), (64, 4096, 16, 16, 64), (4, 32768, 32, 8, 64))
CANDIDATES = {
    "forward": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3)),
    "query": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3)),
    "key": ((32, 64, 4, 3), (32, 64, 4, 2), (32, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2)),
}


def arrays(shape: tuple[int, int, int]) -> tuple[jax.Array, ...]:
    """q, probe, k, v and the cotangent; a batch of one sequence's heads in groups of 8."""
    rows, length, dim = shape
    keys = jax.random.split(jax.random.key(0), 5)
    q, r, k, v, g = (jax.random.normal(key, (rows // 8, length, 8, dim), jnp.bfloat16) for key in keys)
    return q, (r * dim**-0.5).astype(jnp.bfloat16), k, v, g


def milliseconds(run: Callable[..., Any], *inputs: Any) -> float:
    return 1e3 * median_time(jax_timer(jax.jit(run), inputs), 9, 3.0).seconds


def with_gradient(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(g: jax.Array, *inputs: jax.Array) -> Any:
        o, vjp = jax.vjp(attend, *inputs)
        return o, vjp(g)

    return run


def softmax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def compared() -> Iterator[str]:
    yield f"{'B*H, S, D':20}{'cuDNN':>16}{'Parallax':>16}{'ratio':>8}{'LLA':>16}{'ratio':>8}   ms: forward / both"
    for shape in SHAPES:
        q, r, k, v, g = arrays(shape)
        cells = []
        for attend, inputs in ((softmax, (q, k, v)), (parallax_attention, (q, r, k, v)), (lla_attention, (q, k, v))):
            cells.append((milliseconds(attend, *inputs), milliseconds(with_gradient(attend), g, *inputs)))
        text = [f"{forward:7.3f} /{both:7.3f}" for forward, both in cells]
        ratio = [both / cells[0][1] for _, both in cells]
        yield f"{shape!s:20}{text[0]:>16}{text[1]:>16}{ratio[1]:8.2f}{text[2]:>16}{ratio[2]:8.2f}"


def decoded() -> Iterator[str]:
    yield f"{'B, cache, N / K, D':24}{'Flax softmax':>14}{'Parallax':>14}{'ratio':>8}   ms a step of one token"
    for setting in (Setting(*cache) for cache in CACHES):
        flax, ours = in_turns([stepper(kind, setting) for kind in (nnx.MultiHeadAttention, ParallaxAttention)])
        name = f"{setting.batch}, {setting.length}, {setting.heads}/{setting.kv_heads}, {setting.dim}"
        yield f"{name:24}{flax:14.3f}{ours:14.3f}{ours / flax:8.2f}"


def errors() -> Iterator[str]:
    from tests.cases import KINDS, Shape, draw, relative_error
    from tests.parallax_tests import NAMES, draw_probe, evaluate, truth

    jax.config.update("jax_enable_x64", True)
    yield f"{'bfloat16, 512 keys':28}{''.join(f'{name:>10}' for name in NAMES)}"
    for dim in (64, 128):
        for kind in KINDS:
            inputs = draw(Shape(queries=512, keys=512, dim=dim, value_dim=dim), "bfloat16", kind)
            probe = draw_probe(inputs)
            got, expected = evaluate(inputs, probe, implementation="triton"), truth(inputs, probe)
            cells = "".join(f"{relative_error(got[name], expected[name]):10.1e}" for name in NAMES)
            yield f"{f'D = {dim}, {kind}':28}{cells}"


def launched() -> Iterator[str]:
    """Each kernel's candidates in the place of the table's entry; the difference is what counts."""
    yield "ms, forward for the forward kernel's candidates, forward and backward for the others"
    for shape in (SHAPES[0], SHAPES[3]):
        q, r, k, v, g = arrays(shape)
        seen = visibility(Hiding(True, None, 0, None, None, None, False, None), shape[1], shape[1])
        options = ParallaxOptions(shape[2] ** -0.5, jax.lax.Precision.DEFAULT)
        table = plan_for(q, v, options.precision, table=PARALLAX_TABLE)
        for kernel, candidates in CANDIDATES.items():
            for candidate in candidates:
                plan = table._replace(**{kernel: Launch(*candidate)})
                yield f"{shape!s:20}{kernel:10}{candidate!s:20}{_timed(kernel, plan, seen, options, q, r, k, v, g)}"


def _timed(kernel: str, plan: Plan, seen: Any, options: ParallaxOptions, *inputs: jax.Array) -> str:
    *given, g = inputs

    def attend(q: jax.Array, r: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return operator.attend(q, k, v, r, seen, options, only="triton", plan=plan)[0]

    try:
        if kernel == "forward":
            return f"{milliseconds(attend, *given):9.3f}"
        return f"{milliseconds(with_gradient(attend), g, *given):9.3f}"
    except Exception as error:  # a candidate that does not fit is a result too
        return one_line(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"decode": decoded, "errors": errors, "launches": launched}
    for name in parts:
        parser.add_argument(f"--{name}", action="store_true", help="this table in place of the comparison")
    parser.add_argument("--output", type=Path, help="also write what is printed to this file")
    args = parser.parse_args()
    device = require_gpu("benchmarks.parallax")
    chosen = [part for name, part in parts.items() if getattr(args, name)] or [compared]
    lines = [described(environment(device)), ""]
    print(*lines, sep="\n")
    for part in chosen:
        for line in part():
            print(line, flush=True)
            lines.append(line)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
