"""Stage 1: teaches the LLM to tell captions apart, with a LoRA (paper, section 3.1).

Captions of one image are pulled together, captions of different images are pushed apart, by
sentence-transformers' trainer and losses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import DatasetDict
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn

from ...data.atomic_files import hash_file, write_atomically
from ...data.caption_groups import (
    CaptionGroup,
    TextPair,
    sample_pairs,
)
from ...data.splits import exclude_texts, hold_out_groups
from ...evaluation.tasks.caption_retrieval_accuracy import measure_caption_retrieval
from ...model_folders.fingerprint import fingerprint_text
from ...model_folders.lora_base import LORA_WEIGHTS, require_base_weights
from ...modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ...processing_llm2clip import LLM2CLIPProcessor
from ..alignment.optimization import count_warmup_steps, recompute_activations
from ..callbacks import (
    JsonLinesCallback,
    LogLastStep,
    ShareSignal,
    StopOnSignal,
    choose_reports,
    show_readable_progress,
)
from ..checkpoints import (
    CHECKPOINTS,
    find_last_checkpoint,
    forget_what_came_after,
    require_finite,
)
from ..distributed import join_processes, refuse_fsdp_for_lora, training_arguments_on
from ..extraction.text_lengths import measure_texts
from ..graceful_stop import stop_on_signals
from ..run_record import (
    METRICS_FILE,
    require_fresh_or_resumed,
    require_fresh_or_same_run,
    write_run_record,
)
from ..settings import list_errors
from ..trainer_mixins import FiniteGradients, MarkedCheckpoints, ResumedMetricsMixin
from ..training_precision import computes_in_bfloat16
from .hard_batches import encode_groups_together, find_nearest_groups, read_alike, write_alike
from .lora_encoder import (
    CaptionEncoder,
    LoraArguments,
    configure_lora,
    require_same_meaning,
    wrap_encoder,
    write_lora,
)
from .pair_sampling import (
    GROUP_COLUMN,
    NoDuplicateGroupsBatchSampler,
    PairCollator,
    WeightedBatchSampler,
    count_steps,
    make_pair_table,
    require_weight,
)

ADAPTER_FOLDER = "adapter"
RESULT_FILE = "caption_retrieval.json"
ALIKE_FILE = "alike.safetensors"
_MOST_HELD_OUT = 1000
_FEW_STEPS = 200  # each of which is logged
_ALIKE_TO_DRAW_FROM = 2  # times as many as are drawn: the same images do not always meet
_DIRECTIONS = {
    "one-way": (("query_to_doc",), "joint"),
    "both-ways": (("query_to_doc", "doc_to_query"), "per_direction"),
    "all-captions": (("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), "joint"),
}
NEGATIVES = tuple(_DIRECTIONS)


@dataclass(frozen=True)
class TuneArguments:
    """Settings of the caption tuning.

    Attributes:
        epochs, steps: how long; `steps`, where given, counts.
        pairings: how often the captions of each image are paired anew in an epoch.
        batch_size: pairs in a batch of one process; all processes' pairs are negatives.
        mini_batch_size: pairs run at a time, by cached gradients (arXiv:2101.06983): any batch
            fits the memory, for a third more time. None runs the batch at once.
        lr, scale: upstream's 2e-4 and 50.
        warmup_steps: below 1 a share of the run, else a number of steps, as in transformers.
        negatives: which other texts of a batch a text is compared with: "one-way", a first
            caption with all second ones, as upstream does; "both-ways", as CLIP does;
            "all-captions", with every other text.
        num_alike: hard batches: each image comes with this many of those whose captions the
            model, as it starts, holds most alike (hard negatives within the batch). 0 draws at
            random, which is right until a model is tuned somewhat.
        held_out: images kept apart to measure the caption retrieval accuracy on; None for a
            fifth of them, at most 1,000.
        eval_every: steps between two measurements; 0 for only before and after.
        gradient_checkpointing: less memory for a third more time.
        precision: "auto" computes in bfloat16 on GPUs that can; weights stay float32.
        adapter_dtype: of the written adapter.
    """

    epochs: float = 1.0
    steps: int | None = None
    pairings: int = 1
    batch_size: int = 64
    mini_batch_size: int | None = None
    lr: float = 2e-4
    warmup_steps: float = 0.1
    scale: float = 50.0
    negatives: str = "both-ways"
    num_alike: int = 0
    held_out: int | None = None
    eval_every: int = 0
    gradient_checkpointing: bool = False
    precision: str = "auto"
    adapter_dtype: str = "float32"
    save_every: int = 100
    seed: int = 0
    lora: LoraArguments = field(default_factory=LoraArguments)

    def __post_init__(self) -> None:
        errors = list_errors(
            self,
            least={
                "batch_size": 2, "pairings": 1, "steps": 1, "mini_batch_size": 1, "held_out": 2,
                "eval_every": 0, "save_every": 1, "warmup_steps": 0, "num_alike": 0,
            },
            positive=("epochs", "lr", "scale"),
            choices={
                "negatives": NEGATIVES,
                "precision": ("auto", "float32", "bfloat16"),
                "adapter_dtype": ("float32", "float16", "bfloat16"),
            },
        )  # fmt: skip
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            errors.append(
                f"warmup_steps={self.warmup_steps}, wanted a share below 1 or whole steps"
            )
        if errors:
            raise ValueError("; ".join(errors) + ".")


@dataclass(frozen=True)
class TuneResult:
    """What came of it.

    Attributes:
        adapter: folder of the LoRA; None when a signal stopped the run before its end.
        cra_before, cra_after: caption retrieval accuracy on the held-out images.
        counts: as in `caption_retrieval.json`: images trained on and held out, what was left out
            for these, different texts of all, and how many of them are cut at the longest text.
        exit_code: 0, or 130 and 143 after SIGINT and SIGTERM.
    """

    adapter: Path | None
    cra_before: float
    cra_after: float | None
    exit_code: int
    counts: dict[str, int] = field(default_factory=dict)


def finetune_llm(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    groups: Sequence[CaptionGroup],
    output: Path,
    arguments: TuneArguments,
    *,
    other_pairs: Sequence[tuple[list[TextPair], float]] = (),
    start: Path | None = None,
    resume: bool = False,
    num_skipped: int = 0,
) -> TuneResult:
    """Train a LoRA on the model's LLM and write it to `output/adapter`.

    The same as `plan_tuning`, then `run_tuning`.

    Args:
        model: its LLM gets LoRA layers in place; nothing else changes.
        groups: captions by image, from `group_captions`.
        other_pairs: other text pairs, and how many of their batches there are for one of the
            captions'.
        start: folder of an adapter of the same shape, of this very LLM, to begin from, instead of
            from nothing.
        resume: continue from the last checkpoint in `output`.
        num_skipped: images that `skip_single_captions` left out of the groups, for the record.
    Raises: ValueError for data that cannot fill a batch, a warm-up that is as long as the run, or
        an output folder of another run
        (settings, data, or the LLM where it was loaded from a folder or the Hub), before anything
        is computed; FloatingPointError at a loss, a gradient or a weight that
        is not finite, before anything is kept of it.
    """
    plan = plan_tuning(
        model.name_or_path or "",
        groups,
        output,
        arguments,
        other_pairs=other_pairs,
        start=start,
        resume=resume,
        num_skipped=num_skipped,
    )
    return run_tuning(model, processor, plan)


@dataclass(frozen=True)
class _Data:
    """Tables to train on, how often each is drawn from, and the images held out."""

    tables: DatasetDict
    weights: list[float]
    to_train: list[CaptionGroup]
    held_out: list[CaptionGroup]
    counts: dict[str, int]


@dataclass(frozen=True)
class TuningPlan:
    """A run that nothing is wrong with as far as can be told without its LLM."""

    output: Path
    arguments: TuneArguments
    start: Path | None
    resume: bool
    record: dict[str, Any]
    data: _Data


def plan_tuning(
    model_name: str,
    groups: Sequence[CaptionGroup],
    output: Path,
    arguments: TuneArguments,
    *,
    other_pairs: Sequence[tuple[list[TextPair], float]] = (),
    start: Path | None = None,
    resume: bool = False,
    num_skipped: int = 0,
) -> TuningPlan:
    """Check and prepare everything that needs no LLM; arguments and errors as `finetune_llm`.

    Args:
        model_name: what the model is loaded from: folder or Hub id; "" for one built in memory.
    """
    refuse_fsdp_for_lora()
    join_processes()
    for number, (_, weight) in enumerate(other_pairs, start=1):
        require_weight(weight, f"Number {number} of other_pairs")
    require_fresh_or_resumed(output, resume=resume)
    data = _prepare_data(groups, other_pairs, arguments)
    num_steps = _count_steps(data, arguments)[0]
    warmup_steps = count_warmup_steps(arguments.warmup_steps, num_steps)
    if start is not None:
        require_same_meaning(start, configure_lora(arguments.lora))
    record = {
        **asdict(arguments),
        **_identify(model_name, groups, other_pairs, start),
        "schedule": {"steps": num_steps, "warmup_steps": warmup_steps},
        "num_single_captions_skipped": num_skipped,
    }
    require_fresh_or_same_run(output, record, resume=resume)
    if start is not None and model_name:
        require_base_weights(start / LORA_WEIGHTS, record["fingerprint"]["weights"])
    return TuningPlan(output, arguments, start, resume, record, data)


def run_tuning(
    model: LLM2CLIPModel | LLM2CLIPTextModel, processor: LLM2CLIPProcessor, plan: TuningPlan
) -> TuneResult:
    """Do what was planned; see `finetune_llm`."""
    output, arguments, start, data = plan.output, plan.arguments, plan.start, plan.data
    counts = {**data.counts, **_count_truncated(processor, data)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        encoder = CaptionEncoder(model, processor, arguments.lora)
    if start is not None:
        encoder.load_adapter(start)
    if arguments.gradient_checkpointing:
        recompute_activations(model.text_model)
    last = find_last_checkpoint(output) if plan.resume else None
    state = PartialState()
    state.wait_for_everyone()  # everybody has looked at the folder before it is filled
    if state.is_main_process:
        if last is None:
            write_run_record(output, arguments=plan.record, seed=arguments.seed, model=model)
        forget_what_came_after(output, last)
    with stop_on_signals() as stop:
        before = _measure_before(encoder, data.held_out, output, resumed=last is not None)
        alike = _find_alike(encoder, data.to_train, output, arguments, resumed=last is not None)
        trainer = _make_trainer(encoder, data, alike, output, arguments)
        show_readable_progress(trainer)
        trainer.add_callback(ShareSignal(stop))
        trainer.add_callback(StopOnSignal(stop))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.state.global_step < trainer.args.max_steps:
        return TuneResult(None, before, None, stop.exit_code, counts)
    require_finite(encoder.trained_weights, step=trainer.state.global_step)
    after = measure_caption_retrieval(encoder.encode, data.held_out)
    if state.is_main_process:
        write_lora(
            encoder,
            output / ADAPTER_FOLDER,
            dtype=getattr(torch, arguments.adapter_dtype),
            base_weights=(plan.record["fingerprint"] or {}).get("weights"),
        )
        result = {"cra_before": before, "cra_after": after, **counts}
        write_atomically(output / RESULT_FILE, (json.dumps(result, indent=2) + "\n").encode())
    state.wait_for_everyone()
    return TuneResult(output / ADAPTER_FOLDER, before, after, 0, counts)


def _count_truncated(processor: LLM2CLIPProcessor, data: _Data) -> dict[str, int]:
    """Count all different texts, trained on and measured on, and those that lose their ends."""
    texts = {text for group in (*data.to_train, *data.held_out) for text in group.captions}
    for table in data.tables.values():
        for name in set(table.column_names) - {GROUP_COLUMN}:
            texts.update(table[name][:])
    return {"num_texts": len(texts), "num_truncated": measure_texts(processor, [*texts])[1]}


def _prepare_data(
    groups: Sequence[CaptionGroup],
    other_pairs: Sequence[tuple[list[TextPair], float]],
    arguments: TuneArguments,
) -> _Data:
    num_held_out = arguments.held_out
    if num_held_out is None:
        num_held_out = min(_MOST_HELD_OUT, max(2, len(groups) // 5))
    to_train, held_out, num_lost = hold_out_groups(groups, num_held_out, seed=arguments.seed)
    pairs = sample_pairs(to_train, seed=arguments.seed, num_pairings=arguments.pairings)
    tables = DatasetDict(captions=make_pair_table(pairs))
    num_pairs_lost = 0
    for number, (others, _) in enumerate(other_pairs, start=1):
        kept, lost = exclude_texts(others, held_out)
        if not kept:
            raise ValueError(
                f"{lost} of the {len(others)} pairs of number {number} of other_pairs hold a "
                f"caption of the {len(held_out)} held-out images, which leaves none. Hold out "
                "fewer images (--held-out), or leave these pairs out (--other-pairs)."
            )
        num_pairs_lost += lost
        tables[f"pairs_{number}"] = make_pair_table(kept)
    for table in tables.values():  # what cannot fill a batch shows now
        next(iter(NoDuplicateGroupsBatchSampler(table, arguments.batch_size, drop_last=True)))
    counts = {
        "num_held_out": len(held_out),
        "num_trained": len(to_train),
        "num_captions_lost": num_lost,
        "num_other_pairs_lost": num_pairs_lost,
    }
    weights = [1.0, *(weight for _, weight in other_pairs)]
    return _Data(tables, weights, to_train, held_out, counts)


def _identify(
    model_name: str,
    groups: Sequence[CaptionGroup],
    other_pairs: Sequence[tuple[list[TextPair], float]],
    start: Path | None,
) -> dict[str, Any]:
    """What makes another run of the same settings: model, data, number of processes."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(json.dumps([group.group_id, group.captions]).encode())
    for pairs, weight in other_pairs:
        digest.update(json.dumps([weight, [asdict(pair) for pair in pairs]]).encode())
    return {
        "model": model_name,
        "fingerprint": fingerprint_text(model_name) if model_name else None,
        "start": None if start is None else hash_file(start / LORA_WEIGHTS),
        "data": digest.hexdigest(),
        "num_processes": PartialState().num_processes,
    }


