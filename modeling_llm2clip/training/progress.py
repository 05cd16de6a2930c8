"""What a training shows while it runs: one bar, and one line of numbers a log, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

# Logged name → as it is shown, where that is not the name with blanks.
_NAMES = {
    "learning_rate": "lr",
    "eval_cra": "held-out CRA",
    "held_out_loss": "held-out loss",
    "held_out_text_to_image_r1": "R@1 text to image",
    "held_out_image_to_text_r1": "R@1 image to text",
}
_SHARES = ("eval_cra", "held_out_text_to_image_r1", "held_out_image_to_text_r1")
# What says nothing about the training: sums, and times of an evaluation.
_LEFT_OUT = ("total_flos", "_runtime", "_per_second")
_GAP = "  "
_SECONDS_BETWEEN_DRAWINGS = 10.0  # where every drawing stays, as in a file


class StepProgress:
    """A bar of steps with rate and ETA, and lines of numbers above it.

    Args:
        num_steps: of the whole run.
        first_step: how many of them were done before, by a run that is resumed.
        pairs_per_step: of all processes together; None where lines show steps a second.
        shown: False for nothing at all.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        first_step: int = 0,
        pairs_per_step: int | None = None,
        shown: bool = True,
    ) -> None:
        self._num_steps = num_steps
        self._pairs_per_step = pairs_per_step
        self._first_step = self._last_step = self._step = first_step
        self._started = self._last_time = time.monotonic()
        self._shown = shown
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit=" steps",
            disable=not shown,
            mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_DRAWINGS,
        )

    def update(self, step: int) -> None:
        """Note that so many steps of the run are done."""
        self._bar.update(step - self._step)
        self._step = step

    def show(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Write one line: the step, what was logged, and the speed since the last line."""
        rate = self._measure(step - self._last_step, time.monotonic() - self._last_time)
        self._last_step, self._last_time = step, time.monotonic()
        self._write([f"step {step}/{self._num_steps}", *list_numbers(numbers), *rate])

    def close(self, numbers: Mapping[str, Any] | None = None) -> None:
        """Take the bar away; with numbers of the whole run, write a last line."""
        self._bar.close()
        if numbers is not None:
            seconds = time.monotonic() - self._started
            steps = self._step - self._first_step
            shown = [f"{steps} steps in {describe_seconds(seconds)}", *list_numbers(numbers)]
            self._write([*shown, *self._measure(steps, seconds)])

    def _measure(self, steps: int, seconds: float) -> list[str]:
        if steps <= 0 or seconds <= 0:
            return []
        if self._pairs_per_step is None:
            return [f"{_shorten(steps / seconds)} steps/s"]
        return [f"{_shorten(steps * self._pairs_per_step / seconds)} pairs/s"]

    def _write(self, parts: list[str]) -> None:
        if self._shown:
            tqdm.write(_GAP.join(parts), file=sys.stderr)


def list_numbers(numbers: Mapping[str, Any]) -> list[str]:
    """Each number behind its name; what is no number, or of no use to a reader, is left out."""
    shown = []
    for name, value in numbers.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not name.endswith(_LEFT_OUT):
            written = f"{value:.1%}" if name in _SHARES else _shorten(value)
            shown.append(f"{_NAMES.get(name, name.replace('_', ' '))} {written}")
    return shown


def describe_seconds(seconds: float) -> str:
    """A duration in the two largest units that it has."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _shorten(value: float) -> str:
    """At most four digits that mean something, large numbers with commas: 9.1e-05, 2.31, 12,345."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
