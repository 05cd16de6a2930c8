"""Options of both training stages, named as in transformers' `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import DeviceConfig, Seed


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(DeviceConfig):
    """Options of a training stage: duration, speed, device, checkpoints and metrics."""

    max_steps: Annotated[int, Interval(ge=1)] | None = None
    """Number of steps. Default: set by `num_train_epochs`."""
    num_train_epochs: Annotated[float, Interval(gt=0)] | None = None
    """Passes over the data. Default: by stage."""
    learning_rate: Annotated[float, Interval(gt=0)] | None = None
    """Peak learning rate. Default: by stage."""
    warmup_steps: Annotated[float, Interval(ge=0)] = 0.1
    """Steps until the learning rate reaches its peak; below 1, a share of the run."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and takes about a third more
    time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto is bfloat16 on GPUs that support it, and otherwise the dtype
    in which each weight is stored. Trained weights stay float32. float32 also computes towers
    stored in half precision in float32. A launcher's mixed precision changes nothing."""
    save_steps: Annotated[int, Interval(ge=1)] = 500
    """Steps between checkpoints; the last step has one too."""
    logging_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between lines of metrics. Default: by stage."""
    report_to: tuple[str, ...] | None = None
    """Where to report metrics besides metrics.jsonl, as in Trainer: tensorboard, trackio, wandb,
    none. Default: tensorboard if it is installed."""
    seed: Seed = 0
    """Seed of all random numbers."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            f"warmup_steps={self.warmup_steps} must be a share below 1 or an integer.": (
                self.warmup_steps > 1 and self.warmup_steps % 1
            ),
        }
