"""What both training stages hang on a transformers Trainer."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_tensorboard_available
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from .graceful_stop import StopRequest
from .progress import StepProgress

_TIME_OF_RUN = "train_runtime"


class JsonLinesCallback(TrainerCallback):
    """Appends every log of a Trainer to a file, one JSON object a line, with its step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ReadableProgress(TrainerCallback):
    """Shows a bar with rate and ETA, and each log of a Trainer as one line of numbers."""

    _progress: StepProgress | None = None

    def on_train_begin(  # noqa: D102
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        per_process = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._progress = StepProgress(
            state.max_steps,
            first_step=state.global_step,
            pairs_per_step=per_process * args.world_size,
            shown=state.is_world_process_zero,
        )

    def on_step_end(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if self._progress is not None:
            self._progress.update(state.global_step)

    def on_log(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._progress is None or not logs:
            return
        if _TIME_OF_RUN in logs:  # the last log of a Trainer
            of_run = {"mean loss": logs["train_loss"]} if "train_loss" in logs else {}
            self._progress.close(of_run)
            self._progress = None
        else:
            self._progress.show(state.global_step, logs)

    def on_train_end(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


def show_readable_progress(trainer: Trainer) -> None:
    """Put `ReadableProgress` in the place of a Trainer's own bar and its printed dictionaries."""
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ReadableProgress())


class LogLastStep(TrainerCallback):
    """Logs the loss of the steps since the last log, too, when the last step is done."""

    def on_step_end(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class StopOnSignal(TrainerCallback):
    """After a signal: finish the step, save a checkpoint, stop."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if self.stop.signal:
            control.should_save = control.should_training_stop = True


class ShareSignal(TrainerCallback):
    """Makes a signal that one process got known to all, so that they stop at the same step.

    Stands before `StopOnSignal`, which acts on it.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(  # noqa: D102
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if args.world_size > 1:
            number = torch.tensor(int(self.stop.signal or 0), device=args.device)
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            if number and self.stop.signal is None:
                self.stop.signal = signal.Signals(int(number))


def choose_reports() -> list[str]:
    """Loggers of a Trainer besides our own: TensorBoard where it is installed."""
    return ["tensorboard"] if is_tensorboard_available() else []
