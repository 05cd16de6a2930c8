"""Fit a model, either to the training split or, in the refit, to all of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ...configs.align_config import AlignConfig
from ...data.store.embedding_store import EmbeddingStore
from ...encoding.layer_compilation import compile_layers
from ...encoding.pixel_normalization import find_normalization
from ...encoding.precision import load_on_device
from ...model_folders.guarded_loading import find_stored_dtype, load_in_precision
from ...modeling_llm2clip import LLM2CLIPVisionModel
from ...scheduling.graceful_stop import StopRequest
from ...scheduling.processes import choose_device
from ..losses.loss import Loss
from ..run_folder import (
    METRICS_FILE,
    add_results,
    discard_later_steps,
    find_last_checkpoint,
    list_trained,
    require_finite_weights,
    require_intact_checkpoint,
)
from ..trainer_mixins import (
    JsonLinesCallback,
    StopCallback,
    computes_in_bfloat16,
    is_sharded,
    raise_if_stopped,
    show_progress,
)
from .alignment_model import LOSS, AlignmentModel, choose_trained_parts, freeze_unused, merge_loras
from .alignment_trainer import (
    AlignmentTrainer,
    OptimizerFactory,
    RunLength,
    make_training_arguments,
)
from .best_weights import BestWeightsCallback, TrainingObjective, copy_trained, set_between
from .held_out import ZeroShotImages
from .kept_texts import KeptTexts
from .projection_init import ProjectionInit, repeat_init
from .run_data import RecordData, RunData, StreamData

REFIT_FOLDER = "refit"


@dataclass(frozen=True)
class AlignmentFit:
    """One fit of a model, to the training split or, in the refit, to all of the data.

    Each fit has its own model, copy of the loss parameters, Trainer, metrics and checkpoints, so
    each fit can be resumed.
    """

    source: Path
    data: RunData
    output: Path
    config: AlignConfig
    loss: Loss
    resume: bool
    callbacks: Sequence[TrainerCallback] = ()
    zero_shot: ZeroShotImages | None = None
    teacher: EmbeddingStore | None = None
    kept: KeptTexts | None = None
    optimizer: OptimizerFactory | None = None

    def find_checkpoint(self) -> Path | None:
        return find_last_checkpoint(self.output) if self.resume else None

    def load(self, device: torch.device) -> tuple[AlignmentModel, dict[str, Any]]:
        """Load the model onto its device and choose its trained parts.

        The model stays on the CPU if the Trainer will shard it.
        """
        set_seed(self.config.seed)
        load_device = torch.device("cpu") if is_sharded() else device
        model = self.load_parts(self.source, load_device, rounds_towers=self.rounds_towers(device))
        if self.config.precision == "float32":
            model.float()  # type: ignore[no-untyped-call]  # towers in half precision would be computed in it
        return model, choose_trained_parts(model, self.config)

    def load_parts(
        self, folder: Path, device: torch.device, *, rounds_towers: bool = False
    ) -> AlignmentModel:
        """Load the model parts that the fit needs, with a fresh copy of the loss on the CPU."""
        load = partial(load_in_precision, precision="bfloat16") if rounds_towers else load_on_device
        model: AlignmentModel = load(
            AlignmentModel,
            folder,
            device,
            with_llm=self.config.text_training != "stored",
            with_vision_tower=self.data.dataset.reads_images,
        )
        model.loss, model.mini_batch_size = deepcopy(self.loss), self.config.mini_batch_size
        if self.data.dataset.reads_images:
            model.normalization = find_normalization(
                self.data.dataset.processor, choose_device(self.config.device)
            )
        if self.config.distillation_weight and self.data.dataset.image_store is None:
            model.teacher_model = load_on_device(LLM2CLIPVisionModel, self.source, device)
        return model

    def rounds_towers(self, device: torch.device) -> bool:
        """Return True if float32 towers are loaded in bfloat16 on this device.

        Loading in bfloat16 saves autocast from casting frozen weights at every use. If either tower
        is trained, both stay in float32.
        """
        return (
            computes_in_bfloat16(self.config.precision, device)
            and (self.config.vision_training, self.config.text_training == "lora")
            == ("frozen", False)
            and not is_sharded()
            and find_stored_dtype(self.source) == torch.float32
        )

    def make_ready(self, model: AlignmentModel, length: RunLength, device: Any) -> None:
        """Move an initialized model to its training device, and freeze unused weights."""
        if not is_sharded() or not length.num_trained:  # otherwise the Trainer moves it
            model.to(device)
        freeze_unused(model, self.data.dataset.processor, self.config)

    def train(
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
        """Train a model after `make_ready`, from the last checkpoint if there is one."""
        checkpoint, state = self.find_checkpoint(), PartialState()
        if state.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            discard_later_steps(self.output, checkpoint)
        state.wait_for_everyone()
        for part in (model, model.teacher_model) if self.config.compile else ():
            if part is not None:
                compile_layers(part)
        recorded = JsonLinesCallback(self.output / METRICS_FILE)
        trainer = AlignmentTrainer(
            model,
            self.data,
            length=length,
            training_arguments=arguments,
            callbacks=[recorded, StopCallback(stop), *self.callbacks],
            kept=self.kept,
            optimizer=self.optimizer,
        )
        for callback in (objective, best_weights):
            if callback is not None:
                callback.trainer = trainer
                trainer.add_callback(callback)
        show_progress(trainer, name)
        self._run(trainer, checkpoint, best_weights)
        return trainer

    def _run(
        self,
        trainer: AlignmentTrainer,
        checkpoint: Path | None,
        best_weights: BestWeightsCallback | None,
    ) -> None:
        """Train from scratch or from a checkpoint; a run without steps is only evaluated."""
        if not trainer.length.num_trained:
            trainer.state.max_steps = 0
            if best_weights is not None:
                best_weights.on_train_begin(trainer.args, trainer.state, trainer.control)
            return
        if checkpoint is None:
            trainer.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if isinstance(self.data, StreamData):
            self.data.load(checkpoint)
        if best_weights is not None:
            best_weights.read_earlier(state)
            if best_weights.has_stopped_early and state.global_step < state.max_steps:
                trainer.state = state  # the run stopped early here
                return
        trainer.train(resume_from_checkpoint=str(checkpoint))


@dataclass(frozen=True)
class Choice:
    """The weights selected on held-out images.

    `step` is 0 for the initial weights; `share` is the share of the way from the initial weights
    to the weights of that step.
    """

    start: ProjectionInit
    length: RunLength
    step: int
    share: float


def refit(fit: AlignmentFit, choice: Choice, stop: StopRequest) -> dict[str, Tensor]:
    """Refit on all images with the settings selected on held-out images; return the weights.

    The settings are shrinkages, initial temperature, number of steps, batch size and the share of
    the way from the start. The refit also trains on the held-out images, so the written model
    cannot be scored on them; the scores from before the refit are the estimate of its quality.
    """
    assert isinstance(fit.data, RecordData)  # a stream is read only once
    again = replace(fit, data=fit.data.with_held_out(), output=fit.output / REFIT_FOLDER)
    require_intact_checkpoint(again.output)
    length = replace(choice.length, last_step=choice.step)
    arguments = make_training_arguments(again.output, again.config)
    model, adapted = again.load(arguments.device)
    # Also repeated on resume, because interpolated weights need the start.
    start = repeat_init(model, again.data, again.config, choice.start, fit.output)
    again.make_ready(model, length, arguments.device)
    before = copy_trained(model) if choice.share < 1 else {}
    trainer = again.train(model, arguments, length, stop, name="align, all images")
    raise_if_stopped(trainer, again.output, stop, of=" of the fit on all images")
    if before:
        set_between(model, before, copy_trained(model), choice.share)
    if arguments.should_save:
        add_results(
            fit.output,
            refit={
                "start": asdict(start),
                "steps": choice.step,
                "num_records": again.data.num_items,
            },
        )
    return collect_weights(trainer, adapted, fit.output)


def collect_weights(
    trainer: AlignmentTrainer,
    adapted: dict[str, Any],
    scratch: Path,
    *,
    best: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Collect the weights that differ from the source model, by their names in its folder.

    The weights are on the CPU, with LoRAs merged. All processes except the main process get an
    empty dictionary.
    """
    model = trainer.alignment_model
    if trainer.is_fsdp_enabled:
        state = best or trainer.collect_trained()
    else:
        if best:
            assert set(best) == list_trained(model)
            model.load_state_dict(best, strict=False)
        state = merge_loras(model, adapted)
    require_finite_weights(state, step=trainer.state.global_step)
    state = {name: value for name, value in state.items() if not name.startswith(f"{LOSS}.")}
    model.teacher_model = None  # not part of a saved model
    return name_as_saved(model, state, scratch) if trainer.args.should_save else {}


def name_as_saved(
    model: AlignmentModel, state: Mapping[str, Tensor], scratch: str | Path
) -> dict[str, Tensor]:
    """Rename weights as in a saved folder, because transformers renames some weights on loading."""
    with TemporaryDirectory(dir=scratch) as folder:
        model.save_pretrained(folder, state_dict={name: v.cpu() for name, v in state.items()})
        files = sorted(Path(folder).glob("*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}
