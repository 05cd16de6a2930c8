"""The benchmark of a GPU runs in tiny form on a CPU, so that it works where a GPU is lent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.bench import Bench, fit_batch
from benchmarks.gpu.gpu import SECTIONS, main
from benchmarks.gpu.gpu_training import estimate_image_gib, estimate_token_gib


def test_sections_that_fail_are_recorded_as_such_and_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "gpu.json"

    def succeed(bench: Bench) -> None:
        bench.note(f"row {len(bench.rows)}", 1, "GB")

    def exhaust(bench: Bench) -> None:
        assert "row 0" in json.loads(output.read_text(encoding="utf-8"))["rows"]
        bench.note("before the end", 1, "GB")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 235.00 GiB.")

    def break_off(_: Bench) -> None:
        raise ValueError("broken")

    sections = {"ceilings": succeed, "parity": exhaust, "syncs": break_off, "ranks": succeed}
    for name, section in sections.items():
        monkeypatch.setitem(SECTIONS, name, section)
    arguments = ["--device", "cpu", "--tiny", "--output", str(output), "--only", *sections]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    assert main() == 1
    recorded = json.loads(output.read_text(encoding="utf-8"))
    assert list(recorded["rows"]) == ["row 0", "before the end", "row 2"]
    assert recorded["failures"] == {
        "parity": "out of memory: CUDA out of memory. Tried to allocate 235.00 GiB.",
        "syncs": "ValueError: broken",
    }


@pytest.mark.parametrize("free", [22, 46, 78, 139])
def test_batches_to_train_fit_into_the_free_memory(free: int) -> None:
    token = estimate_token_gib("8B", recomputes=False)
    assert 256 * 141 * token > 139  # 256 pairs of an 8B fit into no card
    for held, each in (
        (16, 141 * token),
        (16, 141 * estimate_token_gib("8B", recomputes=True)),
        (10, estimate_image_gib(recomputes=False)),
        (10, estimate_image_gib(recomputes=True)),
    ):
        size = fit_batch(free, held, each, 512)
        assert size == 2 or held + size * each <= 0.8 * free
        assert size == 512 or held + 2 * size * each > 0.8 * free


@pytest.mark.slow
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
