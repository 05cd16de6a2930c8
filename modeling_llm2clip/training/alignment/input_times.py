"""Measures the share of a run's time in which it waits for batches, and shows what bounds it.

Only the process is watched, between two steps: a GPU is never waited for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

INPUT_SECONDS = "input_seconds"
"""Name in a batch of the seconds that its parts took where it was made."""
_PARTS = ("read", "decode", "tokenize")
_SECONDS_BEFORE_FIRST_LINE = 10.0
_FACTOR_TO_NEXT_LINE = 2.0


class InputTimes:
    """Seconds of the parts of making a batch, perhaps in another process."""

    def __init__(self) -> None:
        self.seconds = torch.zeros(len(_PARTS), dtype=torch.float64)

    def add(self, part: str, seconds: float) -> None:
        self.seconds[_PARTS.index(part)] += seconds

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.add(part, time.perf_counter() - begin)

    def describe(self) -> str:
        """Describe the parts by their shares, such as "decode 91%, tokenize 9%"."""
        total = float(self.seconds.sum())
        parts = zip(_PARTS, self.seconds.tolist(), strict=True)
        return ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in parts if seconds)


class InputTimesCallback(TrainerCallback):
    """Writes lines to stderr at ends of epochs, each after twice the time, and one at the end.

    So a run of ten minutes has about six of them, and one of a day 13. Each is about the time since
    the one before.
    """

    def __init__(self, *, epoch_at: Callable[[int], float], shown: bool) -> None:
        self._epoch_at = epoch_at
        self._shown = shown
        self._epoch = 0
        self._begin = self._last = time.perf_counter()
        self._due = _SECONDS_BEFORE_FIRST_LINE
        self._waited = 0.0
        self._made = InputTimes()

    def take(self, read: Callable[[], Any]) -> Any:
        """Wait for the batches that a Trainer reads, and take out how long making them took."""
        begin = time.perf_counter()
        found = read()
        self._waited += time.perf_counter() - begin
        for batch in found[0]:
            self._made.seconds += batch.pop(INPUT_SECONDS)
        return found

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        now = time.perf_counter()
        is_last = state.global_step >= state.max_steps
        epoch = int(self._epoch_at(state.global_step))
        if not is_last and (epoch == self._epoch or now - self._begin < self._due):
            return
        share = self._waited / (now - self._last)
        if self._shown:
            tqdm.write(
                f"step {state.global_step}: input {share:.0%} of the time "
                f"({self._made.describe()}), training {1 - share:.0%}",
                file=sys.stderr,
            )
        self._epoch, self._last, self._waited = epoch, now, 0.0
        self._due = _FACTOR_TO_NEXT_LINE * (now - self._begin)
        self._made.seconds.zero_()
