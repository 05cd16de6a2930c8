"""The training of both steps: options, transformers' Trainer, checkpoints, resuming.

Writes into the output folder: `run.json`, `metrics.jsonl`, `checkpoints/`, and `model/`, which
`LlavaForConditionalGeneration` and `AutoProcessor` load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from accelerate import PartialState
from annotated_types import Interval
from llava_batches import ConversationDataset, PadOnTheRight
from llava_conversations import Conversation, hash_conversations
from llava_model import find_tokens_of
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import LlavaProcessor, Trainer, TrainingArguments, set_seed

from modeling_llm2clip.configs.config_fields import Config
from modeling_llm2clip.data.atomic_files import (
    atomic_folder,
    clear_leftovers,
    require_new_folder,
)
from modeling_llm2clip.encoding.devices import find_device
from modeling_llm2clip.scheduling.graceful_stop import stop_on_signals
from modeling_llm2clip.scheduling.processes import join_processes, require_all_processes
from modeling_llm2clip.training.run_folder import (
    CHECKPOINTS,
    METRICS_FILE,
    add_results,
    discard_later_steps,
    find_last_checkpoint,
    require_same_run,
    write_run_record,
)
from modeling_llm2clip.training.trainer_mixins import (
    JsonLinesCallback,
    StopCallback,
    TrainedCheckpointMixin,
    choose_reports,
    computes_in_bfloat16,
    is_sharded,
    keep_to_one_gpu,
)

_WARMUP_RATIO = 0.03  # as the decay, arXiv:2310.03744, appendix
_CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(Config):
    """How long and how fast; the names are those of transformers' `TrainingArguments`."""

    num_train_epochs: Annotated[float, Interval(gt=0)] = 1.0
    """Passes over the data."""
    max_steps: Annotated[int, Interval(ge=1)] | None = None
    """Number of steps. Default: those of `num_train_epochs`."""
    global_batch_size: Annotated[int, Interval(ge=1)] = 256
    """Conversations per batch, over all processes together."""
    per_device_train_batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Conversations on a device at a time; gradients are accumulated. Default: its whole share."""
    learning_rate: Annotated[float, Interval(gt=0)] = 1e-3
    """Peak rate: up from 0 for 3 % of the steps, then down as a cosine."""
    max_length: Annotated[int, Interval(ge=2)] = 2048
    """Maximum number of tokens of a conversation, its image included."""
    max_grad_norm: Annotated[float, Interval(gt=0)] = 1.0
    """Maximum norm of the gradient."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto is bfloat16 on GPUs that support it. Weights stay float32."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to train; cpu even where there is a GPU."""
    num_workers: Annotated[int, Interval(ge=0)] = 0
    """Processes that decode images."""
    logging_steps: Annotated[int, Interval(ge=1)] = 10
    """Steps between lines of metrics."""
    save_steps: Annotated[int, Interval(ge=1)] = 500
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of everything random."""


class LlavaTrainer(TrainedCheckpointMixin, Trainer):
    """transformers' Trainer; stops at a loss or gradient that is not finite.

    Its checkpoints hold the trained weights alone.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *arguments: Any, **settings: Any
    ) -> Any:
        """Return the model's own loss: next token, over the labels that are not -100.

        Raises: FloatingPointError when it is not finite.
        """
        computed = super().compute_loss(model, inputs, *arguments, **settings)
        loss = computed[0] if isinstance(computed, tuple) else computed
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step}. Lower the learning "
                f"rate ({self.args.learning_rate})."
            )
        return computed

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        """Every conversation of an epoch in a new order, without those that fill no batch.

        Else an epoch has one step more, a small one, where a device takes its share in parts.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        share = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        batch_size = share * self.args.world_size
        return RandomSampler(dataset, num_samples=len(dataset) // batch_size * batch_size)

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        """Make no step more where all are made, as in a run resumed from its last checkpoint."""
        if self.state.global_step >= self.args.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **settings)


