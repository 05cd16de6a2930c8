"""What both steps share: settings, transformers' Trainer, checkpoints of what is trained, resuming.

Writes into the output folder: `run.json`, `metrics.jsonl`, `checkpoints/`, and `model/`, which
`LlavaForConditionalGeneration` and `AutoProcessor` load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from llava_batches import ConversationDataset, PadOnTheRight
from llava_conversations import Conversation, hash_conversations
from llava_model import find_tokens_of
from modeling_llm2clip.training.callbacks import (
    JsonLinesCallback,
    ShareSignal,
    StopOnSignal,
    choose_reports,
)
from modeling_llm2clip.training.checkpoints import (
    CHECKPOINTS,
    find_last_checkpoint,
    forget_what_came_after,
)
from modeling_llm2clip.training.run_record import (
    METRICS_FILE,
    RUN_FILE,
    require_fresh_or_same_run,
    write_run_record,
)
from modeling_llm2clip.training.settings import list_errors
from modeling_llm2clip.training.training_precision import computes_in_bfloat16
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import LlavaProcessor, Trainer, TrainingArguments, set_seed

from modeling_llm2clip.data.atomic_files import write_atomically
from modeling_llm2clip.encoding.devices import find_device
from modeling_llm2clip.model_folders.atomic_folder import (
    atomic_folder,
    clear_leftovers,
    require_new_folder,
)
from modeling_llm2clip.training.distributed import (
    is_sharded,
    join_processes,
    keep_to_one_gpu,
    require_all_processes,
)
from modeling_llm2clip.training.graceful_stop import stop_on_signals
from modeling_llm2clip.training.trainer_mixins import FiniteGradients, TrainedCheckpoints

_WARM_UP_SHARE = 0.03  # as the decay, arXiv:2310.03744, appendix
_CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@dataclass(frozen=True)
class LlavaArguments:
    """How long and how fast.

    Attributes:
        epochs, steps: how long; `steps`, where given, counts.
        batch_size: conversations in a batch, over all processes together.
        device_batch_size: how many a device takes at a time; the rest of its share follows before
            the step is made.
        lr: peak rate; up from 0 for 3 % of the steps, down as a cosine. A single step has all.
        max_length: most tokens of a conversation, its image included.
        precision: `"auto"` computes in bfloat16 on GPUs that can; weights stay float32.
        device: `"auto"`, or `"cpu"` even where there is a GPU.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 256
    device_batch_size: int | None = None
    lr: float = 1e-3
    max_length: int = 2048
    clip_norm: float = 1.0
    gradient_checkpointing: bool = False
    precision: str = "auto"
    device: str = "auto"
    num_workers: int = 0
    log_every: int = 10
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        errors = list_errors(
            self,
            least={
                "steps": 1, "batch_size": 1, "device_batch_size": 1, "max_length": 2,
                "num_workers": 0, "log_every": 1, "save_every": 1,
            },
            positive=("epochs", "lr", "clip_norm"),
            choices={
                "precision": ("auto", "float32", "bfloat16"),
                "device": ("auto", "cpu"),
            },
        )  # fmt: skip
        if errors:
            raise ValueError("; ".join(errors) + ".")


