"""The benchmark of a GPU runs in tiny form on a CPU, so that it works where a GPU is lent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.gpu import SECTIONS, main

pytestmark = pytest.mark.slow


def test_every_section_gives_rows_and_no_parity_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--output", str(output), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    assert main() == 0
    recorded = json.loads(output.read_text(encoding="utf-8"))
    assert recorded["device"] == "cpu" and recorded["commit"]
    rows = recorded["rows"]
    without = [name for name in SECTIONS if not any(row.startswith(name) for row in rows)]
    assert without == []
    held = [row["holds"] for row in rows.values() if "holds" in row]
    assert len(held) == 8 and all(held)
    # Tiny speeds say nothing, so that they have no goals.
    assert not any("goal" in row for row in rows.values())
