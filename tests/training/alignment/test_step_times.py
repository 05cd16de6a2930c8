"""Shares of a step's time add up, whatever is measured inside what, and are shown in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aligning import Prepared
from transformers import TrainerControl, TrainerState

from modeling_llm2clip.training.alignment import step_times
from modeling_llm2clip.training.alignment.step_times import (
    StepTimes,
    StepTimesCallback,
    describe_shares,
)


def test_shares_add_up_and_an_inner_part_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 7.0, 9.0, 10.0, 15.0])  # of a clock that no machine slows down
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    times = StepTimes()
    with times.measure("backward"):
        with times.measure("forward"):
            pass
    shares = times.take_shares()
    assert shares == pytest.approx({"forward": 0.4, "backward": 0.4, "rest": 0.2})
    assert times.take_shares() == {"rest": 1.0}


def test_input_is_shared_by_what_took_it_where_it_was_made() -> None:
    times = StepTimes()
    for _ in range(2):
        times.add_input(torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64))
    shares = times.take_input_shares()
    assert shares == {"decode": 0.75, "tokenize": 0.25}
    assert times.take_input_shares() == {}
    line = describe_shares({"input": 0.5, "forward": 0.3, "rest": 0.2}, shares)
    assert line == (
        "input 50% (decode 75%, tokenize 25%), copy 0%, forward 30%, backward 0%, rest 20%"
    )


def test_lines_come_at_doubling_times_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: seconds[0])
    monkeypatch.setattr(step_times, "time", clock)
    callback = StepTimesCallback(StepTimes(), epoch_at=float, shown=True)
    arguments: Any = None
    for step in range(1, 601):  # one second and one epoch each
        seconds[0] = float(step)
        state = TrainerState(max_steps=600, global_step=step)
        callback.on_step_end(arguments, state, TrainerControl())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [int(line.split()[1].strip(":")) for line in lines] == [10, 20, 40, 80, 160, 320, 600]


@pytest.mark.slow
def test_a_run_says_once_an_epoch_what_bounds_it(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(step_times, "_SECONDS_BEFORE_FIRST_LINE", 0.0)
    monkeypatch.setattr(step_times, "_FACTOR_TO_NEXT_LINE", 0.0)
    prepared.align_stored(tmp_path / "run", max_steps=7, global_batch_size=4, refit=False)
    shown = capsys.readouterr()
    lines = [line for line in (shown.out + shown.err).splitlines() if "input" in line]
    per_epoch = len(prepared.records) // 4
    assert len(lines) == -(-7 // per_epoch)
    assert all(line.split(": ")[1].startswith("input ") and "read 100%" in line for line in lines)
