"""Checkpoints of a run: what they hold, which is the last whole one, what is done again after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..data.atomic_files import write_atomically
from .run_record import METRICS_FILE

CHECKPOINTS = "checkpoints"
# Written last into a checkpoint: one without it was broken off.
_COMPLETE = "complete"
_NAMES_SHOWN = 5


def require_finite(weights: Mapping[str, Tensor], *, step: int) -> None:
    """Raise FloatingPointError naming weights that are not finite, before they are kept."""
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {len(weights)} trained weights are not finite after step {step}: "
            f"{broken[:_NAMES_SHOWN]}. Nothing was written. Lower the learning rate, or train in "
            "float32."
        )


def find_trained(model: nn.Module) -> set[str]:
    """Names of the parameters that training changes; both ends of a tied pair are one.

    No buffer is changed: batch normalisation keeps its statistics.
    """
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def mark_complete(output: Path, step: int) -> None:
    """Note that the checkpoint of a step is whole."""
    (output / CHECKPOINTS / f"checkpoint-{step}" / _COMPLETE).touch()


def find_last_checkpoint(output: Path) -> Path | None:
    """Return the last whole checkpoint of a run, or None."""
    folders = (output / CHECKPOINTS).glob("checkpoint-*")
    whole = [folder for folder in folders if (folder / _COMPLETE).is_file()]
    return max(whole, key=_step_of, default=None)


def forget_what_came_after(output: Path, checkpoint: Path | None) -> None:
    """Drop metrics and broken-off checkpoints of steps that will be done again."""
    step = 0 if checkpoint is None else _step_of(checkpoint)
    for folder in (output / CHECKPOINTS).glob("checkpoint-*"):
        if _step_of(folder) > step:
            shutil.rmtree(folder)
    file = output / METRICS_FILE
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        # The last line of a killed run may be half written.
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        # A second kill, here, must not lose the lines of the steps that are kept.
        write_atomically(file, "".join(kept).encode())


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
