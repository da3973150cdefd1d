"""Time and memory of Local Linear Attention on a GPU, against cuDNN's softmax attention of the same run.

    python -m benchmarks.attention [--quick] [--implementations triton xla reference flashlla] [--output-dir DIR]

bfloat16, causal, inputs drawn from N(0, 1), heads folded into the batch. Lengths 1k to 64k at D = 64 and 128, ridge 10
and 0.1: the Triton kernels, the blockwise XLA path and the dense reference where they are short enough, and PyTorch's
``flashlla`` where it is importable. A table goes to stdout, and the same table, JSON and a plot to the output folder.

``--quick`` measures four shapes only, and writes files of their own (``..._quick``) and no plot. cuDNN is always
measured: every row is divided by its time. What would take too long is left out and the table says so; flashlla comes
last, and its autotuner compiles for minutes: give it time with ``--budget 560``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.attention_rows import CUDNN, IMPLEMENTATIONS, Group, Row, Shape, in_order, plot, table
from benchmarks.timing import described, environment, jax_timer, median_time, one_line, require_gpu, slug
from flashlla_jax import lla_attention

Array = jax.Array

# Seconds that compiling an implementation's kernels takes once per head dimension, so as not to start what cannot end
# in time: flashlla's autotuner compiles seven variants of each of its kernels.
_COMPILE_SECONDS = {"triton": 20.0, "xla": 10.0, "reference": 10.0, "flashlla": 75.0}
# Operations that change no element (where they change no size): what they give is the same array.
_RELAYOUTS = ("reshape", "squeeze", "broadcast_in_dim", "transpose", "slice", "copy")

# Seconds after which no further group of calls is begun: long calls are steady.
_TIMED_SECONDS = 2.0
# Calls, forward and backward, that measuring a case takes at least; flashlla's autotuner runs its variants first.
_FEWEST_CALLS = {"flashlla": 60}
_FEWEST_CALLS_ELSE = 4


def sweep_shapes(dim: int) -> list[Shape]:
    """Lengths 1k to 64k: a constant number of tokens up to 16k (64 or 32 sequences of 4096), then 8 sequences."""
    tokens = (64 if dim == 64 else 32) * 4096
    shapes = [Shape(tokens // length, length, dim) for length in (1024, 2048, 4096, 8192, 16384)]
    return [*shapes, Shape(8, 32768, dim), Shape(8, 65536, dim)]


def quick_groups() -> list[Group]:
    groups = [
        Group("triton", Shape(64, 4096, 64)),
        Group("triton", Shape(64, 4096, 64), precision="high", sweep=False),
        Group("triton", Shape(32, 4096, 128), (10.0,)),
        Group("triton", Shape(32, 2048, 128), (10.0,), sweep=False),
    ]
    flashlla = (Group("flashlla", g.shape, (10.0,), sweep=g.sweep) for g in groups if g.precision == "default")
    return [*groups, *flashlla]


def default_groups() -> list[Group]:
    """In the order of what to lose last should the time run out."""
    sweep = [shape for dim in (64, 128) for shape in sweep_shapes(dim)]
    short = [Shape(4, 512, dim) for dim in (64, 128)]  # the dense form holds a dozen (B, S, S, D) arrays in float32
    return [
        *(Group("triton", shape) for shape in sweep),
        Group("triton", Shape(64, 4096, 64), precision="high", sweep=False),
        Group("triton", Shape(32, 2048, 128), (10.0,), sweep=False),
        *(Group("triton", shape, sweep=False) for shape in short),
        *(Group("reference", shape) for shape in short),
        *(Group("xla", shape) for shape in sweep if shape.length <= 2048),
        *(Group("xla", shape, sweep=False) for shape in short),
        Group("flashlla", Shape(64, 4096, 64)),
        Group("flashlla", Shape(32, 2048, 128), (10.0,), sweep=False),
        *(Group("flashlla", shape) for shape in sweep if shape != (64, 4096, 64)),
    ]


def softmax(q: Array, k: Array, v: Array, ridge: Array) -> Array:
    del ridge
    q, k, v = (x[:, :, None] for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")[:, :, 0]


def attention_of(group: Group) -> Callable[..., Array]:
    """``(q, k, v, ridge) -> o`` on ``(B, S, D)``."""
    if group.implementation == CUDNN:
        return softmax

    def attend(q: Array, k: Array, v: Array, ridge: Array) -> Array:
        return lla_attention(
            q,
            k,
            v,
            ridge_lambda=ridge,
            implementation=group.implementation,  # type: ignore[arg-type]
            precision=group.precision,
        )

    return attend


def kept_bytes(attend: Callable[..., Array], q: Array, ridge: Array) -> int:
    """Bytes of the arrays that ``jax.vjp`` of ``attend`` keeps for the backward pass, beside query, key, value, output.

    Those four are recognised in the traced program, in whatever shape they are kept; an array kept twice counts once.
    """

    def keep(q: Array, k: Array, v: Array, ridge: Array) -> tuple[Array, list[Array]]:
        o, vjp = jax.vjp(lambda *inputs: attend(*inputs, ridge), q, k, v)
        return o, jax.tree.leaves(vjp)

    jaxpr: Any = jax.make_jaxpr(keep)(q, q, q, ridge).jaxpr
    source = {
        equation.outvars[0]: equation.invars[0]
        for equation in jaxpr.eqns
        if equation.primitive.name in _RELAYOUTS and equation.outvars[0].aval.size == equation.invars[0].aval.size
    }

    def origin(variable: Any) -> Any:
        while variable in source:
            variable = source[variable]
        return variable

    o, *kept = (variable for variable in jaxpr.outvars if not hasattr(variable, "val"))  # val: a literal
    arrays = set(map(origin, kept)) - set(map(origin, (*jaxpr.invars[:3], o)))
    return sum(variable.aval.size * variable.aval.dtype.itemsize for variable in arrays if not hasattr(variable, "val"))


def measure_jax(group: Group, rows: list[Row], repeats: int) -> None:
    """Fills the rows of a group that runs in JAX, one for each ridge."""
    attend = attention_of(group)
    q, k, v, g = (jax.random.normal(key, group.shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))

    def run_both(q: Array, k: Array, v: Array, g: Array, ridge: Array) -> tuple[Array, tuple[Array, ...]]:
        o, vjp = jax.vjp(lambda *inputs: attend(*inputs, ridge), q, k, v)
        return o, vjp(g)

    ridge = jnp.float32(1)
    forward = jax.jit(attend).lower(q, k, v, ridge).compile()
    both = jax.jit(run_both).lower(q, k, v, g, ridge).compile()
    memory = both.memory_analysis()
    kept = kept_bytes(attend, q, ridge)
    for row in rows:
        if memory is not None:
            row.set_memory(memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes, kept)
        ridge = jnp.float32(row.ridge_lambda or 1)
        row.set_times(
            median_time(jax_timer(forward, (q, k, v, ridge)), repeats, _TIMED_SECONDS),
            median_time(jax_timer(both, (q, k, v, g, ridge)), repeats, _TIMED_SECONDS),
        )


def why_no_flashlla() -> str:
    """Empty where PyTorch's ``flashlla`` is installed. It is not imported yet: JAX's CUDA libraries come first."""
    missing = [package for package in ("torch", "flashlla") if find_spec(package) is None]
    return f"PyTorch's flashlla is not measured: {' and '.join(missing)} cannot be imported" if missing else ""


def measure_flashlla(group: Group, rows: list[Row], repeats: int) -> None:
    """Fills the rows of PyTorch's ``flashlla``, with its defaults, timed by CUDA events."""
    torch = importlib.import_module("torch")
    flashlla = importlib.import_module("flashlla")
    # jax-triton empties this variable for the process, and Triton's own launcher then finds no folder for its kernels
    if os.environ.get("TRITON_CACHE_DIR") == "":
        del os.environ["TRITON_CACHE_DIR"]
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(*group.shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(True)

    for row in rows:

        def run_forward(ridge: float | None = row.ridge_lambda) -> Any:
            return flashlla.lla_attention(q, k, v, ridge_lambda=ridge)

        def run_both(forward: Callable[[], Any] = run_forward) -> Any:
            o = forward()
            return o, torch.autograd.grad(o, (q, k, v), g)

        def timer(run: Callable[[], Any]) -> Callable[[int], float]:
            def timed(calls: int) -> float:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(calls):
                    run()
                end.record()
                torch.cuda.synchronize()
                return start.elapsed_time(end) / 1e3

            return timed

        def run_inference(forward: Callable[[], Any] = run_forward) -> Any:
            with torch.no_grad():
                return forward()

        row.set_times(
            median_time(timer(run_inference), repeats, _TIMED_SECONDS),
            median_time(timer(run_both), repeats, _TIMED_SECONDS),
        )
        size = q.numel() * q.element_size()
        before = torch.cuda.memory_allocated()
        o = run_forward()
        kept = torch.cuda.memory_allocated() - before - size
        del o
        torch.cuda.reset_peak_memory_stats()
        run_both()
        peak = torch.cuda.max_memory_allocated() - before
        row.set_memory(max(0, peak - 4 * size), 4 * size, 4 * size, kept)


class Planner:
    """Says what there is time for, from the shorter lengths that were measured."""

    def __init__(self, budget: float, limit: float) -> None:
        self.start = time.perf_counter()
        self.budget, self.limit = budget, limit
        self.measured: dict[Any, tuple[int, float]] = {}
        self.compiled: set[Any] = set()

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def refusal(self, row: Row) -> str:
        """Why a case is left out, empty if it is not."""
        call = self._expected(row)
        calls = _FEWEST_CALLS.get(row.implementation, _FEWEST_CALLS_ELSE)
        seconds = 1.5 * calls * call  # the forward pass alone is timed too
        if seconds > self.limit:
            return f"skipped: about {seconds:.0f} s to measure (limit {self.limit:g} s)"
        if (row.implementation, row.dim, row.precision) not in self.compiled:
            seconds += _COMPILE_SECONDS.get(row.implementation, 0.0)
        if self.elapsed() + seconds > self.budget:
            return f"skipped: beyond the run's {self.budget:g} s"
        return ""

    def record(self, row: Row) -> None:
        self.compiled.add((row.implementation, row.dim, row.precision))
        if row.forward_backward_ms is not None:
            self.measured[self._key(row)] = row.shape.work, row.forward_backward_ms / 1e3

    def _expected(self, row: Row) -> float:
        """Seconds of a forward and backward: B S^2 times what the last one took, 0 where none was measured."""
        work, seconds = self.measured.get(self._key(row), (1, 0.0))
        return seconds * row.shape.work / work

    @staticmethod
    def _key(row: Row) -> Any:
        # short sequences in small batches leave the GPU idle: no measure for the others
        small = row.batch * row.length < 2**15
        return row.implementation, row.dim, row.precision, small  # the last ridge is the smallest and slowest


def with_cudnn(groups: Iterable[Group]) -> list[Group]:
    """cuDNN before the first group of every shape, so that the two times are close in time."""
    planned: list[Group] = []
    seen: set[Shape] = set()
    for group in groups:
        if group.shape not in seen:
            seen.add(group.shape)
            planned.append(
                Group(CUDNN, group.shape, (None,), sweep=group.sweep and group.implementation != "reference")
            )
        planned.append(group)
    return planned


def measure(groups: list[Group], repeats: int, planner: Planner) -> list[Row]:
    rows: list[Row] = []
    cudnn: dict[Shape, Row] = {}
    with tqdm(total=len(groups), desc="cases", unit="case", mininterval=1.0, file=sys.stderr) as progress:
        for group in groups:
            progress.set_postfix_str(f"{group.implementation} ({group.shape})")
            new = [Row(group.implementation, group.precision, r, *group.shape, group.sweep) for r in group.ridges]
            for row in new:
                row.note = planner.refusal(row)
            todo = [row for row in new if not row.note]
            measure_group = measure_flashlla if group.implementation == "flashlla" else measure_jax
            try:
                if todo:
                    measure_group(group, todo, repeats)
            except Exception as error:  # a failed case must not lose the others
                for row in todo:
                    row.note = f"failed: {one_line(error)}" if row.forward_ms is None else row.note
                tqdm.write(f"{group.implementation} ({group.shape}): {one_line(error, 400)}", file=sys.stderr)
            for row in new:
                if group.implementation == CUDNN:
                    cudnn[group.shape] = row
                if group.shape in cudnn:
                    row.set_ratios(cudnn[group.shape])
                planner.record(row)
            rows += new
            progress.update()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--quick", action="store_true", help="four shapes only, and no plot")
    parser.add_argument("--repeats", type=int, default=5, help="groups of calls whose median is taken")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        help="default: all of them; with --quick triton (flashlla on request)",
    )
    parser.add_argument("--case-limit", type=float, default=15.0, help="seconds to measure one row")
    parser.add_argument("--budget", type=float, default=270.0, help="seconds for the run; what is left is skipped")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {args.repeats}")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output-dir {args.output_dir} is not a folder")
    chosen = set(args.implementations or (["triton"] if args.quick else IMPLEMENTATIONS))
    groups = [g for g in (quick_groups() if args.quick else default_groups()) if g.implementation in chosen]
    if not groups:
        parser.error(f"--quick has no shape for {', '.join(sorted(chosen))}: leave --quick out")
    planner = Planner(args.budget, args.case_limit)
    device = require_gpu("benchmarks/attention.py")

    missing = why_no_flashlla() if "flashlla" in chosen else ""
    if missing:
        print(missing)
        groups = [group for group in groups if group.implementation != "flashlla"]
        if not groups:
            sys.exit("nothing else was asked for")

    rows = in_order(measure(with_cudnn(groups), args.repeats, planner))
    found = environment(device)
    lines = [
        described(found),
        f"bfloat16, causal, N(0, 1); medians of {args.repeats} groups of calls (of fewer where they take more than "
        f"{_TIMED_SECONDS:g} s); {planner.elapsed():.0f} s in all",
        "temp: temporaries of forward + backward; in + out: its arguments and results; kept: what the backward pass "
        "keeps of the forward pass beyond q, k, v, o",
        *([missing] if missing else []),
        "",
        table(rows),
    ]
    text = "\n".join(lines)
    print(text)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    stem = args.output_dir / f"attention_{slug(device)}{'_quick' if args.quick else ''}"
    written = [stem.with_suffix(".json"), stem.with_suffix(".txt")]
    written[0].write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    written[1].write_text(text + "\n")
    failed = [row for row in rows if row.note.startswith("failed")]
    if not args.quick:
        written.append(stem.with_suffix(".png"))
        try:
            plot(rows, device, written[-1])
        except Exception as error:  # the figures are safe in the other files
            sys.exit(f"no plot: {one_line(error, 400)}")
    print(f"\nwritten to {args.output_dir}: {', '.join(path.name for path in written)}")
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} rows failed")


if __name__ == "__main__":
    main()
