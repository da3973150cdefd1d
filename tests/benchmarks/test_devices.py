"""``benchmarks/devices.py`` runs: on tiny shapes, whatever the devices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import devices


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_script")
def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "QUICK", devices.QUICK[-1:])
    devices.main(["--quick", "--no-train", "--output", str(tmp_path)])
    (table,) = tmp_path.glob("devices_*.txt")
    assert re.search(r"^length .*packed +[\d.]+ +[\d.]+ +[\d.]+ +\d+ -> \d+ +[\d.]+$", table.read_text(), re.MULTILINE)
