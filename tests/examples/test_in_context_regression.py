"""``examples/in_context_regression.py``: the data are piecewise linear, models see the past only, all learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

EXAMPLE = "in_context_regression"

for requirement in ("matplotlib", "optax", "orbax.checkpoint", "tqdm"):
    pytest.importorskip(requirement)

pytestmark = pytest.mark.usefixtures("as_a_script")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SMALL = [
    "--dim",
    "2",
    "--width",
    "8",
    "--length",
    "16",
    "--segments",
    "8",
    "--batch",
    "8",
    "--steps",
    "30",
    "--rates",
    "0.003",
    "0.01",
]


def draw(example: ModuleType, seed: int, *sizes: int) -> list[np.ndarray]:
    data = jax.jit(example.regression_data, static_argnums=(1, 2, 3, 4))(jax.random.key(seed), *sizes)
    return [np.asarray(x) for x in data]


def test_targets_are_linear_in_each_segment_and_in_no_two(example):
    x, y = draw(example, 0, 6, 96, 5, 24)
    assert x.shape == y.shape == (6, 96, 5)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), np.sqrt(5), rtol=1e-5)

    def residual(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.linalg.norm(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) / np.linalg.norm(y))

    for sequence in range(6):
        for start in range(0, 96, 24):
            segment = slice(start, start + 24)
            assert residual(x[sequence, segment], y[sequence, segment]) < 1e-5
        assert residual(x[sequence, :48], y[sequence, :48]) > 0.05


def test_targets_have_variance_one(example):
    y = draw(example, 1, 2000, 16, 4, 8)[1]
    # 2000 * 2 maps of 16 entries: the relative error of their mean square is below sqrt(2 / 64000) = 0.006
    assert np.mean(y**2) == pytest.approx(1.0, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["lla", "softmax"])
def test_a_prediction_sees_its_input_and_the_pairs_before(example, attention):
    config = example.Config(**example.PRESETS["small"], implementation=None, seed=0)
    model = nnx.jit(lambda: example.RegressionModel(attention, config, rngs=nnx.Rngs(0)))()
    x, y = draw(example, 2, 2, 24, config.dim, 12)
    forward = nnx.jit(type(model).__call__)
    before = np.asarray(forward(model, x, y))

    def moved(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.abs(np.asarray(forward(model, x, y)) - before).max(axis=(0, 2))

    later_x, later_y = x.copy(), y.copy()
    later_x[:, 9], later_y[:, 9] = -x[:, 9], y[:, 9] + 1.0
    np.testing.assert_allclose(moved(later_x, y)[:9], 0, atol=1e-6)
    assert moved(later_x, y)[9] > 1e-3
    np.testing.assert_allclose(moved(x, later_y)[:10], 0, atol=1e-6)  # not its own target
    assert moved(x, later_y)[10] > 1e-3


def test_error_within_a_segment_leaves_out_the_first(example):
    result = {"error_by_position": [9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 3.0, 4.0, 5.0]}
    np.testing.assert_allclose(example.within_segment(result, 3), [2.0, 3.0, 4.0])


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "in_context_regression.py"), *SMALL, *flags],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_sweep(example, tmp_path, monkeypatch, capsys):
    """From the command: every method learns, and what is finished is not trained again."""
    done = run("--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "a small version of the task" in done.stdout
    assert (tmp_path / "in_context_regression.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    finished = json.loads((tmp_path / "results.json").read_text())["finished"]
    assert list(finished) == [f"{a} segments of 8" for a in ("lla", "parallax", "softmax", "linear")]
    for result in finished.values():
        assert len(result["error_by_position"]) == 16
        assert result["error"] == pytest.approx(np.mean(result["error_by_position"]), rel=1e-4)
        assert np.mean(result["loss"][-5:]) < np.mean(result["loss"][:5])
        assert f"{result['error']:.4f}" in done.stdout

    results = json.loads((tmp_path / "results.json").read_text())
    del results["finished"]["linear segments of 8"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    started = []
    monkeypatch.setattr(example, "run_all", lambda jobs: started.extend(name for name, _ in jobs) or ())
    with pytest.raises(KeyError, match="linear"):  # the table misses what was not trained
        example.main([*SMALL, "--output-dir", str(tmp_path)])
    assert started == ["linear segments of 8"]

    with pytest.raises(SystemExit) as stop:
        example.main([*SMALL, "--output-dir", str(tmp_path), "--steps", "31"])
    assert stop.value.code == 1
    assert "steps 30, not 31" in capsys.readouterr().err


def test_training_of_one_step(import_example):
    """Its learning rate is the full one, and the validation picks a rate that did not diverge."""
    sweep = import_example("common.sweep")
    params = {"kernel": np.ones(3, np.float32)}
    optimizer = sweep.Budget(1, (0.25,), 0.0, 0).optimizer(0.25)
    update = optimizer.update(params, optimizer.init(params), params)[0]["kernel"]
    np.testing.assert_allclose(update, -0.25, rtol=1e-5)  # Adam's first step has length 1
    assert sweep.best_rate(np.array([np.nan, -3.0, -2.0, np.inf])) == 2


def test_training_that_diverges_ends(import_example):
    sweep = import_example("common.sweep")
    budget = sweep.Budget(1, (0.25,), 0.0, 0)
    job = sweep.Job(lambda rngs: nnx.Linear(1, 1, rngs=rngs), lambda *_: jnp.float32(jnp.nan), lambda *_: 0.0, budget)
    with pytest.raises(import_example("common.runs").RunError, match="every learning rate diverged"):
        job.compile().run(Mock())


def test_every_rate_diverges(import_example, example, tmp_path, monkeypatch, capsys):
    nothing = import_example("common.sweep").Outcome(
        np.full((2, 20), 1.0), np.full((2, 16), np.nan), np.full((2, 16), np.nan), 1.0
    )
    monkeypatch.setattr(example, "run_all", lambda jobs: [(jobs[0][0], nothing)])
    with pytest.raises(SystemExit) as stop:
        example.main([*SMALL, "--output-dir", str(tmp_path)])
    assert stop.value.code == 1
    assert "error: every learning rate diverged; lower --rates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--preset medium", "--preset"),
        ("--segments 3", "--segments"),
        ("--segments 40", "--segments"),
        ("--length 32", "--segments"),
        ("--width 30 --heads 4", "--width"),
        ("--segments 32 16 32", "--segments"),
        ("--rates 0.001 1e-3", "--rates"),
        ("--rates -1", "--rates"),
        ("--dim 0", "--dim"),
        ("--seed -1", "--seed"),
        ("--dtype float16", "--dtype"),
    ],
)
def test_bad_flags_name_themselves(example, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        example.main(flags.split())
    assert stop.value.code == 2
    assert f"error: argument {named}: " in capsys.readouterr().err
