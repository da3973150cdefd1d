"""``examples/stream_regression.py``: runs, improves where it must, and looks at nothing but the past."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLE = "stream_regression"

pytest.importorskip("matplotlib")
pytest.importorskip("statsmodels")
pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def _standard_promotion():
    # jax.nn.dot_product_attention itself does not run in float64 under the suite's strict promotion
    with jax.numpy_dtype_promotion("standard"):
        yield


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_lla_improves_within_every_segment(example, tmp_path, capsys):
    output = tmp_path / "new" / "plot.png"
    flags = "--length 256 --streams 8 --dims 4 8 --segments 64 128 --seed 3 --output"
    example.main([*flags.split(), str(output)])
    printed = capsys.readouterr().out
    assert is_png(output)
    assert "LLA improves in every segment: yes (12 of 12)" in printed
    assert "lowest error over all positions: LLA in 4 of 4" in printed
    rows = [line.split() for line in printed.splitlines() if re.match(r"\s+\d+ +\d+  ", line)]
    assert [(row[0], row[1]) for row in rows] == [("4", "64"), ("4", "128"), ("8", "64"), ("8", "128")]
    for row in rows:
        errors = np.array(row[2:11], float)
        assert np.all((errors > 0) & (errors < 3))


@pytest.mark.slow
def test_errors_are_of_the_next_value(example):
    """Noise-free and within one segment, a ridge regression on more pairs than dimensions finds the map."""
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 40, 4)), rng.standard_normal((2, 4, 3))
    values = keys @ values
    stream = (jnp.float32(keys), jnp.float32(values))
    for method in (example.RIDGE, example.LLA):
        predicted = example.predict(method, *stream, 1e-4, 1.0)
        np.testing.assert_allclose(predicted[:, 20:], values[:, 21:], atol=0.02)  # bias: ridge / variance of the keys
    average = example.predict(example.SOFTMAX, *stream, 1e-4, 0.0)
    np.testing.assert_allclose(average, np.cumsum(values, 1)[:, :-1] / np.arange(1, 40)[:, None], atol=1e-5)


@pytest.mark.parametrize("method", ["LLA", "softmax attention", "global ridge"])
def test_synthetic_predictions_are_causal(example, method):
    keys, values = example.synthetic_stream(np.random.default_rng(1), 2, 64, 8, 32)
    changed = values.copy()
    changed[:, 40:] += 10.0
    before, after = (np.asarray(example.predict(method, keys, v, 0.01, 24.0)) for v in (values, changed))
    # entry i predicts value i + 1 from the values up to i
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert np.abs(before[:, 40:] - after[:, 40:]).max() > 1.0


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("method", ["LLA", "softmax attention", "global ridge"])
def test_real_forecasts_are_causal(example, method, relative):
    series = example.load_series("sunspots")
    windows = example.cut_windows(series, 5)
    future = series.values.copy()
    future[200:] = 0.0
    changed = example.cut_windows(example.Series(series.title, series.unit, 5, series.times, future), 5)
    setting = [example.Setting(relative, 1.0, 0.1)]
    before, after = (example.forecast(method, w, setting)[0] for w in (windows, changed))
    # window i forecasts value i + 5; the forecast of value 200 is the last to see the same past
    np.testing.assert_array_equal(before[: 200 - 5 + 1], after[: 200 - 5 + 1])
    assert np.abs(before[200 - 5 + 1 :] - after[200 - 5 + 1 :]).max() > 1.0


def test_windows_are_the_last_values_and_the_next(example):
    values = np.arange(10.0)
    values[4] = np.nan
    windows = example.cut_windows(example.Series("", "", 2, np.arange(10.0), values), 2)
    np.testing.assert_array_equal(windows.target, [2, 3, 7, 8, 9])
    np.testing.assert_array_equal(windows.times, windows.target)
    np.testing.assert_array_equal(windows.lags, windows.target[:, None] - [2, 1])
    assert (windows.missing, windows.dropped) == (1, 3)


def test_elnino_is_flattened_in_time_order(example):
    series = example.load_series("elnino")
    assert series.values.shape == (61 * 12,)
    assert series.values[0] == pytest.approx(23.11)  # January 1950
    assert series.values[12] == pytest.approx(24.19)  # January 1951
    assert np.all(np.diff(series.times) > 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "missing"),
    [
        ("sunspots", "no missing values; 0 of the 305 windows"),
        ("elnino", "no missing values; 0 of the 728 windows"),
        ("co2", "59 missing values; 141 of the 2280 windows"),
    ],
)
def test_real_series(example, tmp_path, capsys, data, missing):
    output = tmp_path / "plot.png"
    example.main(["--data", data, "--lags", "4", "--scale", "1", "--ridge", "0.1", "--output", str(output)])
    printed = capsys.readouterr().out
    assert is_png(output)
    assert missing in printed
    assert "are left out" in printed
    rows = dict(re.findall(r"^(LLA|softmax attention|global ridge|last value) .* (\d\.\d{3})$", printed, re.MULTILINE))
    assert len(rows) == 4
    assert rows["last value"] == "1.000"
    order = re.search("from the lowest RMSE to the highest: (.*)", printed)
    assert order is not None
    assert order[1].split(", ") == sorted(rows, key=lambda method: float(rows[method]))


@pytest.mark.slow
def test_settings_are_chosen_on_the_first_third(example, tmp_path, monkeypatch, capsys):
    """What comes after the first third changes the scores, and not the choice."""
    series = example.load_series("sunspots")
    later = series.values.copy()
    later[110:] = np.random.default_rng(0).permutation(later[110:])
    changed = example.Series(series.title, series.unit, series.lags, series.times, later)
    flags = ["--data", "sunspots", "--lags", "4", "--scale", "1", "--output", str(tmp_path / "plot.png")]
    choices, scores = [], []
    for given in (series, changed):
        monkeypatch.setattr(example, "load_series", lambda name, given=given: given)
        example.main(flags)
        rows = re.findall(r"^(?:LLA|softmax attention|global ridge) .*$", capsys.readouterr().out, re.MULTILINE)
        choices.append([row[:36] for row in rows])
        scores.append([row[36:] for row in rows])
    assert choices[0] == choices[1]
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--ridge 0", "--ridge"),
        ("--ridge nan", "--ridge"),
        ("--scale -1", "--scale"),
        ("--length 100", "--length"),
        ("--length 64 --segments 64", "--length"),
        ("--segments 66", "--segments"),
        ("--streams 0", "--streams"),
        ("--seed -1", "--seed"),
        ("--lags 3", "--lags"),
        ("--values level", "--values"),
        ("--data sunspots --lags 60", "--lags"),
        ("--data sunspots --lags 5000", "--lags"),
        ("--data elnino --output plot.pdf", "--output"),
        ("--data tides", "--data"),
        ("--implementation cuda", "--implementation"),
    ],
)
def test_bad_flags_name_themselves(example, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        example.main(flags.split())
    assert stop.value.code == 2
    assert f"error: argument {named}: " in capsys.readouterr().err


def test_help(example, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--data", "--output", "--ridge", "--scale", "--lags", "Real series"))
