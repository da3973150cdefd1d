"""The training loop of ``examples/train_char_lm.py``, with a training that only counts: signals, losses, times."""

from __future__ import annotations

import os
import shutil
import signal
from types import ModuleType

import numpy as np
import pytest

from tests.examples.char_lm import NAMES, config
from tests.examples.test_train_char_lm import refusal

EXAMPLE = "train_char_lm"

pytestmark = pytest.mark.usefixtures("as_a_script")


@pytest.fixture
def instant(example, monkeypatch) -> ModuleType:
    """The example with a training that only counts, of ``instant.main([*INSTANT, ...])``."""

    class Trainer:
        def __init__(self, config, text, placement):
            self._history = {name: np.full(config.steps, np.nan) for name in NAMES}

        def init(self):
            return example.State({"x": np.zeros(2)}, {"x": np.zeros(2)}, self._history)

        abstract = init

        def step(self, state, step):
            return 2.0

        def evaluate(self, state):
            return {"validation": 1.0}

    monkeypatch.setattr(example, "Trainer", Trainer)
    monkeypatch.setattr(example, "solver_steps", lambda *_: None)
    return example


INSTANT = ["--steps", "4", "--warmup", "1", "--eval-every", "2", "--eval-windows", "2", "--attention", "both"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_in_the_last_step_stops_before_the_next_training(instant, tmp_path, monkeypatch, capsys, number, code):
    evaluate = instant.Trainer.evaluate
    flags = ["--output-dir", str(tmp_path), *INSTANT]

    def interrupted(self, state):
        if np.isfinite(self._history["loss"]).all():
            os.kill(os.getpid(), number)
        return evaluate(self, state)

    monkeypatch.setattr(instant.Trainer, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stop:
        instant.main([*flags, "--fresh"])
    assert stop.value.code == code
    assert "; the same command without --fresh goes on from there" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "lla" / "4").is_dir()
    assert not list(tmp_path.glob("softmax/*"))

    instant.main(flags)  # the signal comes in the last step of all
    assert "LLA" in (printed := capsys.readouterr().out)
    assert "softmax attention" in printed


def test_fresh_and_stopped_says_how_to_go_on(instant, tmp_path, monkeypatch, capsys):
    """Without --fresh, and what the command found there it has deleted before it began."""
    flags = ["--output-dir", str(tmp_path), *INSTANT]
    instant.main(flags)
    step = instant.Trainer.step

    def interrupted(self, state, number):
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, state, number)

    monkeypatch.setattr(instant.Trainer, "step", interrupted)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        instant.main([*flags, "--fresh"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "stopped after step 2 of 4" in said  # it came in the first step, and the second was started already
    assert said.endswith("; the same command without --fresh goes on from there")
    assert not list(tmp_path.glob("softmax/*"))

    shutil.rmtree(tmp_path / "lla")
    (tmp_path / "lla").write_text("")
    assert f"cannot delete {tmp_path / 'lla'}: " in refusal(instant, capsys, tmp_path, *INSTANT, "--fresh")


class Unread:
    """A loss on a device: to look at it is to wait for it."""

    def __init__(self, step: int, loss: float, events: list[str]):
        self._step, self._loss, self._events = step, loss, events

    def __float__(self) -> float:
        self._events.append(f"read {self._step}")
        return self._loss


@pytest.fixture
def events(instant, monkeypatch) -> list[str]:
    """What a training of ``instant`` does, in order."""
    found: list[str] = []
    save = instant.Checkpoints.save

    def step(self, state, step):
        found.append(f"start {step}")
        return Unread(step, float("nan") if step == getattr(instant, "nan_at", None) else 2.0, found)

    def saved(self, step, state, config):
        assert np.isfinite(state.history["loss"][:step]).all()
        found.append(f"save {step}")
        save(self, step, state, config)

    monkeypatch.setattr(instant.Trainer, "step", step)
    monkeypatch.setattr(instant.Checkpoints, "save", saved)
    return found


LONGER = ["--steps", "7", "--warmup", "1", "--eval-every", "6", "--eval-windows", "2", "--checkpoint-every", "3"]


def test_the_next_step_is_started_before_a_loss_is_read(instant, events, tmp_path):
    """But for where all losses are needed: a checkpoint, here after 3 and 7 steps, and an evaluation."""
    instant.main(["--output-dir", str(tmp_path), *LONGER])
    expected = "start 0, start 1, read 0, start 2, read 1, read 2, save 3, start 3, start 4, read 3, start 5, read 4, "
    assert ", ".join(events) == expected + "read 5, save 6, start 6, read 6, save 7"


def test_loss_that_is_not_finite(instant, events, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(instant, "nan_at", 4, raising=False)
    line = refusal(instant, capsys, tmp_path, *LONGER)
    assert line.endswith("the loss is nan at step 4; lower --learning-rate")
    assert (tmp_path / "lla" / "3").is_dir()
    assert events[-3:] == ["read 3", "start 5", "read 4"]  # nothing is saved after it


def test_seconds_of_a_step(instant, tmp_path, monkeypatch):
    """From loss to loss, without what is between: the evaluation, here of an hour, is no step's."""
    now = [0.0]

    class Slow:
        def __float__(self) -> float:
            now[0] += 0.25
            return 2.0

    def evaluate(self, state):
        now[0] += 3600
        return {"validation": 1.0}

    monkeypatch.setattr("common.runs.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(instant.Trainer, "step", lambda *_: Slow())
    monkeypatch.setattr(instant.Trainer, "evaluate", evaluate)
    with instant.Checkpoints(tmp_path) as checkpoints, instant.StopRequest() as stop:
        state = instant.train(config(instant, "softmax", steps=5, eval_every=2), None, checkpoints, 9, stop)
    np.testing.assert_array_equal(state.history["seconds"], [np.nan, 0.25, 0.25, 0.25, 0.25])


def test_validation_loss_that_is_not_finite(instant, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(instant.Trainer, "evaluate", lambda *_: {"validation": float("nan")})
    line = refusal(instant, capsys, tmp_path, *INSTANT)
    assert line.endswith("the validation loss is nan after step 2; lower --learning-rate")


def test_report_that_cannot_be_written(instant, tmp_path, capsys):
    (tmp_path / "results.json").mkdir()
    line = refusal(instant, capsys, tmp_path, *INSTANT)
    assert f"cannot write {tmp_path / 'results.json'}: " in line
    assert not list(tmp_path.glob(".*"))  # temporary files