class _CaptionRetrieval(BaseEvaluator):  # type: ignore[misc]
    """The accuracy as sentence-transformers' trainer asks for it between steps."""

    def __init__(self, encoder: CaptionEncoder, groups: Sequence[CaptionGroup]) -> None:
        super().__init__()
        self.encoder, self.groups = encoder, groups
        self.primary_metric = "cra"

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"cra": measure_caption_retrieval(self.encoder.encode, self.groups)}


class _Trainer(FiniteGradients, ResumedMetricsMixin, MarkedCheckpoints, SentenceTransformerTrainer):  # type: ignore[misc]
    """Saves and loads an adapter where sentence-transformers has a whole model; stops at NaN.

    To it the whole run is one epoch; see `WeightedBatchSampler`.
    """

    encoder: CaptionEncoder
    steps_per_epoch: int

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        super().log(logs, *args, **kwargs)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Collect nothing for a card: this model lives only while it is trained."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite(self.encoder.trained_weights, step=self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        self.encoder.load_adapter(Path(checkpoint_path))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step}. Lower the learning "
                f"rate ({self.args.learning_rate}), or train in float32."
            )
        return loss


def _count_steps(data: _Data, arguments: TuneArguments) -> tuple[int, int]:
    """Steps of the whole run, and of an epoch."""
    lengths = [len(table) for table in data.tables.values()]
    window_size = arguments.batch_size * PartialState().num_processes
    steps_per_epoch = sum(count_steps(lengths, data.weights, window_size))
    return arguments.steps or max(1, round(arguments.epochs * steps_per_epoch)), steps_per_epoch


