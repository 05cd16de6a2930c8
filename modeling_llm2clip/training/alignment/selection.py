"""Keeps the weights of a run that find most on held-out images, and stops when no better come."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...data.atomic_files import write_atomically
from ..checkpoints import find_trained
from .held_out import HeldOutImages, HeldOutScores

if TYPE_CHECKING:
    from .alignment_trainer import AlignmentTrainer

BEST_FILE = "best.safetensors"
_METADATA = "held_out"


class KeepBest(TrainerCallback):
    """Looks at the held-out images before the run, every so many steps, and at its end.

    The weights with the lowest held-out loss lie in `best.safetensors` of the run's folder, those
    of the start among them, so that a run never ends with less than it started from.

    Args:
        images: what is looked at.
        output: the run's folder.
        every: steps between two looks.
        patience: looks in a row without a lower loss after which the run stops; None never.
        patient_until: steps before which the run never stops.

    Attributes:
        before, best, best_step: scores of the start and of the kept weights, and their step.
        has_stopped_early: whether patience ran out.
    """

    def __init__(
        self,
        images: HeldOutImages,
        output: Path,
        *,
        every: int,
        patience: int | None,
        patient_until: int,
    ) -> None:
        self.images = images
        self.output = output
        self.every = every
        self.patience = patience
        self.patient_until = patient_until
        self.before: HeldOutScores | None = None
        self.best: HeldOutScores | None = None
        self.best_step = 0
        self.has_stopped_early = False
        self.trainer: AlignmentTrainer | None = None

    @property
    def file(self) -> Path:
        """Where the best weights lie."""
        return self.output / BEST_FILE

    def on_train_begin(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if state.global_step and self.file.is_file():
            self._read_earlier()
        if self.before is None:
            self._look(step=state.global_step)

    def on_step_end(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        step = state.global_step
        if step % self.every and step < state.max_steps:
            return
        is_due = control.should_log
        self._look(step=step)
        control.should_log = is_due  # logging took it back, and this step's loss would be lost
        lost = (step - max(self.best_step, self.patient_until)) // self.every
        if self.patience is not None and lost >= self.patience and step < state.max_steps:
            self.has_stopped_early = True
            control.should_training_stop = control.should_log = control.should_save = True

    def as_record(self) -> dict[str, Any]:
        """The scores of start and kept weights, and the step of these, as JSON holds them."""
        assert self.before is not None and self.best is not None
        return {
            "before": self.before.as_record(),
            "best": self.best.as_record(),
            "best_step": self.best_step,
        }

    def load_best(self) -> dict[str, Tensor]:
        """Return the best weights, by their names while training, on the CPU."""
        return load_file(self.file)

    def _look(self, *, step: int) -> None:
        """Measure, and keep the weights where none were better."""
        assert self.trainer is not None
        scores = self._measure(self.trainer)
        if self.before is None:
            self.before = scores
        else:
            self.trainer.log(
                {
                    "held_out_loss": scores.loss,
                    "held_out_text_to_image_r1": scores.text_to_image_r1,
                    "held_out_image_to_text_r1": scores.image_to_text_r1,
                }
            )
        if self.best is None or scores.loss < self.best.loss:
            self.best, self.best_step = scores, step
            self._keep(self.trainer)

    def _measure(self, trainer: AlignmentTrainer) -> HeldOutScores:
        model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.alignment_model
        is_stored = self.images.dataset.is_stored
        embeds = self.images.embed(
            model, trainer.args.device, nullcontext if is_stored else self._autocast
        )
        found: list[Any] = [self.images.score(*embeds)]
        # Other hardware may round otherwise; all processes must keep and stop alike.
        broadcast_object_list(found)
        scores: HeldOutScores = found[0]
        if not math.isfinite(scores.loss):
            raise FloatingPointError(
                f"The held-out loss is {scores.loss} at step {trainer.state.global_step}. Lower "
                f"the learning rate ({trainer.args.learning_rate}), or look for broken embeddings."
            )
        return scores

    def _autocast(self) -> AbstractContextManager[Any]:
        assert self.trainer is not None
        context: AbstractContextManager[Any] = self.trainer.compute_loss_context_manager()
        return context

    def _keep(self, trainer: AlignmentTrainer) -> None:
        state = trainer.collect_trained()
        if not trainer.args.should_save:
            return
        weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        metadata = {_METADATA: json.dumps(self.as_record())}
        write_atomically(self.file, save(weights, metadata=metadata))

    def _read_earlier(self) -> None:
        """Take over what an earlier part of this run has kept."""
        with safe_open(self.file, framework="pt") as file:
            entry = json.loads(file.metadata()[_METADATA])
        self.before = HeldOutScores(**entry["before"])
        self.best, self.best_step = HeldOutScores(**entry["best"]), entry["best_step"]


def restore(trainer: AlignmentTrainer, weights: dict[str, Tensor]) -> None:
    """Put kept weights back into an unsharded model."""
    model = trainer.alignment_model
    assert set(weights) == find_trained(model)
    model.load_state_dict(weights, strict=False)
