"""In-context regression: two attention layers learn to fit piecewise-linear maps, by each of four kinds of attention.

    python examples/in_context_regression.py                    # a small version, minutes on two CPU cores
    python examples/in_context_regression.py --preset full      # d = 32, on a GPU
    python examples/in_context_regression.py --attention parallax   # one of the methods, or some of them

The task follows the LLA paper (arXiv 2510.01450). A sequence consists of segments; each draws a direction c and a
matrix W. Its inputs lie in a cone around c and have the norm sqrt(d), its targets are ``y = W x``: linear within a
segment, and both the map and the place of the inputs change between segments. Position t carries the token
``(x_t, y_{t-1})``, so the model predicts ``y_t`` from ``x_t`` and all pairs before it, and has to bring the x and the y
of a pair together itself.

The models have two layers of attention with rotary positions and no MLP; nothing but the attention differs, and all are
trained with the same steps, batches and learning rates. The rate with the lowest error on validation data counts, the
table is of test data. The error is the squared error over the variance of the targets: 1 is a prediction of zero. A
stopped run goes on with what is missing, with the same command.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common.runs import number
from common.sweep import Budget, Job, Results, best_rate, carry_out, refuse_repetition, run_all, sweep_parser
from common.transformer import ATTENTIONS, AUTO, COLORS, TITLES, Array, Transformer, compute_dtype
from flax import nnx

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')


@dataclass(frozen=True)
class Config:
    """What a result depends on, but for method and segment length."""

    dim: int
    width: int
    heads: int
    length: int
    segments: tuple[int, ...]
    batch: int
    steps: int
    rates: tuple[float, ...]
    dtype: str
    implementation: str | None
    seed: int

    @property
    def loss_every(self) -> int:
        """The steps between two losses that are kept."""
        return max(1, self.steps // 200)


PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "dim": 4, "width": 32, "heads": 1, "length": 96, "segments": (32,), "batch": 16, "steps": 600,
        "rates": (1e-2, 2e-2), "dtype": "float32",
    },
    "full": {
        "dim": 32, "width": 128, "heads": 1, "length": 512, "segments": (64, 128, 256), "batch": 64, "steps": 4000,
        "rates": (1e-3, 3e-3, 1e-2), "dtype": AUTO,
    },
}  # fmt: skip
EVALUATED = 512  # sequences of the validation and of the test data
SPREAD = 0.7  # of the cone: an input is c + SPREAD u, with c and u of unit length, brought to the norm sqrt(d)


def regression_data(key: Array, batch: int, length: int, dim: int, segment: int) -> tuple[Array, Array]:
    """Draws inputs and targets of the task, ``(batch, length, dim)`` each; targets have variance 1.

    Args:
        key: a PRNG key.
        batch: how many sequences.
        length: a multiple of ``segment``.
        dim: of the inputs and of the targets.
        segment: positions with one map.
    """
    cones, spread, maps = jax.random.split(key, 3)

    def normal(key: Array, rows: int) -> Array:
        # on a GPU XLA makes random numbers within all that uses them, and compiles that for minutes
        return jax.lax.optimization_barrier(jax.random.normal(key, (batch, length // segment, rows, dim)))

    def directions(key: Array, positions: int) -> Array:
        x = normal(key, positions)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    x = directions(cones, 1) + SPREAD * directions(spread, segment)
    x *= math.sqrt(dim) / jnp.linalg.norm(x, axis=-1, keepdims=True)
    w = normal(maps, dim) / math.sqrt(dim)
    # exact products: the task is not to be noisy
    y = jnp.einsum("bgti,bgij->bgtj", x, w, precision="highest")
    return x.reshape(batch, length, dim), y.reshape(batch, length, dim)


class RegressionModel(nnx.Module):
    """Inputs and targets ``(B, T, dim)`` to predictions of the targets, each from its input and the pairs before it."""

    def __init__(self, attention: str, config: Config, *, rngs: nnx.Rngs):
        # in float32 whatever the dtype: input, output and, with them, the residual stream
        self.embed = nnx.Linear(2 * config.dim, config.width, use_bias=False, rngs=rngs)
        self.transformer = Transformer(
            attention,
            config.width,
            2,
            config.heads,
            mlp=False,
            dtype=compute_dtype(config.dtype, config.width // config.heads),
            implementation=config.implementation,
            rngs=rngs,
        )
        self.head = nnx.Linear(config.width, config.dim, use_bias=False, rngs=rngs)

    def __call__(self, x: Array, y: Array) -> Array:
        before = jnp.pad(y, [(0, 0), (1, 0), (0, 0)])[:, :-1]
        return self.head(self.transformer(self.embed(jnp.concatenate([x, before], axis=-1))))


def make_job(config: Config, attention: str, segment: int) -> Job:
    def build(rngs: nnx.Rngs) -> RegressionModel:
        return RegressionModel(attention, config, rngs=rngs)

    def errors(model: RegressionModel, key: Array) -> Array:
        """``(length,)``, the mean over a batch."""
        x, y = regression_data(key, config.batch, config.length, config.dim, segment)
        return jnp.mean(jnp.square(model(x, y) - y), axis=(0, 2))

    def loss(model: RegressionModel, key: Array) -> Array:
        return errors(model, key).mean()

    def evaluate(model: RegressionModel, key: Array) -> Array:
        keys = jax.random.split(key, math.ceil(EVALUATED / config.batch))
        return jax.lax.map(lambda key: errors(model, key), keys).mean(axis=0)

    return Job(build, loss, evaluate, Budget(config.steps, config.rates, 0.0, config.seed))


def job_name(attention: str, segment: int) -> str:
    return f"{attention} segments of {segment}"


def run(config: Config, results: Results, attentions: Sequence[str] = ATTENTIONS) -> None:
    """Trains what is missing in the results."""
    jobs: list[tuple[str, Callable[[], Job]]] = []
    for segment in config.segments:
        for attention in attentions:
            name = job_name(attention, segment)
            if name not in results.finished:
                jobs.append((name, lambda case=(attention, segment): make_job(config, *case)))
    for name, outcome in run_all(jobs):
        by_rate = outcome.validation.mean(axis=1)
        best = best_rate(-by_rate)
        results.add(
            name,
            {
                "error": float(outcome.test[best].mean()),
                "error_by_position": np.float64(outcome.test[best]).round(6).tolist(),
                "rate": config.rates[best],
                "validation_error_by_rate": by_rate.tolist(),
                "loss": np.float64(outcome.losses[best, :: config.loss_every]).round(6).tolist(),
                "seconds": outcome.seconds,
            },
        )


def within_segment(result: dict[str, Any], segment: int) -> np.ndarray:
    """The error by position within a segment, ``(segment,)``: the mean over all segments but the first.

    In the first there is no other map in the past.
    """
    return np.reshape(result["error_by_position"], (-1, segment))[1:].mean(axis=0)


def table(config: Config, results: Results, attentions: Sequence[str] = ATTENTIONS) -> str:
    lines = [
        "squared error / variance of the targets: all positions; first, last quarter of the segments after the first",
        f"segment{''.join(f'{TITLES[a]:^32}' for a in attentions)}",
        " " * 7 + "     all   first    last    (rate)" * len(attentions),
    ]
    for segment in config.segments:
        cells = ""
        for attention in attentions:
            result = results.finished[job_name(attention, segment)]
            error = within_segment(result, segment)
            quarters = f"{error[: segment // 4].mean():7.4f} {error[-(segment // 4) :].mean():7.4f}"
            cells += f" {result['error']:7.4f} {quarters} ({result['rate']:6g})"
        lines.append(f"{segment:7d}{cells}")
    return "\n".join(lines)


def plot(config: Config, results: Results, attentions: Sequence[str] = ATTENTIONS) -> Figure:
    """Error against position within a segment above, the loss in training below; a column per segment length."""
    columns = len(config.segments)
    figure = Figure(figsize=(1.5 + 3.4 * columns, 5.5), layout="constrained")
    grid = figure.subplots(2, columns, sharey=True, squeeze=False)
    for (above, below), segment in zip(grid.T, config.segments, strict=True):
        for attention in reversed(attentions):  # LLA on top
            result = results.finished[job_name(attention, segment)]
            color = COLORS[attention]
            above.plot(np.arange(segment) + 1, within_segment(result, segment), color=color, label=TITLES[attention])
            steps = np.arange(len(result["loss"])) * config.loss_every
            below.plot(steps, result["loss"], color=color, linewidth=1)
        above.set_title(f"segments of {segment}", fontsize=10)
        above.set_xlabel("position in the segment")
        below.set_xlabel("step")
        for ax in (above, below):
            ax.set_yscale("log")
            ax.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("relative squared error, test")
    grid[1, 0].set_ylabel("training loss")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.suptitle(f"In-context regression, d = {config.dim}", fontsize=12)
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(attentions), frameon=False)
    return figure


def _parser() -> argparse.ArgumentParser:
    parser, size = sweep_parser(__doc__, PRESETS, "in_context_regression")
    size.add_argument("--dim", type=number(int, 1), help="of inputs and targets")
    for name in ("width", "heads", "length"):
        size.add_argument(f"--{name}", type=number(int, 1))
    size.add_argument("--segments", type=number(int, 4), nargs="+", help="lengths of segments, one sweep each")
    return parser


def _config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    values: dict[str, Any] = {name: getattr(args, name) or default for name, default in PRESETS[args.preset].items()}
    values |= {name: tuple(values[name]) for name in ("segments", "rates")}
    config = Config(**values, implementation=args.implementation, seed=args.seed)
    refuse_repetition(parser, config, "segments", "rates")
    for segment in config.segments:
        if config.length % segment or config.length < 2 * segment:
            parser.error(
                f"argument --segments: {segment} must fit twice or more, and evenly, in --length {config.length}"
            )
    if config.width % (2 * config.heads):
        parser.error(f"argument --width: {config.width} must be an even multiple of --heads, {config.heads}")
    return config


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    config = _config(parser, args)
    remarks = ["a small version of the task; --preset full has d = 32"] if args.preset == "small" else []
    remarks.append(
        f"{jax.devices()[0].device_kind}, {config.steps} steps of {config.batch} sequences of {config.length}"
    )
    losses = len(range(0, config.steps, config.loss_every))
    shapes = {"error": (), "error_by_position": (config.length,), "rate": (), "loss": (losses,)}
    name = "in_context_regression"
    carry_out(parser, args, config, name, run=run, table=table, plot=plot, shapes=shapes, remarks=remarks)


if __name__ == "__main__":
    main()
