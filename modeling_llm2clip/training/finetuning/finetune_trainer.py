"""sentence-transformers' trainer with our checkpoints, and its loss and evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn
from transformers import TrainerCallback

from ...configs.finetune_config import FinetuneConfig
from ...data.captions.caption_groups import CaptionGroup
from ...evaluation.tasks.retrieval import measure_caption_retrieval
from ..distributed import training_arguments_on
from ..run_folder import CHECKPOINTS, METRICS_FILE, require_finite
from ..trainer_mixins import (
    CheckpointMarkMixin,
    FiniteGradientMixin,
    JsonLinesCallback,
    LogLastStepCallback,
    ResumedMetricsMixin,
    choose_reports,
    computes_in_bfloat16,
    count_warmup_steps,
)
from .finetune_data import FinetuneData
from .lora_encoder import CaptionEncoder
from .nearest_groups import Array
from .pair_sampling import (
    NoDuplicateGroupsBatchSampler,
    PairCollator,
    WeightedBatchSampler,
    count_steps,
)

_SHORT_RUN = 200  # steps below which every one is logged
# Value of `negatives` → what sentence-transformers' loss compares, and how it sums up.
_DIRECTIONS = {
    "query-to-doc": (("query_to_doc",), "joint"),
    "symmetric": (("query_to_doc", "doc_to_query"), "per_direction"),
    "all": (("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), "joint"),
}


class FinetuneTrainer(
    FiniteGradientMixin,
    ResumedMetricsMixin,
    CheckpointMarkMixin,
    SentenceTransformerTrainer,  # type: ignore[misc]
):
    """Saves and loads a LoRA where sentence-transformers has a whole model; stops at NaN.

    To this trainer the whole run is one epoch; see `WeightedBatchSampler`.
    """

    encoder: CaptionEncoder
    steps_per_epoch: int

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics, with passes over the data as the epoch."""
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        super().log(logs, *args, **kwargs)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Collect nothing for a model card, since this LoRA is not published as it is."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite(self.encoder.trained_weights, step=self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        self.encoder.load_lora(Path(checkpoint_path))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a step."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step}. Lower the learning "
                f"rate ({self.args.learning_rate}), or train in float32."
            )
        return loss


class _CaptionRetrieval(BaseEvaluator):  # type: ignore[misc]
    """The caption retrieval accuracy, as sentence-transformers' trainer asks for it."""

    def __init__(self, encoder: CaptionEncoder, groups: Sequence[CaptionGroup]) -> None:
        super().__init__()
        self.encoder, self.groups = encoder, groups
        self.primary_metric = "cra"

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"cra": measure_caption_retrieval(self.encoder.encode, self.groups)}


def count_run_steps(data: FinetuneData, config: FinetuneConfig) -> tuple[int, int]:
    """Count the steps of the whole run, and of an epoch."""
    lengths = [len(table) for table in data.tables.values()]
    window_size = config.per_device_train_batch_size * PartialState().num_processes
    steps_per_epoch = sum(count_steps(lengths, data.weights, window_size))
    num_steps = config.max_steps or max(1, round(config.num_train_epochs * steps_per_epoch))
    return num_steps, steps_per_epoch


def make_trainer(
    encoder: CaptionEncoder,
    data: FinetuneData,
    nearest: Array | None,
    output: Path,
    config: FinetuneConfig,
    callbacks: Sequence[TrainerCallback],
) -> FinetuneTrainer:
    """Make the trainer of a run."""
    device = encoder.llm2clip.device
    wrapped = SentenceTransformer(modules=[encoder], device=str(device))
    num_steps, steps_per_epoch = count_run_steps(data, config)
    arguments = training_arguments_on(
        device,
        SentenceTransformerTrainingArguments,
        output_dir=str(output / CHECKPOINTS),
        max_steps=num_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=count_warmup_steps(config.warmup_steps, num_steps),
        lr_scheduler_type="cosine",
        bf16=computes_in_bfloat16(config.precision, on_gpu=device.type == "cuda"),
        batch_sampler=partial(
            NoDuplicateGroupsBatchSampler,
            nearest=nearest,
            num_hard_negatives=config.num_hard_negatives,
        ),
        multi_dataset_batch_sampler=partial(
            WeightedBatchSampler, weights=data.weights, num_steps=num_steps
        ),
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_steps=config.logging_steps or (1 if num_steps < _SHORT_RUN else 10),
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        report_to=choose_reports(config.report_to),
        seed=config.seed,
    )
    trainer = FinetuneTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=data.tables,
        loss=_make_loss(wrapped, config),
        evaluator=_CaptionRetrieval(encoder, data.held_out) if config.eval_steps else None,
        data_collator=PairCollator(wrapped.preprocess),
        callbacks=[LogLastStepCallback(), JsonLinesCallback(output / METRICS_FILE), *callbacks],
    )
    trainer.encoder, trainer.steps_per_epoch = encoder, steps_per_epoch
    return trainer


def _make_loss(wrapped: Any, config: FinetuneConfig) -> nn.Module:
    directions, partition_mode = _DIRECTIONS[config.negatives]
    options: dict[str, Any] = {
        "scale": config.scale,
        "directions": directions,
        "partition_mode": partition_mode,
        "gather_across_devices": PartialState().num_processes > 1,
    }
    if config.mini_batch_size is None:
        return MultipleNegativesRankingLoss(wrapped, **options)  # type: ignore[no-any-return]
    return CachedMultipleNegativesRankingLoss(  # type: ignore[no-any-return]
        wrapped, mini_batch_size=config.mini_batch_size, **options
    )
