"""transformers' Trainer with our loss, groups of parameters, batches and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ...encoding.devices import find_device
from ...heads_llm2clip import MAX_LOG_SCALE
from ..callbacks import LogLastStep, choose_reports
from ..checkpoints import CHECKPOINTS, find_trained
from ..distributed import join_processes, require_all_processes, training_arguments_on
from ..losses.contrastive import grouped_contrastive_loss
from ..trainer_mixins import FiniteGradients, ResumedMetricsMixin, TrainedCheckpoints
from ..training_precision import computes_in_bfloat16
from .align_arguments import AlignArguments
from .alignment_data import AlignmentDataset, keep_batch
from .alignment_model import AlignmentModel
from .optimization import split_by_decay, warm_up_then_cosine
from .sampling import ResumableBatchSampler
from .selection import KeepBest
from .sharding import keep_scores_in_float32
from .trained_parts import scale_by_layer

_BETAS = (0.9, 0.98)  # arXiv:2103.00020, table 18
_GROUPS_SHOWN = 8
_ADAPTER = "text_adapter."
# What wrappers put into the names of parameters.
_WRAPPERS = ("_fsdp_wrapped_module.", "module.", "_orig_mod.")


def make_training_arguments(output: Path, arguments: AlignArguments) -> TrainingArguments:
    """Translate our settings; also joins the process group where there is one.

    Batch size, number of steps and learning rate follow from data and start: see `RunLength`.
    """
    device = find_device(arguments.device)
    join_processes(cpu=device.type == "cpu")
    found = training_arguments_on(
        device,
        TrainingArguments,
        output_dir=str(output / CHECKPOINTS),
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.clip_norm,
        bf16=computes_in_bfloat16(arguments.precision, on_gpu=device.type == "cuda"),
        logging_steps=arguments.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # such a loss stops the run
        save_strategy="steps",
        save_steps=arguments.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        label_names=[],
        # A tower may have weights that its pooling never asks.
        ddp_find_unused_parameters=arguments.vision_training == "full",
        report_to=choose_reports(),
        seed=arguments.seed,
    )
    require_all_processes(found.world_size)
    return found


@dataclass(frozen=True)
class RunLength:
    """What a run comes to with the data that it got.

    Attributes:
        num_steps: of the whole run.
        batch_size: over all processes together.
        lr: peak rate of adapter, projections and LoRAs.
        adapter_begin: steps before the text adapter is trained too.
    """

    num_steps: int
    batch_size: int
    lr: float
    adapter_begin: int = 0


class AlignmentTrainer(FiniteGradients, ResumedMetricsMixin, TrainedCheckpoints, Trainer):
    """Trains an `AlignmentModel` on an `AlignmentDataset`.

    To the Trainer the whole run is one epoch, whose batches are functions of their number, so that
    a run is resumed anywhere by leaving out batches that are not even read.

    Args:
        model: with its trained parts chosen.
        items: of the dataset, those that are trained on.
        length: what the run comes to.
        training_arguments: from `make_training_arguments`.
        keep_best: what looks at held-out images; None without any.
    """

    def __init__(
        self,
        model: AlignmentModel,
        dataset: AlignmentDataset,
        *,
        items: Sequence[int],
        arguments: AlignArguments,
        length: RunLength,
        training_arguments: TrainingArguments,
        callbacks: list[TrainerCallback],
        keep_best: KeepBest | None = None,
    ) -> None:
        self.settings = arguments
        self.alignment_model = model
        self.keep_best = keep_best
        self.length = length
        training_arguments.max_steps = length.num_steps
        training_arguments.learning_rate = length.lr
        training_arguments.per_device_train_batch_size = max(
            1, length.batch_size // training_arguments.world_size
        )
        self.batches = ResumableBatchSampler(
            items,
            batch_size=length.batch_size,
            num_steps=length.num_steps,
            seed=arguments.seed,
            rank=training_arguments.process_index,
            num_processes=training_arguments.world_size,
        )
        self._rates = find_learning_rates(model, arguments, lr=length.lr)
        self._inverse_temperature = model.logit_scale().detach()
        super().__init__(
            model=model,
            args=training_arguments,
            train_dataset=dataset,
            callbacks=[ClampTemperature(), LogLastStep(), *callbacks],
        )
        if keep_best is not None:
            keep_best.trainer = self
            self.add_callback(keep_best)

    def create_accelerator_and_postprocess(self) -> None:
        """Create it, and have FSDP leave scores and temperature in float32."""
        super().create_accelerator_and_postprocess()
        keep_scores_in_float32(self.accelerator, self.alignment_model)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's batches of the whole run."""
        assert isinstance(self.train_dataset, AlignmentDataset)
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=keep_batch,
            num_workers=self.settings.num_workers,
            pin_memory=self.args.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.settings.seed),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Group parameters by when they begin, by learning rate, and by whether they decay."""
        if self.optimizer is None:
            of_kind: dict[tuple[int, float], list[nn.Parameter]] = {}
            for name, parameter in (model or self.alignment_model).named_parameters():
                if parameter.requires_grad:
                    name = _unwrap(name)
                    begin = self.length.adapter_begin if name.startswith(_ADAPTER) else 0
                    of_kind.setdefault((begin, self._rates[name]), []).append(parameter)
            groups = [
                group
                for begin, rate in sorted(of_kind, key=lambda kind: (kind[0], -kind[1]))
                for group in split_by_decay(
                    of_kind[begin, rate], self.settings.weight_decay, lr=rate, begin=begin
                )
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=self.length.lr, betas=_BETAS)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm up for a tenth of the steps, then fall as a cosine."""
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                chosen,
                [
                    warm_up_then_cosine(num_training_steps, begin=group["begin"])
                    for group in chosen.param_groups
                ],
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def collect_trained(self) -> dict[str, Tensor]:
        """Everything that training changes, whole, by its name while training.

        Under FSDP all processes must call it together.
        """
        names = find_trained(self.alignment_model)
        if self.is_fsdp_enabled:
            state = self.accelerator.get_state_dict(self.model_wrapped)
        else:
            state = dict(self.alignment_model.named_parameters())
        return {name: value for name, value in state.items() if name in names}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Compare this process's rows with those of all.

        Raises: FloatingPointError when the loss is not finite: the step and the batch's groups.
        """
        group_ids = inputs["group_ids"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "group_ids"})
        image_embeds, text_embeds, scale = outputs
        loss = grouped_contrastive_loss(
            image_embeds,
            text_embeds,
            scale,
            group_ids,
            chunk_size=self.settings.loss_chunk,
            over_processes=True,
        )
        self._inverse_temperature = scale.detach()
        if not loss.isfinite():
            broken = ~(image_embeds.isfinite().all(dim=1) & text_embeds.isfinite().all(dim=1))
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step}. "
                f"{self._describe_broken(group_ids, broken)} or lower the learning rate "
                f"({self.length.lr})."
            )
        return (loss, outputs) if return_outputs else loss

    def _describe_broken(self, group_ids: Tensor, broken: Tensor) -> str:
        """Name the pairs whose rows, (B,) bool, are broken; all of the batch where none is."""
        assert isinstance(self.train_dataset, AlignmentDataset)
        shown = group_ids[broken] if broken.any() else group_ids
        names = [
            self.train_dataset.group_names[int(group_id)] for group_id in shown[:_GROUPS_SHOWN]
        ]
        listed = f"{names}{' …' if len(shown) > _GROUPS_SHOWN else ''}"
        if broken.any():
            return (
                f"{len(shown)} of {len(group_ids)} pairs have embeddings that are not finite, with "
                f"the group_ids {listed}. Look at what these are made from,"
            )
        return (
            f"The embeddings of this process's {len(group_ids)} pairs are finite, with the "
            f"group_ids {listed}. "
            "Look at the other processes' messages,"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log passes over the data, since the Trainer's own epoch is the whole run."""
        self.state.epoch = self.state.global_step / self.batches.steps_per_epoch
        logs["inverse_temperature"] = float(self._inverse_temperature)
        super().log(logs, start_time)


class ClampTemperature(TrainerCallback):
    """Keeps the logarithm of the inverse temperature in [0, ln 100] after each step."""

    def on_optimizer_step(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        with torch.no_grad():
            model.logit_scale.log_scale.clamp_(0.0, MAX_LOG_SCALE)


def find_learning_rates(
    model: AlignmentModel, arguments: AlignArguments, *, lr: float
) -> dict[str, float]:
    """Peak learning rate of each trained parameter, by name.

    Args:
        lr: of all but a wholly trained vision tower with a rate of its own.
    """
    rates = {name: lr for name, p in model.named_parameters() if p.requires_grad}
    if arguments.vision_training == "full":
        factors = scale_by_layer(model.vision_model, arguments.layer_decay)
        rate = arguments.vision_lr or lr
        rates |= {f"vision_model.{name}": rate * factor for name, factor in factors.items()}
    return rates


def _unwrap(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
