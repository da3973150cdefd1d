"""Times launch configurations of the Triton kernels and prints the best ones as the lines of the launch table.

    python -m benchmarks.tune [--kernels forward query key] [--dims 64 128 256] [--output FILE]
    python -m benchmarks.tune --kernels key --dims 128 --candidates 64,64,4,2 64,128,8,1

The lines printed at the end replace those of ``TABLE`` in ``flashlla_jax/kernels/plan.py``, or begin the entry of
this GPU's compute capability there. A candidate is rated by the geometric mean of its times at the ridges 10 and 0.1;
one that does not compile, does not fit, or computes something else than the launch in the table is skipped with one
line. Compiling takes 5 to 10 s a candidate.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.timing import described, environment, jax_timer, median_time, one_line, require_gpu
from flashlla_jax.interface import Options, SolverOptions
from flashlla_jax.kernels import passes
from flashlla_jax.kernels import plan as planning
from flashlla_jax.kernels.plan import Launch
from flashlla_jax.visibility import Hiding, Visibility, visibility

Array = jax.Array

KERNELS = ("forward", "query", "key")
# (B, S) by head dimension: the grid fills the GPU several times over.
_SHAPES = {64: (64, 4096), 128: (32, 4096), 256: (16, 2048)}
_DTYPES = {2: jnp.bfloat16, 4: jnp.float32}
RIDGES = (10.0, 0.1)
# Norm-wise. Tiles stop their solves together, so results differ by what the stop leaves; a wrong kernel is off by 1.
_DISAGREEMENT = 0.05

# (BM, BN, num_warps, num_stages) for bytes of an operand and head dimension; the entry in the table is tried as well.
_CANDIDATES: dict[int, dict[int, dict[str, list[tuple[int, int, int, int]]]]] = {
    2: {
        64: {
            "forward": [
                (64, 64, 4, 2),
                (64, 64, 4, 3),
                (64, 64, 4, 4),
                (128, 64, 8, 2),
                (128, 64, 8, 3),
                (64, 128, 4, 2),
            ],
            "query": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
            "key": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2)],
        },
        128: {
            "forward": [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 3), (128, 32, 8, 3)],
            "query": [(64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
            "key": [(64, 64, 4, 1), (64, 64, 8, 2), (64, 128, 8, 1), (64, 128, 8, 2), (32, 64, 4, 2)],
        },
        256: {
            "forward": [(64, 32, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2), (128, 32, 8, 2)],
            "query": [(64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 2)],
            "key": [(32, 64, 8, 1), (32, 64, 4, 1), (64, 64, 8, 1), (32, 32, 4, 1)],
        },
    },
    4: {
        64: {
            "forward": [(32, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)],
            "query": [(32, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 1)],
            "key": [(32, 32, 4, 2), (32, 64, 8, 2), (32, 32, 4, 1)],
        },
        128: {
            "forward": [(32, 32, 4, 2), (64, 32, 8, 1), (32, 16, 4, 2)],
            "query": [(32, 32, 8, 1), (32, 32, 4, 1), (32, 16, 4, 2)],
            "key": [(32, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 2)],
        },
        256: {
            "forward": [(16, 16, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1)],
            "query": [(16, 16, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1)],
            "key": [(16, 16, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
        },
    },
}


@dataclass
class Entry:
    """One entry of the table: a kernel, the bytes of an operand and a padded head dimension."""

    kernel: str
    operand_bytes: int
    dim: int
    candidates: list[Launch]
    milliseconds: dict[Launch, list[float]] = field(default_factory=dict)  # a time for each ridge

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.operand_bytes} bytes, D = {self.dim}"

    @property
    def current(self) -> Launch:
        return planning.entries(self.kernel, self.operand_bytes, planning.capability_here())[self.dim]

    @property
    def best(self) -> Launch | None:
        return min(self.milliseconds, key=lambda c: geometric_mean(self.milliseconds[c])) if self.milliseconds else None


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@contextlib.contextmanager
def patched(entry: Entry, launch: Launch) -> Iterator[None]:
    """The launch table with one entry replaced, and nothing left that was traced with another one."""
    rows = planning.entries(entry.kernel, entry.operand_bytes, planning.capability_here())
    before = rows[entry.dim]
    rows[entry.dim] = launch
    jax.clear_caches()
    try:
        yield
    finally:
        rows[entry.dim] = before
        jax.clear_caches()


def causal(length: int) -> Visibility:
    return visibility(Hiding(True, None, 0, None, None, None, False, None), length, length)


@dataclass
class Problem:
    """Inputs of both passes for one operand size and head dimension, by ridge."""

    options: Options
    forward_inputs: list[tuple[Array, ...]]
    backward_inputs: list[tuple[Any, ...]]
    query_seconds: list[float] | None = None  # of the backward's query kernel alone, as launched by the table

    @classmethod
    def draw(cls, operand_bytes: int, dim: int, with_backward: bool) -> Problem:
        batch, length = _SHAPES[dim]
        options = Options(
            qk_scale=dim**-0.5,
            delta_eps=1e-12,
            solver=SolverOptions(None, None, max(32, 4 * dim), False),
            precision=jax.lax.Precision.DEFAULT,
        )
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, g = (jax.random.normal(key, (batch, length, 1, dim), _DTYPES[operand_bytes]) for key in keys)
        problem = cls(options, [], [])
        for ridge in RIDGES:
            lam = jnp.full((batch, length, 1), ridge, jnp.float32)
            problem.forward_inputs.append((q, k, v, lam))
            if with_backward:
                _, saved, _ = jax.jit(problem.forward)(q, k, v, lam)
                problem.backward_inputs.append((q, k, v, lam, saved, g))
        return problem

    def function(self, kernel: str) -> Callable[..., Any]:
        """What is timed for a kernel: XLA drops the kernels whose results are not returned."""
        if kernel == "forward":
            return lambda *a: self.forward(*a)[0]
        return lambda *a: self.backward(*a)[0 if kernel == "query" else slice(3)]

    def forward(self, q: Array, k: Array, v: Array, lam: Array) -> Any:
        plan = planning.plan_for(q, v, self.options.precision)
        return passes.forward(q, k, v, lam, causal(q.shape[1]), self.options, plan)

    def backward(self, q: Array, k: Array, v: Array, lam: Array, saved: Any, g: Array) -> Any:
        plan = planning.plan_for(q, v, self.options.precision)
        return passes.backward(q, k, v, lam, causal(q.shape[1]), saved, g, self.options, plan)

    def inputs(self, kernel: str) -> list[tuple[Any, ...]]:
        return self.forward_inputs if kernel == "forward" else self.backward_inputs

    def seconds(self, kernel: str, repeats: int) -> tuple[list[float], list[Any]]:
        """Time and results for each ridge, launched as the table now says."""
        run = jax.jit(self.function(kernel))
        times, results = [], []
        for inputs in self.inputs(kernel):
            results.append(jax.block_until_ready(run(*inputs)))
            times.append(median_time(jax_timer(run, inputs), repeats, limit=10.0).seconds)
        return times, results


@jax.jit
def _differences(got: Any, expected: Any) -> Any:
    def difference(x: Array, y: Array) -> Array:
        x, y = x.astype(jnp.float32).ravel(), y.astype(jnp.float32).ravel()
        return jnp.linalg.norm(x - y) / jnp.linalg.norm(y)

    return jax.tree.map(difference, got, expected)


def disagreement(got: Any, expected: Any) -> float:
    """The largest norm-wise difference of any result; infinite where one is NaN."""
    values = [float(x) for x in jax.tree.leaves(_differences(got, expected))]
    return max(x if math.isfinite(x) else math.inf for x in values)


def candidate(text: str) -> Launch:
    """``BM,BN,num_warps,num_stages`` as a launch."""
    try:
        numbers = [int(part) for part in text.split(",")]
        launch = Launch(*numbers)
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"a candidate is BM,BN,num_warps,num_stages, such as 64,64,4,2; got {text!r}"
        ) from None
    for name, number in launch._asdict().items():
        if number < 1 or (name != "num_stages" and number & (number - 1)):
            raise argparse.ArgumentTypeError(f"{name} must be a power of two (num_stages: >= 1), got {text!r}")
    return launch


def entries(args: argparse.Namespace) -> list[Entry]:
    found = []
    for dim in args.dims:
        for kernel in args.kernels:
            known = planning.entries(kernel, args.operand_bytes, planning.capability_here())[dim]
            given = args.candidates or [Launch(*c) for c in _CANDIDATES[args.operand_bytes][dim][kernel]]
            if args.operand_bytes == 4:  # kernels/tiles.py, load_origin
                given = [c for c in given if c.BM <= 32]
            if kernel == "key":  # it reads what the query kernel wrote for whole tiles of its own
                queries = planning.entries("query", args.operand_bytes, planning.capability_here())[dim].BM
                given = [c for c in given if queries % c.BM == 0]
            # the one in the table first: the others are compared with its results
            found.append(Entry(kernel, args.operand_bytes, dim, list(dict.fromkeys([known, *given]))))
    return found


def tune(todo: list[Entry], repeats: int, budget: float) -> None:
    """Times every candidate of every entry, until the budget is spent."""
    start = time.perf_counter()
    problems: dict[int, Problem] = {}
    with tqdm(total=sum(len(e.candidates) for e in todo), desc="candidates", file=sys.stderr) as progress:
        for entry in todo:
            expected = None
            for launch in entry.candidates:
                progress.set_postfix_str(f"{entry.name}: {tuple(launch)}")
                try:
                    if time.perf_counter() - start > budget:
                        raise TimeoutError(f"not tried, {budget:g} s are over")
                    if entry.dim not in problems:
                        problems.clear()  # one in memory at a time
                        jax.clear_caches()
                        backward = any(e.kernel != "forward" for e in todo if e.dim == entry.dim)
                        problems[entry.dim] = Problem.draw(entry.operand_bytes, entry.dim, backward)
                    times, results = attempt(problems[entry.dim], entry, launch, repeats)
                    expected = results if expected is None else expected
                    off = disagreement(results, expected)
                    if off > _DISAGREEMENT:
                        raise ArithmeticError(f"its results differ from the first launch's by {off:.1e}")
                except Exception as error:  # shared memory, registers, a layout that Triton cannot lower, ...
                    tqdm.write(f"{entry.name}: {tuple(launch)}: skipped, {one_line(error, 200)}", file=sys.stderr)
                else:
                    entry.milliseconds[launch] = times
                    tqdm.write(f"{entry.name}: {tuple(launch)}: {describe(times)}", file=sys.stderr)
                progress.update()


def attempt(problem: Problem, entry: Entry, launch: Launch, repeats: int) -> tuple[list[float], list[Any]]:
    """Milliseconds of a kernel so launched and its results, for each ridge. Raises what running it raises."""
    if entry.kernel == "key" and problem.query_seconds is None:
        # the same number is taken off every candidate: it does not change their order
        jax.clear_caches()
        problem.query_seconds = problem.seconds("query", 2 * repeats)[0]
    with patched(entry, launch):
        seconds, results = problem.seconds(entry.kernel, repeats)
    if entry.kernel == "key" and problem.query_seconds is not None:
        seconds = [max(both - query, 1e-6) for both, query in zip(seconds, problem.query_seconds, strict=True)]
    return [1e3 * s for s in seconds], results


def describe(milliseconds: list[float]) -> str:
    return ", ".join(f"{ms:.3f} ms at {ridge:g}" for ms, ridge in zip(milliseconds, RIDGES, strict=True))


def table(tuned: list[Entry]) -> str:
    """Every candidate's times, the best one of an entry marked, the table's own one named."""
    lines = [
        f"{'entry':<28} {'launch (BM, BN, warps, stages)':<32} " + " ".join(f"{f'ms at {r:g}':>11}" for r in RIDGES)
    ]
    for entry in tuned:
        for launch in entry.candidates:
            times = entry.milliseconds.get(launch)
            marks = [m for m, on in (("best", launch == entry.best), ("in the table", launch == entry.current)) if on]
            shown = " ".join(f"{t:11.3f}" for t in times) if times else " ".join(f"{'skipped':>11}" for _ in RIDGES)
            lines.append(f"{entry.name:<28} {tuple(launch)!s:<32} {shown}  {', '.join(marks)}".rstrip())
    return "\n".join(lines)


def table_lines(tuned: list[Entry]) -> str:
    """The tuned keys of ``TABLE`` as Python; an entry of which nothing ran stays as it is."""
    lines = []
    for kernel, operand_bytes in dict.fromkeys((e.kernel, e.operand_bytes) for e in tuned):
        row = dict(planning.entries(kernel, operand_bytes, planning.capability_here()))
        for entry in tuned:
            if entry.kernel == kernel and entry.best is not None:
                row[entry.dim] = entry.best
        launches = ", ".join(f"{dim}: Launch({', '.join(map(str, launch))})" for dim, launch in sorted(row.items()))
        lines.append(f'    ("{kernel}", {operand_bytes}): {{{launches}}},')
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dims", nargs="+", type=int, choices=sorted(_SHAPES), default=sorted(_SHAPES))
    parser.add_argument("--operand-bytes", type=int, choices=sorted(_DTYPES), default=2, help="2: bfloat16, 4: float32")
    parser.add_argument(
        "--candidates", nargs="+", type=candidate, metavar="BM,BN,WARPS,STAGES", help="instead of the built-in ones"
    )
    parser.add_argument("--repeats", type=int, default=5, help="groups of calls whose median is taken")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no candidate is tried")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {args.repeats}")
    args.kernels, args.dims = list(dict.fromkeys(args.kernels)), list(dict.fromkeys(args.dims))
    device = require_gpu("benchmarks/tune.py")

    tuned = entries(args)
    tune(tuned, args.repeats, args.budget)
    text = "\n".join(
        [
            described(environment(device)),
            table(tuned),
            "",
            f"# flashlla_jax/kernels/plan.py, TABLE[{planning.capability_here()}]:",
            table_lines(tuned),
        ]
    )
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    if not any(entry.milliseconds for entry in tuned):
        sys.exit("no candidate ran")


if __name__ == "__main__":
    main()
