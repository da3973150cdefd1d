"""Test-time regression on a stream, without training: Local Linear Attention against softmax attention and ridge.

    python examples/stream_regression.py                    # the synthetic stream
    python examples/stream_regression.py --data sunspots    # a real series: co2, sunspots or elnino
    python examples/stream_regression.py --help

Pairs (key, value) arrive one at a time. Every method predicts the next value from its key and the pairs before it, and
nothing is learned but what the attention itself fits to those pairs: LLA a local linear regression, softmax attention
a local average, global ridge (LLA with ``qk_scale = 0``) one linear regression over the whole prefix.

**The synthetic stream** follows the first experiment of the LLA paper (arXiv 2510.01450). It consists of segments.
Each draws a direction c and a matrix W at random; its keys lie in a cone around c, its values are ``v = W k`` plus a
little noise. So the stream is linear within a segment, and both the line and the place of the keys change between
segments. All keys have the norm sqrt(d), hence exp(qk_scale q.k) = exp(scale cos(q, k)) with qk_scale = scale / d: a
kernel of the angle, the same for every d, under which the pairs of other segments weigh little. All methods get the
same scale and the same ridge; the default scale is about the one that serves softmax attention best. The error is
the squared error over the variance of the values, averaged over independent streams.

**Real series** (as shipped in statsmodels) become such a stream: the key of a position is the vector of the last
``--lags`` values before it, its value the one that follows. Windows (lags and target) with a missing value are left
out. The first third of the windows chooses, for each method by itself, the kernel's scale, the ridge and whether
values are taken as they are or relative to the last one; the rest is forecast once with that choice and scored. The
first ``2 * lags`` windows are a warm-up: they set the unit of the values and are not scored.

Prints the table, writes the plot, and runs in half a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from common.streams import REAL, Series, Windows, cut_windows, describe, load_series, synthetic_stream

from flashlla_jax import lla_attention
from flashlla_jax.attention import Implementation

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')

LLA, SOFTMAX, RIDGE, LAST = "LLA", "softmax attention", "global ridge", "last value"
METHODS = (LLA, SOFTMAX, RIDGE)
COLORS = {LLA: "#0072B2", SOFTMAX: "#D55E00", RIDGE: "#009E73", LAST: "#777777"}  # told apart by colour-blind readers

DEFAULT_SCALE, DEFAULT_RIDGE = 24.0, 0.01

# What the first third of a real series chooses from. Keys have entries of size 1, logits are scale * mean(q * k).
SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)


@partial(jax.jit, static_argnames=("method", "scale", "implementation"))
def predict(
    method: str,
    keys: jax.Array,
    values: jax.Array,
    ridge: jax.Array,
    scale: float,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Predicts every value of a stream but the first, each from its key and the pairs before it.

    Args:
        method: LLA, SOFTMAX or RIDGE.
        keys: ``(B, S, D)``.
        values: ``(B, S, Dv)`` with ``Dv <= D``.
        ridge: the ridge, a number or ``(B, 1)``; softmax attention has none.
        scale: the logits are ``scale / D * q.k``; global ridge has none.
        implementation: of :func:`flashlla_jax.lla_attention`.

    Returns:
        ``(B, S - 1, Dv)``; entry i is the prediction of ``values[:, i + 1]``.
    """
    # Causal attention lets query i see pair i, so query i is the key after it.
    query, key, value = keys[:, 1:], keys[:, :-1], values[:, :-1]
    dim, width = key.shape[-1], value.shape[-1]
    if method == SOFTMAX:
        padded = jnp.pad(value, [(0, 0), (0, 0), (0, dim - width)])  # this function wants values as wide as keys
        heads = (x[:, :, None] for x in (query, key, padded))
        return jax.nn.dot_product_attention(*heads, scale=scale / dim, is_causal=True)[:, :, 0, :width]
    qk_scale = 0.0 if method == RIDGE else scale / dim
    return lla_attention(
        query, key, value, ridge_lambda=ridge, qk_scale=qk_scale, precision="highest", implementation=implementation
    )


# ---- the synthetic stream


