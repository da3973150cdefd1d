"""What the trained examples' runs share: checkpoints, losses, a Ctrl-C that saves first, files written whole, flags."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')


@dataclass
class State:
    """All that training goes on from. The step is not in it: it is the checkpoint's name."""

    params: Any
    optimizer: Any
    history: dict[str, np.ndarray]  # by step, NaN where there is nothing: loss, validation, seconds


class RunError(Exception):
    """What the user is told in one line."""


def check_config(what: str, found: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises a RunError that names what differs, if anything does."""
    pairs = [f"{name} {found.get(name)}, not {value}" for name, value in config.items() if found.get(name) != value]
    if pairs:
        raise RunError(
            f"{what} was made with {', '.join(pairs)}; give the same flags, another --output-dir, or --fresh to start "
            "over"
        )


def again(fresh: bool) -> str:
    """What goes on with a stopped run: ``--fresh`` would delete what it left."""
    return "the same command without --fresh" if fresh else "the same command"


def prepare_folder(folder: Path) -> None:
    """Creates it if it does not exist; a RunError says why nothing can be written there, before hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        no_folder = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "it is not a folder" if no_folder else error.strerror
        raise RunError(f"argument --output-dir: cannot write in {folder}: {reason}; give another") from error


def delete_folder(folder: Path) -> None:
    """Deletes it if it exists; a RunError says why it cannot be."""
    try:
        if os.path.lexists(folder):
            shutil.rmtree(folder)
    except OSError as error:
        raise RunError(f"argument --fresh: cannot delete {folder}: {error.strerror or error}") from error


class Checkpoints:
    """The checkpoints of one run, in a folder that exists: one per step, written whole or not at all, two kept."""

    def __init__(self, directory: Path):
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False, enable_async_checkpointing=False)
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise RunError(f"argument --output-dir: cannot read {self.directory}: {error.strerror}") from error

    @property
    def latest(self) -> int | None:
        """How many steps the latest checkpoint has behind it; None without one."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, config: dict[str, Any]) -> None:
        items = {name: ocp.args.StandardSave(item) for name, item in vars(state).items()}
        about = ocp.args.JsonSave(config)
        self._manager.save(step, args=ocp.args.Composite(config=about, **items))

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and its storage raise a dozen kinds for a damaged file
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise self._unreadable(step, reason) from error

    def _unreadable(self, step: int, reason: str) -> RunError:
        folder = self.directory / str(step)
        return RunError(f"cannot read the checkpoint {folder}: {reason}; delete it, or start over with --fresh")

    def config(self, step: int) -> dict[str, Any]:
        """What :meth:`save` was given as such."""
        config = self._restore(step, config=ocp.args.JsonRestore()).config
        if not isinstance(config, dict):
            raise self._unreadable(step, "its config is no JSON object")
        return config

    def check_config(self, step: int, config: dict[str, Any]) -> None:
        """Refuses a checkpoint that was made with another configuration."""
        check_config(f"the checkpoint in {self.directory}", self.config(step), config)

    def restore(self, step: int, like: State) -> State:
        """The state; ``like`` has its shapes and dtypes."""
        items = {name: ocp.args.StandardRestore(item) for name, item in vars(like).items()}
        return State(**dict(self._restore(step, **items)))

    def params(self, step: int, like: Any) -> Any:
        """The parameters alone."""
        return self._restore(step, params=ocp.args.StandardRestore(like)).params

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()


class StopRequest:
    """Within it, the first Ctrl-C or SIGTERM only raises a flag; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()


class Stopped(Exception):
    """Training was asked to stop and has saved its state."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number  # the shell's convention: 130 for Ctrl-C


class Losses:
    """The losses of a training, each read when the next step has been started: the devices do not wait for it."""

    def __init__(self, history: dict[str, np.ndarray], tokens: int, bar: Any):
        self._history, self._tokens, self._bar = history, tokens, bar
        self._unread: tuple[int, Any] | None = None
        self._compiles = True  # the first step of a process
        self.resume()

    def add(self, step: int, loss: Any) -> None:
        """Of a step that has been started. Reads the loss of the step before."""
        self.read()
        self._unread = step, loss

    def read(self) -> None:
        """Waits for the loss that is not in the history yet, if there is one.

        Raises:
            RunError: It is not finite.
        """
        if self._unread is None:
            return
        step, loss = self._unread[0], float(self._unread[1])
        self._unread = None
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} at step {step}; lower --learning-rate")
        seconds = time.perf_counter() - self._ready
        self._history["loss"][step] = loss
        if not self._compiles:
            self._history["seconds"][step] = seconds
        self._compiles = False
        self._bar.set_postfix_str(f"loss {loss:.3f}, {self._tokens / seconds:,.0f} tokens/s", False)
        self._bar.update()
        self.resume()

    def resume(self) -> None:
        """The time of the next loss counts from here: from the loss before it, or from a pause."""
        self._ready = time.perf_counter()


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Through a temporary name: a reader finds the old file or the new one. A RunError says why it cannot be."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        save(temporary)
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def number(
    kind: type[int] | type[float], least: float, above: bool = False, most: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite number not below ``least``, or above it, and not above ``most``."""
    allowed = f"{'>' if above else '>='} {least:g}" + (f" and <= {most}" if most < math.inf else "")

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most or value == math.inf or (above and value == least):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


seed = number(int, 0, most=2**32 - 1)  # without 64-bit types, jax.random.key keeps 32 bits: 2**32 would be 0 again
