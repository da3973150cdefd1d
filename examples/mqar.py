"""Multi-query associative recall: LLA, Parallax, softmax attention and linear attention, trained under one budget.

    python examples/mqar.py                      # a small version, minutes on two CPU cores
    python examples/mqar.py --preset full        # the published sizes, on a GPU
    python examples/mqar.py --attention parallax # one of the methods, or some of them

The task is that of Zoology (Arora et al., arXiv 2312.04927). A sequence begins with pairs of a key and a value, which
are tokens of two disjoint halves of the vocabulary. Then, at random places, each key comes once more, and the model has
to name its value there; between the queries stands random filler. The distances to the queries follow a power law.
What is scored, in training too, is the prediction at the queries alone.

The models have two layers of one head and no MLP, learned positions, and an output tied to the embedding; none has a
convolution. Every method has the same widths, steps, batches and learning rates; the rate with the best accuracy on
validation data counts, and the table is of test data. A stopped sweep goes on where it was, with the same command.
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
from common.transformer import ATTENTIONS, AUTO, COLORS, LINES, LLA, TITLES, Array, Transformer, compute_dtype
from flax import nnx

try:
    import optax
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')

POWER = 0.01  # Zoology's power_a: the probability of a distance g is proportional to g ** (POWER - 1)


@dataclass(frozen=True)
class Config:
    """What a result depends on, but for method, width and length."""

    vocabulary: int
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    pairs: tuple[int, ...]  # by length
    batch: int
    steps: int
    rates: tuple[float, ...]
    ridge: float  # of LLA, initially
    dtype: str
    implementation: str | None
    seed: int

    @property
    def loss_every(self) -> int:
        """The steps between two losses that are kept."""
        return max(1, self.steps // 100)


# At width 256 and a learning rate of 0.01, the slowest solve of 512 took 37 steps and more after 40 steps of training
# with a ridge from 1, and 14 with one from 10. A width of 32 learns faster with 1.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "vocabulary": 64, "widths": (32, 64), "lengths": (32,), "pairs": (4,), "batch": 32, "steps": 750,
        "rates": (1e-3, 3e-3), "ridge": 1.0, "dtype": "float32",
    },
    "full": {
        "vocabulary": 8192, "widths": (64, 128, 256), "lengths": (64, 128, 256), "pairs": (4, 8, 16), "batch": 128,
        "steps": 1500, "rates": (1e-3, 3e-3, 1e-2), "ridge": 10.0, "dtype": AUTO,
    },
}  # fmt: skip
EVALUATED = 1024  # sequences of the validation and of the test data


def recall_data(key: Array, batch: int, length: int, pairs: int, vocabulary: int) -> tuple[Array, Array, Array]:
    """Draws sequences of the task.

    Args:
        key: a PRNG key.
        batch: how many.
        length: tokens in each, at least ``4 * pairs``.
        pairs: distinct keys in each, each queried once; values are distinct too.
        vocabulary: keys are from 1 to half of it, values from there on; filler is any token.

    Returns:
        The tokens ``(batch, length)``; the places of the queries ``(batch, pairs)``; the value due at each.
    """
    half, space = vocabulary // 2, (length - 2 * pairs) // 2
    drawn = jax.random.split(key, 4)

    def choose(key: Array, log_weights: Array) -> Array:
        """Indices without repetition, in the order of drawing (the Gumbel top-k trick)."""
        scores = log_weights + jax.random.gumbel(key, (batch, log_weights.size))
        return jax.lax.top_k(scores, pairs)[1]

    keys = 1 + choose(drawn[0], jnp.zeros(half - 1))
    values = half + choose(drawn[1], jnp.zeros(vocabulary - half))
    places = 2 * pairs + 2 * choose(drawn[2], (POWER - 1) * jnp.log(jnp.arange(1.0, space + 1)))
    context = jnp.stack([keys, values], axis=-1).reshape(batch, 2 * pairs)
    filler = jax.random.randint(drawn[3], (batch, length - 2 * pairs), 0, vocabulary)
    tokens = jnp.concatenate([context, filler], axis=1)
    return tokens.at[jnp.arange(batch)[:, None], places].set(keys), places, values


class RecallModel(nnx.Module):
    """Tokens ``(B, T)`` and places ``(B, K)`` to the logits at those places, ``(B, K, vocabulary)``."""

    def __init__(self, attention: str, width: int, length: int, config: Config, *, rngs: nnx.Rngs):
        dtype = compute_dtype(config.dtype, width)
        # rows of norm 1: from the usual 0.02 softmax attention needs several times as many steps
        init = nnx.initializers.normal(width**-0.5)
        self.embed = nnx.Embed(config.vocabulary, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(length, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.transformer = Transformer(
            attention,
            width,
            2,
            1,
            mlp=False,
            rope=False,
            ridge_lambda=config.ridge,
            dtype=dtype,
            implementation=config.implementation,
            rngs=rngs,
        )

    def __call__(self, tokens: Array, places: Array) -> Array:
        x = self.transformer(self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1])))
        return self.embed.attend(jnp.take_along_axis(x, places[..., None], axis=1)).astype(jnp.float32)


def make_job(config: Config, attention: str, width: int, length: int, pairs: int) -> Job:
    def build(rngs: nnx.Rngs) -> RecallModel:
        return RecallModel(attention, width, length, config, rngs=rngs)

    def loss(model: RecallModel, key: Array) -> Array:
        tokens, places, answers = recall_data(key, config.batch, length, pairs, config.vocabulary)
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens, places), answers).mean()

    def accuracy(model: RecallModel, key: Array) -> Array:
        def correct(key: Array) -> Array:
            tokens, places, answers = recall_data(key, config.batch, length, pairs, config.vocabulary)
            logits = model(tokens, places)
            # NaN for a model that diverged: argmax would take the first token
            return jnp.where(jnp.isfinite(logits).all(), jnp.mean(logits.argmax(-1) == answers), jnp.nan)

        return jax.lax.map(correct, jax.random.split(key, math.ceil(EVALUATED / config.batch))).mean()

    return Job(build, loss, accuracy, Budget(config.steps, config.rates, 0.1, config.seed))


def run(config: Config, results: Results, attentions: Sequence[str] = ATTENTIONS) -> None:
    """Trains what is missing in the results."""
    jobs: list[tuple[str, Callable[[], Job]]] = []
    for length, pairs in zip(config.lengths, config.pairs, strict=True):
        for width in config.widths:
            for attention in attentions:
                name = job_name(attention, width, length)
                if name not in results.finished:
                    case = (attention, width, length, pairs)
                    jobs.append((name, lambda case=case: make_job(config, *case)))
    for name, outcome in run_all(jobs):
        best = best_rate(outcome.validation)
        results.add(
            name,
            {
                "accuracy": float(outcome.test[best]),
                "rate": config.rates[best],
                "validation_accuracy_by_rate": outcome.validation.tolist(),
                "loss": np.float64(outcome.losses[best, :: config.loss_every]).round(5).tolist(),
                "seconds": outcome.seconds,
            },
        )


def job_name(attention: str, width: int, length: int) -> str:
    return f"{attention} width {width} length {length}"


def table(config: Config, results: Results, attentions: Sequence[str] = ATTENTIONS) -> str:
    lines = [
        f"test accuracy (learning rate); chance is {2 / config.vocabulary:.4f} among the values",
        f"length pairs width{''.join(f'{TITLES[a]:>26}' for a in attentions)}",
    ]
    for length, pairs in zip(config.lengths, config.pairs, strict=True):
        for width in config.widths:
            found = [results.finished[job_name(a, width, length)] for a in attentions]
            cells = "".join(f"{x['accuracy']:17.4f} ({x['rate']:6g})" for x in found)
            lines.append(f"{length:6d} {pairs:5d} {width:5d}{cells}")
    return "\n".join(lines)


# LLA and softmax attention are often both at 1: of two markers the larger one is seen around the other
SIZES = {a: 10 if a == LLA else 6 for a in ATTENTIONS}


def plot(config: Config, results: Results, attentions: Sequence[str] = ATTENTIONS) -> Figure:
    """Accuracy against width above, the loss in training below; a column per length."""
    columns = len(config.lengths)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 5.5), layout="constrained")
    grid = figure.subplots(2, columns, sharey="row", squeeze=False)
    for (above, below), length, pairs in zip(grid.T, config.lengths, config.pairs, strict=True):
        for a in reversed(attentions):  # LLA on top
            found = [results.finished[job_name(a, width, length)] for width in config.widths]
            style = {"color": COLORS[a], "markerfacecolor": "none", "markersize": SIZES[a], "label": TITLES[a]}
            above.plot(config.widths, [x["accuracy"] for x in found], LINES[a], **style)
            for x, opacity in zip(found, np.linspace(0.35, 1.0, len(found)), strict=True):
                steps = np.arange(len(x["loss"])) * config.loss_every
                below.plot(steps, x["loss"], color=COLORS[a], alpha=opacity, linewidth=1)
        above.set_title(f"length {length}, {pairs} pairs", fontsize=10)
        above.set_xscale("log", base=2)
        above.set_xticks(config.widths, [str(width) for width in config.widths])
        above.set_xlabel("width")
        above.set_ylim(-0.03, 1.08)
        below.set_xlabel("step (darker: wider)")
        for ax in (above, below):
            ax.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("test accuracy")
    grid[1, 0].set_ylabel("training loss")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.suptitle(f"Multi-query associative recall, vocabulary {config.vocabulary}", fontsize=12)
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(attentions), frameon=False)
    return figure


def _parser() -> argparse.ArgumentParser:
    parser, size = sweep_parser(__doc__, PRESETS, "mqar")
    size.add_argument("--vocabulary", type=number(int, 1))
    size.add_argument("--widths", type=number(int, 1), nargs="+")
    size.add_argument("--ridge", type=number(float, 0, above=True), help="of LLA at the start; it is learned")
    size.add_argument("--lengths", type=number(int, 1), nargs="+")
    size.add_argument("--pairs", type=number(int, 1), nargs="+", help="one per length")
    return parser


def _config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    values: dict[str, Any] = {name: getattr(args, name) or default for name, default in PRESETS[args.preset].items()}
    values |= {name: tuple(values[name]) for name in ("widths", "lengths", "pairs", "rates")}
    config = Config(**values, implementation=args.implementation, seed=args.seed)
    refuse_repetition(parser, config, "lengths", "widths", "rates")
    if len(config.pairs) != len(config.lengths):
        parser.error(f"argument --pairs: {len(config.pairs)} given for {len(config.lengths)} --lengths")
    for length, pairs in zip(config.lengths, config.pairs, strict=True):
        if length < 4 * pairs:
            parser.error(
                f"argument --pairs: {pairs} pairs and their queries need a length of {4 * pairs}, not {length}"
            )
    if config.vocabulary < 2 * max(config.pairs) + 2:
        parser.error(f"argument --vocabulary: {config.vocabulary} is too small for {max(config.pairs)} distinct keys")
    return config


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    config = _config(parser, args)
    remarks = ["a small version of the task; --preset full has the published sizes"] if args.preset == "small" else []
    remarks.append(f"{jax.devices()[0].device_kind}, {config.steps} steps of {config.batch} sequences")
    shapes = {"accuracy": (), "rate": (), "loss": (len(range(0, config.steps, config.loss_every)),)}
    carry_out(parser, args, config, "mqar", run=run, table=table, plot=plot, shapes=shapes, remarks=remarks)


if __name__ == "__main__":
    main()