@dataclass(frozen=True)
class Curves:
    """One configuration's error against position, ``(length,)`` by method; NaN at position 0, which has no past."""

    dim: int
    segment: int
    errors: dict[str, np.ndarray]

    def quarters(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """The mean error over the first and over the last quarter of each segment."""
        by_segment = self.errors[method].reshape(-1, self.segment)
        quarter = self.segment // 4
        return np.nanmean(by_segment[:, :quarter], axis=1), np.mean(by_segment[:, -quarter:], axis=1)

    def overall(self, method: str) -> float:
        return float(np.nanmean(self.errors[method]))

    def improved(self) -> int:
        """In how many segments LLA's error is lower in the last quarter than in the first."""
        first, last = self.quarters(LLA)
        return int(np.sum(last < first))


def synthetic_curves(args: argparse.Namespace) -> list[Curves]:
    configurations = list(itertools.product(args.dims, args.segments))
    results = []
    with tqdm(total=len(configurations) * len(METHODS), desc="synthetic", unit="run") as bar:
        for dim, segment in configurations:
            rng = np.random.default_rng((args.seed, dim, segment))
            keys, values = synthetic_stream(rng, args.streams, args.length, dim, segment)
            errors = {}
            for method in METHODS:
                bar.set_postfix_str(f"d={dim} segment={segment} {method}")
                predicted = predict(
                    method, keys, values, jnp.float32(args.ridge), args.scale, implementation=args.implementation
                )
                squared = np.mean((np.asarray(predicted) - values[:, 1:]) ** 2, axis=(0, 2)) / np.var(values)
                errors[method] = np.concatenate([[np.nan], squared])
                bar.update()
            results.append(Curves(dim, segment, errors))
    return results


def synthetic_table(curves: Sequence[Curves]) -> str:
    """Mean error in the first and last quarter of the segments and overall, and whether LLA improved in each."""
    lines = [
        "squared error / variance of the values; first and last quarter of the segments, and all positions",
        " " * 12 + "".join(f"  {method:^23}" for method in METHODS) + "  LLA improves",
        "   d segment" + "    first    last     all" * len(METHODS) + "  in segments",
    ]
    for c in curves:
        cells = ""
        for method in METHODS:
            first, last = c.quarters(method)
            cells += f"   {first.mean():6.4f}  {last.mean():6.4f}  {c.overall(method):6.4f}"
        lines.append(f"{c.dim:4d} {c.segment:7d}{cells}  {c.improved()} of {c.errors[LLA].size // c.segment}")
    improved, segments = sum(c.improved() for c in curves), sum(c.errors[LLA].size // c.segment for c in curves)
    lines.append(f"LLA improves in every segment: {'yes' if improved == segments else 'no'} ({improved} of {segments})")
    for method in METHODS:
        wins = sum(method == min(METHODS, key=c.overall) for c in curves)
        lines.append(f"lowest error over all positions: {method} in {wins} of {len(curves)} configurations")
    return "\n".join(lines)


def plot_synthetic(curves: Sequence[Curves], args: argparse.Namespace) -> Figure:
    rows, columns = len(args.dims), len(args.segments)
    figure = Figure(figsize=(1.5 + 3.6 * columns, 1.4 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, c in zip(grid.flat, curves, strict=True):
        for boundary in range(c.segment, args.length, c.segment):
            ax.axvline(boundary, color="0.85", linewidth=0.8, zorder=0)
        for method in reversed(METHODS):  # LLA on top
            # means of four positions: less jagged, and no mean straddles a boundary
            errors = np.nanmean(c.errors[method].reshape(-1, 4), axis=1)
            ax.plot(4 * np.arange(errors.size) + 1.5, errors, color=COLORS[method], linewidth=1.2, label=method)
        ax.set_yscale("log")
        ax.set_xlim(0, args.length)
        ax.set_title(f"d = {c.dim}, segments of {c.segment}", fontsize=10)
        _clean(ax)
    for ax in grid[-1]:
        ax.set_xlabel("position in the stream")
    for ax in grid[:, 0]:
        ax.set_ylabel("relative squared error")
    figure.suptitle(
        f"Piecewise-linear stream, no training: error of the next value (mean of {args.streams} streams)", fontsize=12
    )
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(METHODS), frameon=False)
    return figure


# ---- real series


@dataclass(frozen=True)
class Setting:
    """What a method is run with; None where the method has no such thing."""

    relative: bool  # lags and target minus the last lag, against lags and target minus the warm-up's mean
    scale: float | None
    ridge: float | None


def forecast(
    method: str, windows: Windows, settings: Sequence[Setting], implementation: Implementation | None = None
) -> np.ndarray:
    """One-step forecasts of every target under each setting, ``(len(settings), n)``; the first window's are NaN.

    A forecast after the warm-up depends on nothing later than its own lags: the unit and the offset come from the
    warm-up or from the lags themselves. The settings share one scale.
    """
    last, warmup = windows.lags[:, -1], windows.warmup
    mean = windows.lags[:warmup].mean()
    unit = {False: windows.lags[:warmup].std(), True: np.std(np.diff(windows.lags[:warmup], axis=1))}
    offset = {False: np.full_like(last, mean), True: last}

    keys = np.stack([(windows.lags - offset[s.relative][:, None]) / unit[s.relative] for s in settings])
    values = np.stack([(windows.target - offset[s.relative]) / unit[s.relative] for s in settings])
    ridge = np.array([[1.0 if s.ridge is None else s.ridge] for s in settings])  # no ridge: softmax does not read it
    scale = settings[0].scale or 0.0
    # lag vectors are nearly collinear, and the ridge small
    with jax.enable_x64(True):
        stream = (jnp.asarray(keys), jnp.asarray(values[..., None]), jnp.asarray(ridge))
        predicted = np.asarray(predict(method, *stream, scale, implementation=implementation))[..., 0]
    forecasts = np.full(values.shape, np.nan)
    for row, p, s in zip(forecasts, predicted, settings, strict=True):
        row[1:] = p * unit[s.relative] + offset[s.relative][1:]
    return forecasts


def candidates(method: str, args: argparse.Namespace) -> Iterator[list[Setting]]:
    """The settings to choose from, in lists that share a scale; what the command line gives is kept to."""
    scales = (None,) if method == RIDGE else SCALES if args.scale is None else (args.scale,)
    ridges = (None,) if method == SOFTMAX else RIDGES if args.ridge is None else (args.ridge,)
    relative = (False, True) if args.values is None else (args.values == "relative",)
    for scale in scales:
        yield [Setting(*setting) for setting in itertools.product(relative, (scale,), ridges)]


def rmse(forecasts: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean((forecasts - target) ** 2, axis=-1))


def choose(method: str, windows: Windows, args: argparse.Namespace, bar: tqdm) -> Setting:
    """The setting with the lowest RMSE on the first third after the warm-up, from that third alone."""
    past = windows.head(windows.third)
    scores = []
    for settings in candidates(method, args):
        forecasts = forecast(method, past, settings, args.implementation)[:, past.warmup :]
        scores += zip(rmse(forecasts, past.target[past.warmup :]), settings, strict=True)
        bar.update()
    return min(scores, key=lambda score: score[0])[1]


def real_forecasts(windows: Windows, args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, Setting]]:
    """The forecasts of all targets by method, the last value's among them, and the settings that were chosen."""
    forecasts, chosen = {}, {}
    total = sum(len(list(candidates(method, args))) + 1 for method in METHODS)
    with tqdm(total=total, desc=args.data, unit="run") as bar:
        for method in METHODS:
            bar.set_postfix_str(method)
            chosen[method] = choose(method, windows, args, bar)
            forecasts[method] = forecast(method, windows, [chosen[method]], args.implementation)[0]
            bar.update()
    forecasts[LAST] = windows.lags[:, -1]
    return forecasts, chosen


def real_table(series: Series, windows: Windows, forecasts: dict[str, np.ndarray], chosen: dict[str, Setting]) -> str:
    target = windows.target[windows.third :]
    scores = {method: rmse(f[windows.third :], target) for method, f in forecasts.items()}
    lines = [
        describe(series, windows),
        f"one-step forecasts, errors in {series.unit}",
        f"{'method':18}  {'values':10} {'scale':>6} {'ridge':>6} {'RMSE':>9} {'MAE':>9}  RMSE / last value's",
    ]
    for method, f in forecasts.items():
        setting = chosen.get(method)
        cells = ("-", "-", "-")
        if setting is not None:
            given = ("-" if x is None else f"{x:g}" for x in (setting.scale, setting.ridge))
            cells = ("relative" if setting.relative else "level", *given)
        mae = np.mean(np.abs(f[windows.third :] - target))
        lines.append(
            f"{method:17} {cells[0]:>12} {cells[1]:>6} {cells[2]:>6} {scores[method]:9.4f} {mae:9.4f}  "
            f"{scores[method] / scores[LAST]:.3f}"
        )
    order = sorted(scores, key=lambda method: scores[method])
    lines.append("from the lowest RMSE to the highest: " + ", ".join(order))
    return "\n".join(lines)


def plot_real(series: Series, windows: Windows, forecasts: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(10.5, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    shown = slice(-4 * windows.lags.shape[1], None)  # four cycles: the methods can still be told apart
    top.plot(windows.times[shown], windows.target[shown], "o", color="black", markersize=3, label="observed")
    for method in reversed(METHODS):
        top.plot(windows.times[shown], forecasts[method][shown], color=COLORS[method], linewidth=1.2, label=method)
    top.set_ylabel(series.unit)
    top.set_title("one-step forecasts at the end of the series", fontsize=10)

    squared = {m: np.cumsum((f - windows.target)[windows.third :] ** 2) for m, f in forecasts.items()}
    for method in reversed(METHODS):
        ratio = np.sqrt(squared[method] / squared[LAST])
        bottom.plot(windows.times[windows.third :], ratio, color=COLORS[method], linewidth=1.2, label=method)
    bottom.axhline(1.0, color=COLORS[LAST], linestyle="--", linewidth=1.0, label=LAST)
    bottom.set_ylabel("RMSE / last value's")
    bottom.set_xlabel("year")
    # the first ratios are of a few errors only and would set the axis
    bottom.set_ylim(0.0, 1.5)
    bottom.set_title("error so far, from the first scored position", fontsize=10)
    for ax in (top, bottom):
        ax.margins(x=0.01)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], fontsize=8, ncols=2, framealpha=0.9)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _clean(ax)
    figure.suptitle(f"{series.title}: no training, each forecast from the past alone", fontsize=12)
    return figure


def _clean(ax: Axes) -> None:
    ax.grid(axis="y", color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


# ---- the command line


def _positive(kind: type[int] | type[float]):
    def parse(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it: "invalid positive float value: '-1'"
    return parse


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, number = _positive(int), _positive(float)
    parser.add_argument("--data", choices=("synthetic", *REAL), default="synthetic", help="default: synthetic")
    parser.add_argument(
        "--output", type=Path, metavar="PATH.png", help="the plot; default: outputs/stream_regression_<data>.png"
    )
    parser.add_argument(
        "--ridge", type=number, help=f"default: {DEFAULT_RIDGE:g} (synthetic), chosen on the first third (real)"
    )
    parser.add_argument(
        "--scale",
        type=number,
        help=f"logits are scale / dimension * q.k; default: {DEFAULT_SCALE:g} (synthetic), chosen likewise (real)",
    )
    parser.add_argument(
        "--implementation", choices=get_args(Implementation), help="of lla_attention; default: the best that runs here"
    )
    synthetic = parser.add_argument_group("synthetic stream")
    synthetic.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    synthetic.add_argument("--length", type=count, default=1024, help="positions; default: %(default)s")
    synthetic.add_argument("--streams", type=count, default=32, help="independent streams; default: %(default)s")
    synthetic.add_argument("--dims", type=count, nargs="+", default=[8, 16, 32], help="default: 8 16 32")
    synthetic.add_argument(
        "--segments", type=count, nargs="+", default=[64, 128, 256], help="segment lengths; default: 64 128 256"
    )
    real = parser.add_argument_group("real series")
    real.add_argument(
        "--values",
        choices=("level", "relative"),
        help="whether values are taken as they are or relative to the last one; default: chosen on the first third",
    )
    real.add_argument(
        "--lags", type=count, help="values in a lag vector; default: 52 (co2), 11 (sunspots), 12 (elnino)"
    )
    return parser


def _check_synthetic(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("lags", "values"):
        if getattr(args, name) is not None:
            parser.error(f"argument --{name}: is for the real series; give --data co2, sunspots or elnino")
    if args.seed < 0:
        parser.error(f"argument --seed: must be >= 0, got {args.seed}")
    for segment in args.segments:
        if segment % 4:
            parser.error(f"argument --segments: must be multiples of 4 (quarters are compared), got {segment}")
        if args.length < 2 * segment or args.length % segment:
            parser.error(
                f"argument --length: {args.length} must be a multiple of every segment length and hold at least two "
                f"segments, which {segment} (--segments) does not allow"
            )


def _windows(parser: argparse.ArgumentParser, args: argparse.Namespace, series: Series) -> Windows:
    lags = series.lags if args.lags is None else args.lags
    windows = cut_windows(series, lags) if lags < len(series.values) else None
    if windows is None or windows.third <= windows.warmup:
        parser.error(
            f"argument --lags: {lags} is too many for {args.data} ({len(series.values)} values): the first third of "
            "the complete windows must be longer than the warm-up of 2 * lags"
        )
    return windows


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    output = args.output or Path("outputs") / f"stream_regression_{args.data}.png"
    if output.suffix.lower() != ".png":
        parser.error(f"argument --output: must end in .png, got {output}")

    if args.data == "synthetic":
        _check_synthetic(parser, args)
        args.ridge = args.ridge or DEFAULT_RIDGE
        args.scale = args.scale or DEFAULT_SCALE
        curves = synthetic_curves(args)
        print(f"scale {args.scale:g}, ridge {args.ridge:g}, {args.streams} streams of {args.length} positions")
        print(synthetic_table(curves))
        figure = plot_synthetic(curves, args)
    else:
        series = load_series(args.data)
        windows = _windows(parser, args, series)
        forecasts, chosen = real_forecasts(windows, args)
        print(real_table(series, windows, forecasts, chosen))
        figure = plot_real(series, windows, forecasts)

    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    print(f"plot: {output}")


if __name__ == "__main__":
    main()
