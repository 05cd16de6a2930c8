"""Stage 3, killed or stopped at any moment and resumed: the run that was never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aligning import SHORT_RUN, Prepared, command_of, names_that_differ, read_losses

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.training.alignment.best_weights import BEST_FILE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def run_until(command: list[str], output: Path, *, lines: int, by: signal.Signals) -> int:
    """Start the command, signal it when so many lines of metrics are there, return its code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "modeling_llm2clip", *command], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
            process.send_signal(by)
            break
        time.sleep(0.002)
    log = process.communicate(timeout=240)[0]
    assert process.returncode != 0, f"it ended before it was killed: {log[-1500:]}"
    return process.returncode


def test_a_signal_stops_a_run_after_its_step(prepared: Prepared, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = command_of(prepared, output, save_steps=1000, max_steps=100, vision_training="frozen")
    assert run_until(command, output, lines=5, by=signal.SIGTERM) == 143
    steps = max(read_losses(output))
    assert 5 <= steps < 100 and (output / "checkpoints" / f"checkpoint-{steps}").is_dir()
    assert main([*command, "--resume"]) == 0
    assert len(read_losses(output)) == 100
    assert check_model(output / "model").healthy


def test_a_run_that_stopped_early_takes_no_further_step(few: Prepared, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 100, "learning_rate": 1.0, "eval_steps": 1, "early_stopping_patience": 3,
    }  # fmt: skip
    whole = few.align_stored(tmp_path / "whole", **options)
    killed = few.align_stored(whole.copy_without_model(tmp_path / "killed"), resume=True, **options)
    assert killed.results["steps"] == whole.results["steps"] < 100
    # Bit for bit.
    assert not names_that_differ(killed.model, whole.model)
    run = whole.copy_without_model(tmp_path / "run")
    whole = (run / BEST_FILE).read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-8], None):
        (run / BEST_FILE).unlink()
        if content is not None:
            (run / BEST_FILE).write_bytes(content)
        with pytest.raises(
            ValueError, match=r"best\.safetensors, .* is missing or damaged.*start over in an"
        ):
            few.align_stored(run, resume=True, **options)


def test_best_weights_of_another_run_do_not_become_those_of_this_one(
    few: Prepared, tmp_path: Path
) -> None:
    """Nor do those of an earlier step, as a backup has them: they would be written as the best."""
    options = {**SHORT_RUN, "held_out_ratio": 0.2, "eval_steps": 2, "refit": False}
    whole = few.align_stored(tmp_path / "whole", **options)
    shorter = few.align_stored(tmp_path / "shorter", **{**options, "max_steps": 2})
    assert 0 < shorter.best_step < whole.best_step == 6
    run = whole.copy_without_model(tmp_path / "run")
    (run / BEST_FILE).write_bytes((shorter.output / BEST_FILE).read_bytes())
    with pytest.raises(ValueError, match=r"best\.safetensors belongs to another run .* step 6 was"):
        few.align_stored(run, resume=True, **options)
