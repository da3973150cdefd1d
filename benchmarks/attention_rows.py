"""The rows that ``benchmarks/attention.py`` measures, and the table and the plot of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import Timing

CUDNN = "cudnn"
IMPLEMENTATIONS = ("triton", "xla", "reference", "flashlla")
RIDGES = (10.0, 0.1)
_NAMES = {CUDNN: "cuDNN softmax", "reference": "LLA dense", "flashlla": "flashlla (PyTorch)"}


class Shape(NamedTuple):
    """The heads are in the batch."""

    batch: int
    length: int
    dim: int

    @property
    def work(self) -> int:
        return self.batch * self.length**2

    def __str__(self) -> str:
        return f"{self.batch}, {self.length}, {self.dim}"


@dataclass(frozen=True)
class Group:
    """What is compiled once: the ridge is a run-time argument."""

    implementation: str
    shape: Shape
    ridges: tuple[float | None, ...] = RIDGES
    precision: str = "default"
    sweep: bool = True  # one of the lengths 1k to 64k, as drawn in the plot


@dataclass
class Row:
    """One line of the table. Times are milliseconds of one call; the ``_vs_cudnn`` are ratios of times.

    ``peak_ratio`` is (temporaries + arguments + outputs) / (arguments + outputs) of forward and backward together,
    ``kept_bytes`` what the backward pass keeps of the forward pass beyond query, key, value and output.
    """

    implementation: str
    precision: str
    ridge_lambda: float | None
    batch: int
    length: int
    dim: int
    sweep: bool
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_backward_ms: float | None = None
    forward_spread: float | None = None
    forward_backward_spread: float | None = None
    groups: int | None = None
    forward_vs_cudnn: float | None = None
    backward_vs_cudnn: float | None = None
    forward_backward_vs_cudnn: float | None = None
    temp_bytes: int | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    peak_ratio: float | None = None
    kept_bytes: int | None = None
    note: str = ""

    @property
    def name(self) -> str:
        name = _NAMES.get(self.implementation, f"LLA {self.implementation}")
        return name if self.precision == "default" else f"{name}, {self.precision}"

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.length, self.dim)

    def set_times(self, forward: Timing, both: Timing) -> None:
        """The backward alone is the difference: no call runs it without a forward."""
        self.forward_ms, self.forward_backward_ms = 1e3 * forward.seconds, 1e3 * both.seconds
        self.backward_ms = self.forward_backward_ms - self.forward_ms
        self.forward_spread, self.forward_backward_spread = forward.spread, both.spread
        self.groups = min(forward.groups, both.groups)

    def set_memory(self, temp: int, arguments: int, outputs: int, kept: int) -> None:
        self.temp_bytes, self.argument_bytes, self.output_bytes, self.kept_bytes = temp, arguments, outputs, kept
        self.peak_ratio = (temp + arguments + outputs) / (arguments + outputs)

    def set_ratios(self, cudnn: Row) -> None:
        for name in ("forward", "backward", "forward_backward"):
            mine, theirs = getattr(self, f"{name}_ms"), getattr(cudnn, f"{name}_ms")
            if mine is not None and theirs:
                setattr(self, f"{name}_vs_cudnn", mine / theirs)


def in_order(rows: list[Row]) -> list[Row]:
    """By head dimension, length and batch; cuDNN first."""
    order = (CUDNN, *IMPLEMENTATIONS)
    return sorted(
        rows,
        key=lambda r: (r.dim, r.length, r.batch, order.index(r.implementation), r.precision, -(r.ridge_lambda or 0)),
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, aligned so that it reads as text too."""

    def number(value: float | None, scale: float = 1.0) -> str:
        if value is None:
            return ""
        value /= scale
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

    head = ("B, S, D", "implementation", "λ", "forward ms", "backward ms", "both ms")
    head += ("fwd / cuDNN", "bwd / cuDNN", "both / cuDNN", "temp MiB", "peak / (in + out)", "kept MiB", "note")
    cells = [
        (
            str(row.shape),
            row.name,
            "" if row.ridge_lambda is None else f"{row.ridge_lambda:g}",
            *map(number, (row.forward_ms, row.backward_ms, row.forward_backward_ms)),
            *map(number, (row.forward_vs_cudnn, row.backward_vs_cudnn, row.forward_backward_vs_cudnn)),
            number(row.temp_bytes, 2**20),
            number(row.peak_ratio),
            number(row.kept_bytes, 2**20),
            row.note,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    left = {0, 1, len(head) - 1}

    def line(texts: tuple[str, ...]) -> str:
        padded = (t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i in left else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, cells)])


def plot(rows: list[Row], device: str, path: Path) -> None:
    """Time and memory of forward and backward together against the length, a row of panels for each D."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {
        CUDNN: "black",
        "triton": "tab:blue",
        "xla": "tab:orange",
        "reference": "tab:purple",
        "flashlla": "tab:red",
    }
    drawn = [r for r in rows if r.sweep and r.precision == "default" and r.forward_backward_ms is not None]
    dims = sorted({row.dim for row in drawn})
    if not dims:
        raise ValueError("no row of the sweep over the lengths was measured: nothing to plot")
    figure, axes = plt.subplots(len(dims), 2, figsize=(11, 4.3 * len(dims)), squeeze=False, layout="constrained")
    for dim, (time_axis, memory_axis) in zip(dims, axes, strict=True):
        for implementation, colour in colours.items():
            ridges = sorted({r.ridge_lambda or 0.0 for r in drawn if r.implementation == implementation}, reverse=True)
            for i, ridge in enumerate(ridges):
                line = [
                    r for r in drawn if (r.dim, r.implementation, r.ridge_lambda or 0.0) == (dim, implementation, ridge)
                ]
                line.sort(key=lambda r: r.length)
                if not line:
                    continue
                style: dict[str, Any] = {
                    "color": colour,
                    "marker": "o" if i == 0 else "s",
                    "markersize": 4 if i == 0 else 5,
                    "markerfacecolor": colour if i == 0 else "white",
                    "linestyle": "-" if i == 0 else "--",
                }
                lengths = [r.length for r in line]
                label = line[0].name + (f", λ = {ridge:g}" if ridge else "")
                time_axis.plot(lengths, [(r.forward_backward_ms or 0) / r.batch for r in line], label=label, **style)
                if i == 0:  # the ridge changes no array
                    known = [(r.length, _peak_bytes(r) / r.batch / 2**20) for r in line if r.temp_bytes is not None]
                    if known:
                        memory_axis.plot(*zip(*known, strict=True), label=line[0].name, **style)
        time_axis.set(title=f"D = {dim}: time, forward + backward", ylabel="ms per sequence and head")
        memory_axis.set(
            title=f"D = {dim}: peak memory, inputs and outputs included", ylabel="MiB per sequence and head"
        )
        lengths = sorted({row.length for row in drawn})
        for axis in (time_axis, memory_axis):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axis.minorticks_off()
            axis.set_xlabel("length S")
            axis.grid(True, which="major", alpha=0.3)
    labels: dict[str, Any] = {}
    for axis in axes[:, 0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(f"{device}, bfloat16, causal")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _peak_bytes(row: Row) -> int:
    return (row.temp_bytes or 0) + (row.argument_bytes or 0) + (row.output_bytes or 0)
