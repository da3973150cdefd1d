"""What the GPU benchmarks share: the device they need, how a call is timed, and what the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Read when JAX first looks for a device: PyTorch may run beside it and needs memory of its own.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# A group of calls is at least this long, so that starting and awaiting it (some 0.1 ms) is below 1 % of it.
_GROUP_SECONDS = 0.03
_MOST_CALLS = 50


class Timing(NamedTuple):
    """Seconds of one call: the median over ``groups`` groups of calls, and (max - min) / median."""

    seconds: float
    spread: float
    groups: int


def median_time(timed: Callable[[int], float], repeats: int, limit: float, least: int = 1) -> Timing:
    """The median of ``repeats`` groups of calls, or of fewer (at least one) once they have taken ``limit`` seconds.

    Args:
        timed: Runs a number of calls, waits for them and returns the seconds that they took.
        repeats: Groups of calls.
        limit: Seconds for all of them; a call that takes that long is timed once.
        least: Calls of a group.
    """
    timed(1)  # compiles or loads what is still to be compiled or loaded
    calls = max(least, min(_MOST_CALLS, round(_GROUP_SECONDS / max(timed(1), 1e-9))))
    groups: list[float] = []
    start = time.perf_counter()
    while len(groups) < repeats and (not groups or time.perf_counter() - start < limit):
        groups.append(timed(calls) / calls)
    median = statistics.median(groups)
    return Timing(median, (max(groups) - min(groups)) / median, len(groups))


def jax_timer(run: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[int], float]:
    """``timed`` of :func:`median_time` for a compiled JAX function."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = run(*inputs)
        jax.block_until_ready(result)
        return time.perf_counter() - start

    return timed


def require_gpu(script: str) -> str:
    """The name of the GPU that JAX uses; exits with what is missing where there is none."""
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        sys.exit(f"{script} needs an NVIDIA GPU, and JAX could not start: {one_line(error)}")
    if device.platform != "gpu":
        sys.exit(
            f"{script} needs an NVIDIA GPU and JAX with CUDA (the extra cuda12 or cuda13 of this package); "
            f"JAX {jax.__version__} found only: {device.device_kind}"
        )
    return device.device_kind


def environment(device: str) -> dict[str, str | None]:
    """The device, its driver, the versions of what was measured, and the commit (None for what cannot be found)."""
    root = Path(__file__).resolve().parent
    packages = ("jax", "jaxlib", "jax-triton", "triton", "torch", "flashlla")
    return {
        "device": device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: _version(name) for name in packages},
        "commit": _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
    }


def described(environment: dict[str, str | None]) -> str:
    """One line of what :func:`environment` found."""
    return ", ".join(value if name == "device" else f"{name} {value}" for name, value in environment.items() if value)


def slug(device: str) -> str:
    """A device's name for use in a file's name: ``NVIDIA H200`` is ``nvidia_h200``."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def one_line(error: BaseException, width: int = 110) -> str:
    """An error on one short line: its first line, and its last one, where Triton says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = ": ".join([type(error).__name__, *lines[:1]]) + (f" ... {lines[-1]}" if len(lines) > 1 else "")
    return text if len(text) <= width else text[: width - 3] + "..."


def _version(package: str) -> str | None:
    # jax-triton's wheel may lie on PYTHONPATH: its metadata is found there too
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a command prints, None where it is absent or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if lines else None
