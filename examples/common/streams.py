"""The data of ``stream_regression.py``: the synthetic stream, and real series cut into windows."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

try:
    from statsmodels.datasets import co2, elnino, sunspots
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')

# The cone: a key is c + SPREAD u with c and u of unit length, brought to the norm sqrt(d).
SPREAD = 0.7
# Standard deviation of the noise on values whose own is 1.
NOISE = 0.1


def synthetic_stream(
    rng: np.random.Generator, streams: int, length: int, dim: int, segment: int
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 keys and values ``(streams, length, dim)`` of the piecewise-linear stream of stream_regression.py."""
    count = length // segment

    def directions(*shape: int) -> np.ndarray:
        x = rng.standard_normal((streams, count, *shape, dim))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    keys = directions(1) + SPREAD * directions(segment)
    keys *= math.sqrt(dim) / np.linalg.norm(keys, axis=-1, keepdims=True)
    maps = rng.standard_normal((streams, count, dim, dim)) / math.sqrt(dim)
    values = keys @ maps + NOISE * rng.standard_normal(keys.shape)
    shape = (streams, length, dim)
    return keys.reshape(shape).astype(np.float32), values.reshape(shape).astype(np.float32)


REAL = ("co2", "sunspots", "elnino")


@dataclass(frozen=True)
class Series:
    """A series as shipped in statsmodels: values (NaN where missing), their times in years, and what they are."""

    title: str
    unit: str
    lags: int  # the default: one cycle of the series
    times: np.ndarray
    values: np.ndarray


def _frame(dataset: ModuleType) -> Any:
    return dataset.load_pandas().data


def load_series(name: str) -> Series:
    """One of REAL. A cycle is 52 weeks, 12 months, and about 11 years for the sunspots."""
    if name == "co2":
        data = _frame(co2)["co2"]
        years = data.index.year + (data.index.day_of_year - 1) / 365.25
        return Series("Mauna Loa CO2, weekly", "ppm", 52, np.asarray(years), data.to_numpy(float))
    if name == "sunspots":
        data = _frame(sunspots)
        return Series(
            "Sunspots, yearly", "sunspot number", 11, data["YEAR"].to_numpy(float), data["SUNACTIVITY"].to_numpy(float)
        )
    data = _frame(elnino)  # a row is a year, a column a month
    months = data.drop(columns="YEAR").to_numpy(float)
    times = data["YEAR"].to_numpy(float)[:, None] + np.arange(12) / 12
    return Series("El Niño sea surface temperature, monthly", "°C", 12, times.ravel(), months.ravel())


@dataclass(frozen=True)
class Windows:
    """The windows of a series without a missing value, in time order.

    Attributes:
        lags: ``(n, d)``, the d values before each target, the latest last.
        target: ``(n,)``.
        times: ``(n,)``, of the targets.
        missing: missing values in the series.
        dropped: windows left out, because a lag or the target is missing.
    """

    lags: np.ndarray
    target: np.ndarray
    times: np.ndarray
    missing: int
    dropped: int

    @property
    def warmup(self) -> int:
        """Leading windows that set the unit of the values and are not scored."""
        return 2 * self.lags.shape[1]

    @property
    def third(self) -> int:
        """Leading windows that the settings are chosen on."""
        return len(self.target) // 3

    def head(self, count: int) -> Windows:
        return Windows(self.lags[:count], self.target[:count], self.times[:count], self.missing, self.dropped)


def cut_windows(series: Series, lags: int) -> Windows:
    windows = np.lib.stride_tricks.sliding_window_view(series.values, lags + 1)
    complete = ~np.isnan(windows).any(axis=1)
    missing, dropped = int(np.isnan(series.values).sum()), int(np.sum(~complete))
    kept = windows[complete]
    return Windows(kept[:, :-1], kept[:, -1], series.times[lags:][complete], missing, dropped)


def describe(series: Series, windows: Windows) -> str:
    lags, total = windows.lags.shape[1], len(windows.target) + windows.dropped
    missing = "no missing values" if not windows.missing else f"{windows.missing} missing values"
    first = windows.times[windows.third]
    return (
        f"{series.title}: {len(series.values)} values, {missing}; {windows.dropped} of the {total} windows "
        f"({lags} lags and a target) contain one and are left out\n"
        f"chosen on the first {windows.third} windows (warm-up {windows.warmup}), "
        f"scored on the other {len(windows.target) - windows.third}, {first:.0f} to {windows.times[-1]:.0f}"
    )
