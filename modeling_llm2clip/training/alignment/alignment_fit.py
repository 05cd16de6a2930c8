"""One fit of a model to its data: the run that chooses on held-out images, or one on all of them.

A run may have two of them, one after the other. Each has its own model, Trainer, metrics and
checkpoints, so that either can be resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from ...configs.align_config import AlignConfig
from ...scheduling.graceful_stop import StopRequest
from ..distributed import is_sharded
from ..losses.loss import Loss
from ..run_folder import (
    METRICS_FILE,
    discard_later_steps,
    find_last_checkpoint,
    list_trained,
    require_finite,
)
from ..trainer_mixins import JsonLinesCallback, StopCallback, show_progress
from .alignment_model import LOSS, AlignmentModel
from .alignment_trainer import AlignmentTrainer, RunLength, make_training_arguments
from .best_weights import BestWeightsCallback
from .run_data import RecordData, RunData
from .trained_parts import choose_trained_parts, freeze_unused, merge_loras
from .training_objective import TrainingObjective


@dataclass(frozen=True)
class AlignmentFit:
    """What a fit needs.

    Attributes:
        source: Folder of the model that is trained.
        data: What it is trained on, and measured on.
        output: Folder of metrics and checkpoints.
        config: Options of the alignment.
        loss: What is trained on; each fit trains a copy of its parameters.
        resume: Whether to continue from the last checkpoint.
        callbacks: Further callbacks of the Trainer.
    """

    source: Path
    data: RunData
    output: Path
    config: AlignConfig
    loss: Loss
    resume: bool
    callbacks: Sequence[TrainerCallback] = ()

    def make_arguments(self) -> TrainingArguments:
        """Make the Trainer's arguments; joins the process group of a launcher."""
        return make_training_arguments(self.output, self.config)

    def find_checkpoint(self) -> Path | None:
        """Return the checkpoint to continue from, or None to begin."""
        return find_last_checkpoint(self.output) if self.resume else None

    def load(self) -> tuple[AlignmentModel, dict[str, Any]]:
        """Load the model with its trained parts chosen, on the CPU."""
        set_seed(self.config.seed)
        model = self.load_parts(self.source)
        if self.config.precision == "float32":
            model.float()  # type: ignore[no-untyped-call]  # towers in half precision would be computed in it
        return model, choose_trained_parts(model, self.config)

    def load_parts(self, folder: Path) -> AlignmentModel:
        """Load the parts of a model that the fit needs, with the loss as it was given."""
        model: AlignmentModel = AlignmentModel.from_pretrained(
            folder,
            with_llm=self.config.text_training != "stored",
            with_vision_tower=self.data.reads_images,
        )
        model.loss = deepcopy(self.loss)
        return model

    def make_ready(self, model: AlignmentModel, length: RunLength, device: Any) -> None:
        """Move a model to where it is trained, once its start is set."""
        if not is_sharded() or not length.num_trained:  # otherwise the Trainer moves it
            model.to(device)
        freeze_unused(model, self.data.processor, self.config)

    def begin(self) -> None:
        """Discard in the main process what will be done again, and let the others wait for it."""
        state = PartialState()
        if state.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            discard_later_steps(self.output, self.find_checkpoint())
        state.wait_for_everyone()

    def make_objective(
        self, length: RunLength, *, record: Path, name: str
    ) -> TrainingObjective | None:
        """Make what measures the loss of a training batch; None where it cannot be measured.

        It cannot on a stream, which is not read twice, and is the same where no step is trained.
        """
        if not length.num_trained or not isinstance(self.data, RecordData):
            return None
        return TrainingObjective(
            self.data.dataset,
            self.data.items,
            size=length.batch_size,
            seed=self.config.seed,
            output=record,
            name=name,
        )

    def make_trainer(
        self,
        model: AlignmentModel,
        arguments: TrainingArguments,
        length: RunLength,
        stop: StopRequest,
        *,
        name: str = "align",
        best_weights: BestWeightsCallback | None = None,
        objective: TrainingObjective | None = None,
    ) -> AlignmentTrainer:
        """Make the Trainer of the fit."""
        callbacks = [JsonLinesCallback(self.output / METRICS_FILE), StopCallback(stop)]
        trainer = AlignmentTrainer(
            model,
            self.data,
            config=self.config,
            length=length,
            training_arguments=arguments,
            callbacks=[*callbacks, *([objective] if objective else []), *self.callbacks],
            best_weights=best_weights,
        )
        if objective is not None:
            objective.trainer = trainer
        show_progress(trainer, name)
        return trainer


def raise_if_stopped(
    trainer: AlignmentTrainer, output: Path, stop: StopRequest, *, of: str = ""
) -> None:
    """Raise StageInterrupt if a signal stopped a fit before its last step."""
    state = trainer.state
    if state.global_step < state.max_steps:
        stop.raise_interrupt(
            f"Stopped after step {state.global_step} of {state.max_steps}{of}; the checkpoint is "
            f"in {output}.",
            resume=True,
            is_main_process=trainer.args.should_save,
        )


def collect_weights(
    trainer: AlignmentTrainer,
    adapted: dict[str, Any],
    scratch: Path,
    *,
    best: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Collect the weights that differ from the source's, by their names in its folder.

    They are on the CPU, with LoRAs merged; empty in all but the main process.
    """
    model = trainer.alignment_model
    if trainer.is_fsdp_enabled:
        state = best or trainer.collect_trained()
    else:
        if best:
            assert set(best) == list_trained(model)
            model.load_state_dict(best, strict=False)
        state = merge_loras(model, adapted)
    require_finite(state, step=trainer.state.global_step)
    state = {name: value for name, value in state.items() if not name.startswith(f"{LOSS}.")}
    if not trainer.args.should_save:
        return {}
    return model.name_as_saved({name: value.cpu() for name, value in state.items()}, scratch)
