"""Where the time of a run goes, so that a user sees what bounds it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Parts of making a batch, in the order of `AlignmentDataset`'s `input_seconds`.
INPUT_PARTS = ("read", "decode", "tokenize")
_REST = "rest"
_SECONDS_BEFORE_FIRST_LINE = 10.0
_FACTOR_TO_NEXT_LINE = 2.0


@contextmanager
def measure_input(seconds: Tensor, part: str) -> Iterator[None]:
    """Add the seconds that the context takes to those of a part of making a batch."""
    begin = time.perf_counter()
    yield
    seconds[INPUT_PARTS.index(part)] += time.perf_counter() - begin


def no_input_seconds() -> Tensor:
    """Return zero seconds for each of `INPUT_PARTS`."""
    return torch.zeros(len(INPUT_PARTS), dtype=torch.float64)


class StepTimes:
    """Adds up the seconds of the parts of steps; a part inside another one is not counted twice."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._input_seconds = no_input_seconds()
        self._inner: list[float] = []
        self._begin = time.perf_counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Measure what runs in the context."""
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            inner = self._inner.pop()
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds - inner
            if self._inner:
                self._inner[-1] += seconds

    def add_input(self, seconds: Tensor) -> None:
        """Add what the parts of a batch took where it was made, perhaps in another process."""
        self._input_seconds += seconds.cpu()

    def take_shares(self) -> dict[str, float]:
        """Return the share of each part in the time since the last call, and begin anew."""
        now = time.perf_counter()
        total = now - self._begin
        shares = {part: seconds / total for part, seconds in self._seconds.items()}
        shares[_REST] = 1.0 - sum(shares.values())
        self._seconds.clear()
        self._begin = now
        return shares

    def take_input_shares(self) -> dict[str, float]:
        """Return the share of each part in the making of batches, and begin anew."""
        total = float(self._input_seconds.sum())
        shares = zip(INPUT_PARTS, self._input_seconds.tolist(), strict=True)
        found = {part: seconds / total for part, seconds in shares if seconds}
        self._input_seconds.zero_()
        return found


class StepTimesMixin:
    """Makes a Trainer measure its input, the copy to the device, and the two passes."""

    step_times: StepTimes

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for a batch."""
        with self.step_times.measure("input"):
            samples: Any = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        for batch in samples[0]:
            self.step_times.add_input(batch.pop("input_seconds"))
        return samples

    def _prepare_inputs(self, inputs: Any) -> Any:
        with self.step_times.measure("copy"):
            return super()._prepare_inputs(inputs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make the two passes of a step."""
        with self.step_times.measure("backward"):
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
            if loss.is_cuda:  # the check of the gradients waits for it next
                torch.cuda.synchronize(loss.device)
        return loss


class StepTimesCallback(TrainerCallback):
    """Writes lines to stderr at ends of epochs, each after twice the time, and one at the end.

    So a run of ten minutes has about six of them, and one of a day 13.

    Args:
        times: What the Trainer measures.
        epoch_at: Passes over the data after a number of steps.
        shown: Whether the lines are shown.
    """

    def __init__(self, times: StepTimes, *, epoch_at: Callable[[int], float], shown: bool) -> None:
        self._times = times
        self._epoch_at = epoch_at
        self._epoch = 0
        self._shown = shown
        self._begin = time.perf_counter()
        self._due = _SECONDS_BEFORE_FIRST_LINE

    def on_step_end(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        is_last = state.global_step >= state.max_steps
        seconds = time.perf_counter() - self._begin
        epoch = int(self._epoch_at(state.global_step))
        if not is_last and (epoch == self._epoch or seconds < self._due):
            return
        self._epoch = epoch
        self._due = _FACTOR_TO_NEXT_LINE * seconds
        line = describe_shares(self._times.take_shares(), self._times.take_input_shares())
        if self._shown:
            tqdm.write(f"step {state.global_step}: {line}", file=sys.stderr)


def describe_shares(shares: dict[str, float], input_shares: dict[str, float]) -> str:
    """Describe where the time went."""
    of_input = ", ".join(f"{part} {share:.0%}" for part, share in input_shares.items())
    described = []
    for part in ("input", "copy", "forward", "backward", _REST):
        inner = f" ({of_input})" if part == "input" and of_input else ""
        described.append(f"{part} {shares.get(part, 0.0):.0%}{inner}")
    return ", ".join(described)
