"""``benchmarks/decode.py`` runs: on tiny shapes, whatever the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import decode


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_script")
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(decode, "QUICK", decode.QUICK[1:])
    decode.main(["--quick", "--output", str(tmp_path)])
    (figures,) = tmp_path.glob("decode_*.json")
    (row,) = json.loads(figures.read_text())["milliseconds"]
    assert all(row[name] > 0 for name in ("floor", "softmax", "module", "operator"))
    assert row["kv_heads"] == 2
    assert f"{row['operator']:.3f}" in capsys.readouterr().out
    assert figures.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
