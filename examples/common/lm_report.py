"""What ``train_char_lm.py`` prints and writes of its runs: the table, the JSON and the plot."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .char_lm import SOLVES, Config
from .stdlib_text import VOCABULARY
from .transformer import COLORS, LINES, TITLES

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')


@dataclass(frozen=True)
class Result:
    config: Config
    parameters: int
    history: dict[str, np.ndarray]
    solver_steps: list[float] | None

    @property
    def step_seconds(self) -> float:
        """The median, without the steps that compiled."""
        seconds = self.history["seconds"]
        return float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else math.nan

    @property
    def validation(self) -> list[tuple[int, float]]:
        """Steps taken and the loss after them."""
        return self.evaluations("validation")

    def evaluations(self, name: str) -> list[tuple[int, float]]:
        """Steps taken and a figure of the history after them; empty where it was never taken."""
        values = self.history[name]
        return [(int(i) + 1, float(values[i])) for i in np.flatnonzero(np.isfinite(values))]

    def as_json(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "parameters": self.parameters,
            "median_step_seconds": self.step_seconds,
            "solver_steps_by_layer": self.solver_steps,
            "validation_loss": self.validation[-1][1],
            "validation": self.validation,
            "solves": {name: self.evaluations(name) for name in SOLVES},
            "loss": [float(x) for x in self.history["loss"]],
        }


def progress(step: int, loss: float, figures: dict[str, float]) -> str:
    """The line of an evaluation; what LLA's solves did is in it if there were any."""
    line = f"step {step}: loss {loss:.4f}, validation loss {figures['validation']:.4f}"
    if not SOLVES.keys() <= figures.keys():
        return line
    return (
        f"{line}; solves: {figures['iterations']:.1f} steps in the mean, relative error up to "
        f"{figures['relative_error']:.1e}, {figures['unconverged']:.2%} not converged"
    )


def table(results: Sequence[Result], bigram: float, devices: int) -> str:
    lines = [f"{'':18} parameters   median step       tokens/s     a device   validation loss (nats/byte)"]
    for r in results:
        seconds = r.step_seconds
        rate = r.config.batch * r.config.context / seconds
        row = f"{TITLES[r.config.attention]:18} {r.parameters:10,} {1e3 * seconds:10.1f} ms {rate:14,.0f}"
        lines.append(f"{row} {rate / devices:12,.0f}   {r.validation[-1][1]:.4f}")
    lines.append(f"{'bigram model':18} {VOCABULARY**2:10,} {'':13} {'':14} {'':12}   {bigram:.4f}")
    return "\n".join(lines)


def plot(results: Sequence[Result], bigram: float) -> Figure:
    """The losses; below them, in small, how the solves went, if there were any."""
    solved = [r for r in results if r.evaluations("iterations")]
    figure = Figure(figsize=(7, 5.6 if solved else 4.2), layout="constrained")
    if solved:
        upper, lower = np.asarray(figure.subfigures(2, height_ratios=[3, 1]))
        _plot_solves(lower.subplots(1, len(SOLVES)), solved)
    else:
        upper = figure
    _plot_losses(upper.subplots(), results, bigram)
    return figure


def _plot_losses(ax: Any, results: Sequence[Result], bigram: float) -> None:
    for r in results:
        color, title = COLORS[r.config.attention], TITLES[r.config.attention]
        ax.plot(np.arange(r.config.steps) + 1, r.history["loss"], color=color, alpha=0.3, linewidth=0.8)
        style, label = LINES[r.config.attention], f"{title}, validation: {r.validation[-1][1]:.3f}"
        ax.plot(*zip(*r.validation, strict=True), style, color=color, markerfacecolor="none", label=label)
    ax.axhline(bigram, color="#777777", linestyle="--", linewidth=1, label="bigram model, validation")
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats per byte (thin: training batches)")
    ax.set_ylim(top=min(ax.get_ylim()[1], math.log(VOCABULARY)))
    ax.set_yscale("log")  # curves that end close together are apart
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_title("Byte-level language model: loss against step", fontsize=12)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def _plot_solves(axes: Sequence[Any], results: Sequence[Result]) -> None:
    for ax, (name, title) in zip(axes, SOLVES.items(), strict=True):
        largest = max(figure for r in results for _, figure in r.evaluations(name))
        for r in results:
            style, color = LINES[r.config.attention], COLORS[r.config.attention]
            ax.plot(*zip(*r.evaluations(name), strict=True), style, color=color, markersize=3)
        ax.set_ylim(0, 1.1 * largest or 0.01)
        ax.yaxis.set_major_formatter("{x:.2g}")
        ax.set_title(title, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