def _make_trainer(
    encoder: CaptionEncoder,
    data: _Data,
    alike: dict[str, list[str]],
    output: Path,
    arguments: TuneArguments,
) -> _Trainer:
    wrapped, device = wrap_encoder(encoder), encoder.llm2clip.device
    num_steps, steps_per_epoch = _count_steps(data, arguments)
    training_arguments = training_arguments_on(
        device,
        SentenceTransformerTrainingArguments,
        output_dir=str(output / CHECKPOINTS),
        max_steps=num_steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        warmup_steps=count_warmup_steps(arguments.warmup_steps, num_steps),
        lr_scheduler_type="cosine",
        bf16=computes_in_bfloat16(arguments.precision, on_gpu=device.type == "cuda"),
        batch_sampler=partial(
            NoDuplicateGroupsBatchSampler, alike=alike, num_alike=arguments.num_alike
        ),
        multi_dataset_batch_sampler=partial(
            WeightedBatchSampler, weights=data.weights, num_steps=num_steps
        ),
        eval_strategy="steps" if arguments.eval_every else "no",
        eval_steps=arguments.eval_every or None,
        save_strategy="steps",
        save_steps=arguments.save_every,
        save_total_limit=2,
        logging_steps=1 if num_steps < _FEW_STEPS else 10,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        report_to=choose_reports(),
        seed=arguments.seed,
    )
    trainer = _Trainer(
        model=wrapped,
        args=training_arguments,
        train_dataset=data.tables,
        loss=_make_loss(wrapped, arguments),
        evaluator=_CaptionRetrieval(encoder, data.held_out) if arguments.eval_every else None,
        data_collator=PairCollator(wrapped.preprocess),
        callbacks=[LogLastStep(), JsonLinesCallback(output / METRICS_FILE)],
    )
    trainer.encoder, trainer.steps_per_epoch = encoder, steps_per_epoch
    return trainer


