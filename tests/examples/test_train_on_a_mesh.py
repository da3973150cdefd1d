"""``examples/train_char_lm.py --mesh``: on any mesh a run ends with one device's losses, over processes too."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLE = "train_char_lm"

for requirement in ("matplotlib", "optax", "orbax.checkpoint", "tqdm"):
    pytest.importorskip(requirement)

pytestmark = pytest.mark.usefixtures("as_a_script")

ROOT = Path(__file__).parents[2]
SMALL = [
    "--features",
    "16",
    "--layers",
    "1",
    "--heads",
    "2",
    "--context",
    "16",
    "--batch",
    "4",
    "--steps",
    "10",
    "--warmup",
    "2",
    "--learning-rate",
    "0.01",
    "--eval-every",
    "5",
    "--eval-windows",
    "4",
    "--checkpoint-every",
    "5",
]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The processes of this file run the same small programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def losses(output: Path) -> np.ndarray:
    result = json.loads((output / "results.json").read_text())["results"][0]
    return np.array([*result["loss"], *(loss for _, loss in result["validation"])])


@pytest.fixture(scope="module")
def output_of_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture
def expected(example: ModuleType, as_a_script: None, output_of_one: Path) -> np.ndarray:
    """One device's losses."""
    if not (output_of_one / "results.json").exists():
        example.main(["--output-dir", str(output_of_one), *SMALL])
    return losses(output_of_one)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "context=2"])  # data and fsdp are below
def test_a_mesh_gives_one_devices_losses(mesh, example, expected, tmp_path, capsys):
    example.main(["--output-dir", str(tmp_path), "--mesh", mesh, *SMALL])
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=2e-5)  # float32 sums in another order, ten steps of it
    assert "2 x cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_goes_on_on_another_mesh(example, expected, tmp_path, monkeypatch):
    step = example.Trainer.step

    def stopped_after_six(self, state, number):
        if number == 4:  # another step is started before it is noticed
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, state, number)

    with monkeypatch.context() as patch:
        patch.setattr(example.Trainer, "step", stopped_after_six)
        with pytest.raises(SystemExit):
            example.main(["--output-dir", str(tmp_path), "--mesh", "fsdp=2", *SMALL])
    example.main(["--output-dir", str(tmp_path), *SMALL])
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=2e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mesh data=3", "--mesh: data x fsdp = 3 must divide --batch, 4"),
        ("--mesh data=4", "--mesh: data=4 takes 4 devices, and there are 2"),
        ("--mesh width=2", "must be like data=2 or data=2,context=2"),
        ("--processes 2", "--coordinator, --process-id and --processes go together"),
    ],
)
def test_refusals(example, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        example.main(["--output-dir", str(tmp_path), *SMALL, *flags.split()])
    assert message in capsys.readouterr().err


def start(output: Path, process: int, port: int, *flags: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    of = f"--coordinator 127.0.0.1:{port} --processes 2 --process-id {process} --mesh data=2".split()
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "train_char_lm.py"), "--output-dir", str(output), *SMALL, *of, *flags],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes(expected, tmp_path):
    port = free_port()
    processes = [start(tmp_path, i, port) for i in range(2)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=2e-5)
    assert "results:" in outputs[0][0]
    spoken = [line for line in outputs[1][0].splitlines() if "Gloo" not in line]
    assert not spoken  # process 0 speaks for all


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(tmp_path):
    """After the same step: had they parted, one of them would wait for ever."""
    port = free_port()
    first, second = (start(tmp_path, i, port, "--steps", "100000") for i in range(2))
    wait_for_a_checkpoint(tmp_path, first)
    second.send_signal(signal.SIGTERM)
    (_, err), (_, other) = (process.communicate(timeout=60) for process in (first, second))
    assert [first.returncode, second.returncode] == [128 + signal.SIGTERM] * 2, err + other
    said = [re.search(r"stopped after step (\d+) of 100000", text) for text in (err, other)]
    steps = [match and match[1] for match in said]
    assert (tmp_path / "lla" / str(steps[0])).is_dir()
    assert steps[0] == steps[1]


def wait_for_a_checkpoint(output: Path, process: subprocess.Popen[str]) -> None:
    """It tells that all processes are at work."""
    end = time.monotonic() + 200
    while not any(path.name == "5" for path in output.glob("lla/*")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_ends_the_other(tmp_path):
    port = free_port()
    first, second = (start(tmp_path, i, port, "--steps", "100000") for i in range(2))
    wait_for_a_checkpoint(tmp_path, first)
    second.kill()
    _, err = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode != 0
    # ours if a collective fails first; JAX's service, which ends the process by itself, if that notices first
    assert re.search(
        "another process is gone|another task died|coordination|heartbeat|connection (closed|reset)", err, re.I
    )
