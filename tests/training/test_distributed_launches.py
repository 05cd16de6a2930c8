"""Launches of processes: one that starts too few is refused, and two machines make one run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aligning import Prepared, command_of, read_losses
from gloo_workers import find_free_port

from modeling_llm2clip.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
CHANGED: dict[str, Any] = {"max_steps": 4, "save_steps": 4, "device": "auto"}


def start_launch(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--num_processes", "2"), ("--cpu", "--num_processes", "2")])
def test_a_launch_that_starts_fewer_processes_than_asked_for_is_refused(
    prepared: Prepared, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    command = command_of(prepared, tmp_path / "run", **CHANGED)
    with start_launch(*flags, "-m", "modeling_llm2clip", *command) as process:
        _, shown = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "asked for several processes or machines, and started one process" in shown
    assert "--config_file examples/accelerate/ddp.yaml" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_launch_of_one_process_is_as_one_without_a_launcher(
    prepared: Prepared, tmp_path: Path
) -> None:
    changed = {**CHANGED, "device": "cpu"}
    assert main(command_of(prepared, tmp_path / "plain", **changed)) == 0
    command = command_of(prepared, tmp_path / "launched", **changed)
    with start_launch("--num_processes", "1", "-m", "modeling_llm2clip", *command) as process:
        _, shown = process.communicate(timeout=200)
    assert process.returncode == 0, shown[-3000:]
    assert read_losses(tmp_path / "launched") == read_losses(tmp_path / "plain")


@pytest.mark.slow
def test_two_launches_of_one_process_each_train_as_one_process_with_the_whole_batch(
    prepared: Prepared, tmp_path: Path
) -> None:
    """Two machines that share a disk, here the same machine twice."""
    assert main(command_of(prepared, tmp_path / "one", **{**CHANGED, "device": "cpu"})) == 0
    command = command_of(prepared, tmp_path / "two", **CHANGED)
    port = str(find_free_port())
    processes = [
        start_launch(
            "--config_file", "examples/accelerate/ddp.yaml", "--num_processes", "2",
            "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
            "--main_process_port", port, "-m", "modeling_llm2clip", *command,
        )
        for rank in range(2)
    ]  # fmt: skip
    shown = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown[0][1][-3000:]
    assert sum(out.count("Wrote") for out, _ in shown) == 1
    # Four steps carry the rounding of sums in another order on.
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), abs=2e-3)
