"""What both training stages name before a transformers Trainer as a base: stopping, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from .checkpoints import find_trained, mark_complete, require_finite

_WEIGHTS = "trained.safetensors"
_NAMES_SHOWN = 5


class FiniteGradients:
    """Makes a Trainer stop before a step whose gradient is not finite.

    One such step makes every weight NaN, since the gradient is clipped as a whole.
    """

    state: Any
    args: Any

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient's norm is {float(norm)} at step {self.state.global_step}, although "
                f"the loss is finite. Lower the learning rate ({self.args.learning_rate}), or "
                "train in float32."
            )
        return norm


class ResumedMetricsMixin:
    """Makes a Trainer leave figures of the whole run out of its log where it did a part of it.

    Mean loss and speed of a run that was stopped or resumed: some versions of transformers divide
    the sums of the part by the steps of the whole.
    """

    state: Any
    _is_resumed = False

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and note whether from the beginning."""
        self._is_resumed = resume_from_checkpoint is not None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what holds."""
        if self._is_resumed or self.state.global_step < self.state.max_steps:
            logs = {name: value for name, value in logs.items() if not _is_of_whole_run(name)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _is_of_whole_run(name: str) -> bool:
    return name == "train_loss" or (name.startswith("train_") and name.endswith("_per_second"))


class MarkedCheckpoints:
    """Makes a Trainer mark a checkpoint when all of it is written."""

    state: Any
    args: Any

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:
            mark_complete(Path(self.args.output_dir).parent, self.state.global_step)


class TrainedCheckpoints(MarkedCheckpoints):
    """Makes a Trainer save and load what is trained, and nothing that the model's folder has.

    Nothing is saved when a weight is not finite.
    """

    model: Any
    is_fsdp_enabled: bool

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # Given, and whole, where the parameters themselves are sharded.
        state = dict(self.model.named_parameters()) if state_dict is None else state_dict
        kept = {name: state[name].detach().cpu().contiguous() for name in find_trained(self.model)}
        require_finite(kept, step=self.state.global_step)
        save_file(kept, folder / _WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        saved = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        names = find_trained(self.model)
        if names != saved.keys():
            raise ValueError(
                f"{resume_from_checkpoint} does not hold what is trained now: missing "
                f"{sorted(names - saved.keys())[:_NAMES_SHOWN]}, without a place "
                f"{sorted(saved.keys() - names)[:_NAMES_SHOWN]}."
            )
        self.model.load_state_dict(saved, strict=False)
