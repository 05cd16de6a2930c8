"""The share of the time that a run waits for input is shown, without stopping a GPU to measure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aligning import Prepared
from transformers import TrainerControl, TrainerState

from modeling_llm2clip.training.alignment import alignment_trainer
from modeling_llm2clip.training.alignment.alignment_trainer import InputTimesCallback

ARGUMENTS: Any = None


class Clock:
    """A clock that no machine slows down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(alignment_trainer, "time", clock)


def read_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step")]


def test_waiting_is_a_share_of_the_time_since_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    callback = InputTimesCallback(epoch_at=float, shown=True)
    for step in (1, 2):
        with callback.measure():
            clock.now += 3.0
        clock.now += 9.0
        callback.on_step_end(
            ARGUMENTS, TrainerState(max_steps=2, global_step=step), TrainerControl()
        )
    line = "input 25% of the time, training 75%"
    assert read_lines(capsys.readouterr().err) == [f"step 1: {line}", f"step 2: {line}"]


def test_lines_come_at_doubling_times_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    callback = InputTimesCallback(epoch_at=float, shown=True)
    for step in range(1, 601):  # one second and one epoch each
        clock.now = float(step)
        state = TrainerState(max_steps=600, global_step=step)
        callback.on_step_end(ARGUMENTS, state, TrainerControl())
    lines = read_lines(capsys.readouterr().err)
    assert [int(line.split()[1].strip(":")) for line in lines] == [10, 20, 40, 80, 160, 320, 600]


@pytest.mark.slow
def test_a_run_says_once_an_epoch_what_bounds_it(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(alignment_trainer, "_SECONDS_BEFORE_FIRST_LINE", 0.0)
    monkeypatch.setattr(alignment_trainer, "_FACTOR_TO_NEXT_LINE", 0.0)
    prepared.align_stored(tmp_path / "run", max_steps=7, global_batch_size=4, refit=False)
    shown = capsys.readouterr()
    lines = [line for line in (shown.out + shown.err).splitlines() if "input" in line]
    per_epoch = len(prepared.records) // 4
    assert len(lines) == -(-7 // per_epoch)
    assert all(line.split(": ")[1].startswith("input ") for line in lines)