def train_llava(
    load_model: Callable[[], tuple[Any, LlavaProcessor]],
    conversations: Sequence[Conversation],
    output: Path,
    config: LlavaConfig,
    *,
    wording: str,
    record: dict[str, Any],
    skip_invalid: bool = False,
    resume: bool = False,
) -> Path:
    """Train the unfrozen parts of a model, and write all of it.

    Args:
        load_model: gives a LLaVA, or peft's wrapper around one, whose LoRA is merged at the end,
            with the processor; called after all that can be checked without it.
        record: further facts that must be the same when the run is resumed.
        skip_invalid: go on without conversations whose errors only their tokens show; how many
            is printed, and recorded in `run.json`.
        resume: continue from the last complete checkpoint in `output`.
    Returns: `output/model`.
    Raises:
        StageInterrupt: SIGINT or SIGTERM stopped the run after a checkpoint.
        ValueError: before the first step: an output folder of another run, a batch that cannot be
            shared, data of which no answer is left, text-only conversations under FSDP.
        FloatingPointError: at a loss, gradient or trained weight that is not finite.
        FileExistsError: the run has written its model already.
    """
    inputs = {
        **record,
        "num_conversations": len(conversations),
        "conversations": hash_conversations(conversations),
    }
    require_same_run(output, config, inputs, resume=resume)
    clear_leftovers(output / "model")
    require_new_folder(output / "model")
    settings = make_training_arguments(output, config, conversations)
    PartialState().wait_for_everyone()  # every process has checked the folder before it is filled
    set_seed(config.seed)
    model, processor = load_model()
    dataset = ConversationDataset(
        conversations, processor, find_tokens_of(model, processor), wording=wording,
        max_length=config.max_length, skip_invalid=skip_invalid,
        show_progress=settings.should_save,
    )  # fmt: skip
    _fit_to_data(settings, config, len(dataset))
    last = find_last_checkpoint(output) if resume else None
    if settings.should_save:
        write_run_record(output, config, inputs, model=model)
        discard_later_steps(output, last)
        _note_skipped(output, dataset)
        _note_truncated(output / METRICS_FILE, dataset)
    PartialState().wait_for_everyone()
    with stop_on_signals() as stop:
        trainer = LlavaTrainer(
            model=model,
            args=settings,
            train_dataset=dataset,
            data_collator=PadOnTheRight(processor.tokenizer.pad_token_id),
            callbacks=[JsonLinesCallback(output / METRICS_FILE), StopCallback(stop)],
        )
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.state.global_step < settings.max_steps:
        stop.raise_interrupt(
            f"Stopped after step {trainer.state.global_step}; the checkpoint is in {output}.",
            resume=True,
            is_main_process=settings.should_save,
        )
    _write_model(trainer, processor, output / "model")
    return output / "model"


def _note_skipped(output: Path, dataset: ConversationDataset) -> None:
    """Record and report the skipped conversations."""
    add_results(output, skipped_by_tokens=dataset.skipped)
    if dataset.skipped:
        print(f"Skipped, by what its tokens showed: {dict(dataset.skipped)}.")


def _note_truncated(metrics: Path, dataset: ConversationDataset) -> None:
    """Record how many conversations are truncated, before the first step."""
    if not metrics.is_file():
        line = {
            "step": 0,
            "num_conversations": len(dataset),
            "num_truncated": dataset.num_truncated,
        }
        metrics.write_text(json.dumps(line) + "\n", encoding="utf-8")


def make_training_arguments(
    output: Path, config: LlavaConfig, conversations: Sequence[Conversation]
) -> TrainingArguments:
    """Translate our settings; also joins the process group where there is one.

    Raises: ValueError when the processes cannot share a batch, or not such data.
    """
    device = join_processes(cpu=find_device(config.device).type == "cpu").device
    # Then a batch may hold no image at all, and the projector gets no gradient.
    has_text_only = any(c.image is None for c in conversations)
    if has_text_only and is_sharded():
        raise ValueError(
            "Conversations without an image cannot be trained on under FSDP, where every process "
            "must run every part. Leave them out, or use the configuration for DDP."
        )
    settings = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        bf16=computes_in_bfloat16(config.precision, device),
        use_cpu=device.type == "cpu",
        dataloader_drop_last=True,
        dataloader_num_workers=config.num_workers,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # such a loss stops the run
        save_steps=config.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        ddp_find_unused_parameters=has_text_only,
        report_to=choose_reports(None),
        seed=config.seed,
        **_CHECKPOINTING if config.gradient_checkpointing else {},
    )
    keep_to_one_gpu(settings)
    require_all_processes(settings.world_size)
    _fit_to_data(settings, config, len(conversations))
    return settings


def _fit_to_data(settings: TrainingArguments, config: LlavaConfig, num_items: int) -> None:
    """Set the steps and the batch of a device for a number of conversations.

    Raises: ValueError when the processes cannot share a batch, or there is none.
    """
    batches = config.num_train_epochs * (num_items // config.global_batch_size)
    settings.max_steps = config.max_steps or max(1, round(batches))
    # A warm-up begins at 0: of a run of one step it would leave nothing.
    warm_up = math.ceil(_WARMUP_RATIO * settings.max_steps)
    settings.warmup_steps = min(warm_up, settings.max_steps - 1)
    share, rest = divmod(config.global_batch_size, settings.world_size)
    at_once = config.per_device_train_batch_size or share
    if rest or not share or share % at_once:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} cannot be shared by "
            f"{settings.world_size} processes of {at_once} conversations at a time. Choose a "
            "multiple of both."
        )
    if num_items < config.global_batch_size:
        raise ValueError(
            f"{num_items} conversations are too few for a batch of {config.global_batch_size}. Set "
            "global_batch_size lower, or give more data."
        )
    settings.per_device_train_batch_size = at_once
    settings.gradient_accumulation_steps = share // at_once


def _write_model(trainer: LlavaTrainer, processor: LlavaProcessor, folder: Path) -> None:
    state = None
    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.args.should_save:
        return
    model: Any = trainer.model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished, state_dict=state)
        processor.save_pretrained(unfinished)
