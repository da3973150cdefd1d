"""``examples/train_char_lm.py`` watches LLA's solves: at evaluations, in the progress line, the JSON and the plot."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.test_train_char_lm import config
from tests.examples.test_train_char_lm_loop import NAMES

pytestmark = pytest.mark.usefixtures("as_a_script")


@pytest.fixture(scope="module")
def example(import_example: Callable[[str], ModuleType]) -> ModuleType:
    return import_example("train_char_lm")


@pytest.fixture(scope="module")
def model(import_example: Callable[[str], ModuleType]) -> ModuleType:
    return import_example("common.char_lm")


@pytest.mark.parametrize("attention", ["lla", "softmax"])
def test_an_evaluation_watches_the_solves(example, attention):
    """Softmax attention has none."""
    text = example.Text(np.arange(256, dtype=np.uint8).repeat(9), np.arange(256, dtype=np.uint8), "")
    trainer = example.Trainer(config(example, attention, layers=2), text)
    state = trainer.init()
    figures = trainer.evaluate(state)
    assert figures["validation"] > 0
    if attention == "softmax":
        assert set(figures) == {"validation"}
        return
    assert 1 <= figures["iterations"] <= 8
    assert 0 < figures["relative_error"] < 0.1
    assert figures["unconverged"] == 0
    loss = jax.jit(trainer._loss)(state.params, trainer._validation)
    assert float(loss) == pytest.approx(figures["validation"], rel=1e-5)


def test_summary_of_solves(model):
    """Largest over all, not a mean of largest; a share of all rows."""
    rows = np.asarray([[1, 3], [5, 7]], np.int32)
    error = np.asarray([[1e-4, 2e-3], [1e-5, 1e-6]], np.float32)
    solves = model.Residuals(rows, rows, jnp.asarray(rows), error, jnp.asarray(error), jnp.asarray(error < 1e-3))
    summary = {name: float(x) for name, x in model.summary(solves).items()}
    assert summary == pytest.approx({"iterations": 4.0, "relative_error": 2e-3, "unconverged": 0.25})


def test_progress_line(example):
    figures = {"validation": 1.5}
    assert example.progress(30, 1.25, figures) == "step 30: loss 1.2500, validation loss 1.5000"
    figures |= {"iterations": 3.46, "relative_error": 0.00234, "unconverged": 0.0125}
    line = example.progress(30, 1.25, figures)
    assert line.endswith("; solves: 3.5 steps in the mean, relative error up to 2.3e-03, 1.25% not converged")


def test_plot_has_a_panel_of_the_solves(example):
    """If there were any."""
    history = {name: np.asarray([np.nan, 2.0]) for name in NAMES}
    lla = example.Result(config(example, "lla", steps=2), 1, history, [2.0])
    history = {name: x * (1 if name in ("loss", "validation") else np.nan) for name, x in history.items()}
    softmax = example.Result(config(example, "softmax", steps=2), 1, history, None)
    assert len(example.plot([softmax], 2.5).axes) == 1
    figure = example.plot([softmax, lla], 2.5)
    assert len(figure.axes) == 4
    assert lla.as_json()["solves"]["iterations"] == [(2, 2.0)]