def _make_loss(wrapped: Any, arguments: TuneArguments) -> nn.Module:
    directions, partition_mode = _DIRECTIONS[arguments.negatives]
    settings: dict[str, Any] = {
        "scale": arguments.scale,
        "directions": directions,
        "partition_mode": partition_mode,
        "gather_across_devices": PartialState().num_processes > 1,
    }
    if arguments.mini_batch_size is None:
        return MultipleNegativesRankingLoss(wrapped, **settings)  # type: ignore[no-any-return]
    return CachedMultipleNegativesRankingLoss(  # type: ignore[no-any-return]
        wrapped, mini_batch_size=arguments.mini_batch_size, **settings
    )


def _measure_before(
    encoder: CaptionEncoder, held_out: Sequence[CaptionGroup], output: Path, *, resumed: bool
) -> float:
    """The accuracy of the untuned LLM; a resumed run takes what it measured the first time."""
    file = output / RESULT_FILE
    if resumed:
        return float(json.loads(file.read_text(encoding="utf-8"))["cra_before"])
    before = measure_caption_retrieval(encoder.encode, held_out)
    if PartialState().is_main_process:
        write_atomically(file, (json.dumps({"cra_before": before}) + "\n").encode())
    return before


def _find_alike(
    encoder: CaptionEncoder,
    groups: Sequence[CaptionGroup],
    output: Path,
    arguments: TuneArguments,
    *,
    resumed: bool,
) -> dict[str, list[str]]:
    """The most alike images of each, once a run: all processes encode, one compares."""
    if not arguments.num_alike:
        return {}
    file, state = output / ALIKE_FILE, PartialState()
    if not resumed:
        embeddings = encode_groups_together(encoder.encode, groups)
        if state.is_main_process:
            count = min(_ALIKE_TO_DRAW_FROM * arguments.num_alike, len(groups) - 1)
            write_alike(find_nearest_groups(embeddings, count).cpu(), file)
    state.wait_for_everyone()
    return read_alike(file, groups)