class LlavaTrainer(FiniteGradients, TrainedCheckpoints, Trainer):
    """transformers' Trainer; stops at a loss or gradient that is not finite.

    Its checkpoints hold only what is trained.
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
    arguments: LlavaArguments,
    *,
    wording: str,
    record: dict[str, Any],
    drop_invalid: bool = False,
    resume: bool = False,
) -> int:
    """Train the thawed parts of a model, and write the whole of it.

    Args:
        load_model: gives a LLaVA, or peft's wrapper around one, whose LoRA is merged at the end,
            with the processor; called after all that can be checked without it.
        record: what else makes this run the same one when it is resumed.
        drop_invalid: go on without conversations whose errors only their tokens show; how many
            is printed, and recorded in `run.json`.
        resume: continue from the last whole checkpoint in `output`.
    Returns: exit code: 0, or 130 and 143 after SIGINT and SIGTERM.
    Raises:
        ValueError: before the first step: an output folder of another run, a batch that cannot be
            shared, data of which no answer is left, text-only conversations under FSDP.
        FloatingPointError: at a loss, gradient or trained weight that is not finite.
        FileExistsError: the run has written its model already.
    """
    record = {
        **asdict(arguments), **record,
        "num_conversations": len(conversations),
        "conversations": hash_conversations(conversations),
    }  # fmt: skip
    require_fresh_or_same_run(output, record, resume=resume)
    clear_leftovers(output / "model")
    require_new_folder(output / "model")
    settings = make_training_arguments(output, arguments, conversations)
    PartialState().wait_for_everyone()  # everybody has looked at the folder before it is filled
    set_seed(arguments.seed)
    model, processor = load_model()
    dataset = ConversationDataset(
        conversations, processor, find_tokens_of(model, processor), wording=wording,
        max_length=arguments.max_length, drop_invalid=drop_invalid,
        show_progress=settings.should_save,
    )  # fmt: skip
    _fit_to_data(settings, arguments, len(dataset))
    last = find_last_checkpoint(output) if resume else None
    if settings.should_save:
        write_run_record(output, arguments=record, seed=arguments.seed, model=model)
        forget_what_came_after(output, last)
        _note_left_out(output / RUN_FILE, dataset)
        _note_cut(output / METRICS_FILE, dataset)
    PartialState().wait_for_everyone()
    with stop_on_signals() as stop:
        trainer = LlavaTrainer(
            model=model,
            args=settings,
            train_dataset=dataset,
            data_collator=PadOnTheRight(processor.tokenizer.pad_token_id),
            callbacks=[
                JsonLinesCallback(output / METRICS_FILE), ShareSignal(stop), StopOnSignal(stop),
            ],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.state.global_step < settings.max_steps:
        return stop.exit_code
    _write_model(trainer, processor, output / "model")
    return 0


def _note_left_out(run_file: Path, dataset: ConversationDataset) -> None:
    """Record and tell what is left out; no argument, by which a resumed run would be known."""
    record = json.loads(run_file.read_text(encoding="utf-8"))
    record["left_out_by_tokens"] = dataset.left_out
    write_atomically(run_file, (json.dumps(record, indent=2) + "\n").encode())
    if dataset.left_out:
        print(f"Left out, by what its tokens showed: {dataset.left_out}.")


def _note_cut(metrics: Path, dataset: ConversationDataset) -> None:
    """Record how many conversations are cut, before the first step."""
    if not metrics.is_file():
        line = {"step": 0, "num_conversations": len(dataset), "num_cut": dataset.num_cut}
        metrics.write_text(json.dumps(line) + "\n", encoding="utf-8")


def make_training_arguments(
    output: Path, arguments: LlavaArguments, conversations: Sequence[Conversation]
) -> TrainingArguments:
    """Translate our settings; also joins the process group where there is one.

    Raises: ValueError when the processes cannot share a batch, or not such data.
    """
    device = join_processes(cpu=find_device(arguments.device).type == "cpu").device
    # Then a batch may hold no image at all, and the projector gets no gradient.
    has_text_only = any(c.image is None for c in conversations)
    if has_text_only and is_sharded():
        raise ValueError(
            "Conversations without an image cannot be trained on under FSDP, where every process "
            "must run every part. Leave them out, or use the configuration for DDP."
        )
    settings = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        learning_rate=arguments.lr,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=arguments.clip_norm,
        bf16=computes_in_bfloat16(arguments.precision, on_gpu=device.type == "cuda"),
        use_cpu=device.type == "cpu",
        dataloader_drop_last=True,
        dataloader_num_workers=arguments.num_workers,
        logging_steps=arguments.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # such a loss stops the run
        save_steps=arguments.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        ddp_find_unused_parameters=has_text_only,
        report_to=choose_reports(),
        seed=arguments.seed,
        **_CHECKPOINTING if arguments.gradient_checkpointing else {},
    )
    keep_to_one_gpu(settings)
    require_all_processes(settings.world_size)
    _fit_to_data(settings, arguments, len(conversations))
    return settings


def _fit_to_data(settings: TrainingArguments, arguments: LlavaArguments, num_items: int) -> None:
    """Set the steps, and what a device takes at a time, for so many conversations.

    Raises: ValueError when the processes cannot share a batch, or there is none.
    """
    batches = arguments.epochs * (num_items // arguments.batch_size)
    settings.max_steps = arguments.steps or max(1, round(batches))
    # A warm-up begins at 0: of a run of one step it would leave nothing.
    warm_up = math.ceil(_WARM_UP_SHARE * settings.max_steps)
    settings.warmup_steps = min(warm_up, settings.max_steps - 1)
    share, rest = divmod(arguments.batch_size, settings.world_size)
    at_once = arguments.device_batch_size or share
    if rest or not share or share % at_once:
        raise ValueError(
            f"batch_size={arguments.batch_size} cannot be shared by {settings.world_size} "
            f"processes of {at_once} conversations at a time. Choose a multiple of both."
        )
    if num_items < arguments.batch_size:
        raise ValueError(
            f"{num_items} conversations are too few for a batch of {arguments.batch_size}. Set "
            "batch_size lower, or give more data."
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
