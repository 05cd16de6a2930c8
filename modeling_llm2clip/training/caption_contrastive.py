"""Stage 1: teaches the LLM to tell captions apart, with a LoRA (paper, section 3.1).

Captions of one picture are pulled together, captions of different pictures are pushed apart, by
sentence-transformers' trainer and losses.
"""

from __future__ import annotations

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
from transformers.trainer_utils import get_last_checkpoint

from ..data.caption_groups import CaptionGroup, TextPair, draw_pairs, hold_out_groups
from ..evaluation.caption_retrieval import measure_caption_retrieval
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .callbacks import JsonLinesCallback, StopOnSignal, choose_reports
from .caption_encoder import CaptionEncoder, LoraArguments, wrap_encoder, write_adapter
from .pair_batches import (
    KeyedBatchSampler,
    PairCollator,
    WeightedBatchSampler,
    make_pair_table,
)
from .run_record import METRICS_FILE, require_fresh_or_same_run, write_run_record
from .stopping import stop_on_signals

ADAPTER_FOLDER = "adapter"
RESULT_FILE = "caption_retrieval.json"
_MOST_HELD_OUT = 1000
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
        pairings: how often the captions of each picture are paired anew in an epoch.
        batch_size: pairs in a batch of one process; all processes' pairs are negatives.
        mini_batch_size: pairs run at a time, by cached gradients (arXiv:2101.06983): any batch
            fits the memory, for a third more time. None runs the batch at once.
        lr, warmup_steps, scale: upstream's 2e-4, 300 and 50.
        negatives: which other texts of a batch a text is compared with: "one-way", a first
            caption with all second ones, as upstream does; "both-ways", as CLIP does;
            "all-captions", with every other text.
        held_out: pictures kept apart to measure the caption retrieval accuracy on; None for a
            fifth of them, at most 1,000.
        eval_every: steps between two measurements; 0 for only before and after.
        gradient_checkpointing: less memory for a third more time.
        precision: "auto" takes bfloat16 where the machine computes in it.
        adapter_dtype: of the written adapter.
    """

    epochs: float = 1.0
    steps: int = -1
    pairings: int = 1
    batch_size: int = 64
    mini_batch_size: int | None = None
    lr: float = 2e-4
    warmup_steps: int = 300
    scale: float = 50.0
    negatives: str = "both-ways"
    held_out: int | None = None
    eval_every: int = 0
    gradient_checkpointing: bool = False
    precision: str = "auto"
    adapter_dtype: str = "float32"
    save_every: int = 100
    seed: int = 0
    lora: LoraArguments = field(default_factory=LoraArguments)

    def __post_init__(self) -> None:
        if self.batch_size < 2 or not self.lr > 0 or (self.steps < 1 and self.epochs <= 0):
            raise ValueError(
                f"batch_size={self.batch_size} must be at least 2, lr={self.lr} positive, and "
                f"steps={self.steps} or epochs={self.epochs} positive."
            )
        if self.negatives not in _DIRECTIONS:
            raise ValueError(f"negatives={self.negatives!r}; choose one of {NEGATIVES}.")
        if self.precision not in {"auto", "float32", "bfloat16"}:
            raise ValueError(f"precision={self.precision!r}; auto, float32 or bfloat16.")


@dataclass(frozen=True)
class TuneResult:
    """What came of it.

    Attributes:
        adapter: folder of the LoRA; None when a signal stopped the run before its end.
        cra_before, cra_after: caption retrieval accuracy on the held-out pictures.
        exit_code: 0, or 130 and 143 after SIGINT and SIGTERM.
    """

    adapter: Path | None
    cra_before: float
    cra_after: float | None
    exit_code: int


def tune_captions(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    groups: Sequence[CaptionGroup],
    output: Path,
    arguments: TuneArguments,
    *,
    other_pairs: Sequence[tuple[list[TextPair], float]] = (),
    resume: bool = False,
) -> TuneResult:
    """Train a LoRA on the model's LLM and write it to `output/adapter`.

    Args:
        model: its LLM gets LoRA layers in place; nothing else changes.
        groups: captions by picture, from `group_captions`.
        other_pairs: other text pairs, and how many of their batches there are for one of the
            captions'.
        resume: continue from the last checkpoint in `output`.
    Raises: ValueError for data that cannot fill a batch, or an output folder of another run,
        before anything is computed; FloatingPointError at a non-finite loss.
    """
    require_fresh_or_same_run(output, asdict(arguments), resume=resume)
    num_held_out = arguments.held_out or min(_MOST_HELD_OUT, len(groups) // 5)
    to_train, held_out, num_lost = hold_out_groups(groups, num_held_out, seed=arguments.seed)
    pairs = draw_pairs(to_train, seed=arguments.seed, pairings=arguments.pairings)
    tables = DatasetDict(captions=make_pair_table(pairs))
    for number, (others, _) in enumerate(other_pairs, start=1):
        tables[f"pairs_{number}"] = make_pair_table(others)
    for table in tables.values():  # too few pictures for a batch shows now
        KeyedBatchSampler(table, arguments.batch_size, drop_last=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        encoder = CaptionEncoder(model, processor, arguments.lora)
    if arguments.gradient_checkpointing:
        model.text_model.gradient_checkpointing_enable({"use_reentrant": False})
    if PartialState().is_main_process:
        write_run_record(output, arguments=asdict(arguments), seed=arguments.seed, model=encoder)
    with stop_on_signals() as stop:
        trainer = _make_trainer(
            encoder, tables, [1.0, *(weight for _, weight in other_pairs)], held_out, output,
            arguments,
        )  # fmt: skip
        trainer.add_callback(StopOnSignal(stop))
        checkpoints = Path(trainer.args.output_dir)
        last = get_last_checkpoint(checkpoints) if resume and checkpoints.is_dir() else None
        before = _measure_before(encoder, held_out, output, resumed=last is not None)
        trainer.train(resume_from_checkpoint=last)
    if stop.signal:
        return TuneResult(None, before, None, stop.exit_code)
    after = measure_caption_retrieval(encoder.encode, held_out)
    if PartialState().is_main_process:
        write_adapter(
            encoder, output / ADAPTER_FOLDER, dtype=getattr(torch, arguments.adapter_dtype)
        )
        _write_result(
            output, before, after, num_held_out=len(held_out), num_trained=len(to_train),
            num_captions_lost=num_lost, steps=trainer.state.global_step,
        )  # fmt: skip
    return TuneResult(output / ADAPTER_FOLDER, before, after, 0)


class _CaptionRetrieval(BaseEvaluator):  # type: ignore[misc]
    """The accuracy as sentence-transformers' trainer asks for it between steps."""

    def __init__(self, encoder: CaptionEncoder, groups: Sequence[CaptionGroup]) -> None:
        super().__init__()
        self.encoder, self.groups = encoder, groups
        self.primary_metric = "cra"

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"cra": measure_caption_retrieval(self.encoder.encode, self.groups)}


class _Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Loads an adapter where sentence-transformers would load a whole model, and stops at NaN."""

    encoder: CaptionEncoder

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


def _make_trainer(
    encoder: CaptionEncoder,
    tables: DatasetDict,
    weights: Sequence[float],
    held_out: Sequence[CaptionGroup],
    output: Path,
    arguments: TuneArguments,
) -> _Trainer:
    wrapped = wrap_encoder(encoder)
    trainer = _Trainer(
        model=wrapped,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(output / "checkpoints"),
            num_train_epochs=arguments.epochs,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.lr,
            warmup_steps=arguments.warmup_steps,
            lr_scheduler_type="cosine",
            bf16=_computes_in_bfloat16(arguments.precision, encoder.llm2clip.device),
            use_cpu=encoder.llm2clip.device.type == "cpu",
            batch_sampler=KeyedBatchSampler,
            multi_dataset_batch_sampler=partial(WeightedBatchSampler, weights=weights),
            eval_strategy="steps" if arguments.eval_every else "no",
            eval_steps=arguments.eval_every or None,
            save_strategy="steps",
            save_steps=arguments.save_every,
            save_total_limit=2,
            logging_steps=1 if arguments.steps in range(1, 200) else 10,
            dataloader_drop_last=True,
            ddp_find_unused_parameters=False,
            report_to=choose_reports(),
            seed=arguments.seed,
        ),
        train_dataset=tables,
        loss=_make_loss(wrapped, arguments),
        evaluator=_CaptionRetrieval(encoder, held_out) if arguments.eval_every else None,
        data_collator=PairCollator(wrapped.preprocess),
        callbacks=[JsonLinesCallback(output / METRICS_FILE)],
    )
    trainer.encoder = encoder
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


def _computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # On a processor without these instructions bfloat16 is several times slower than float32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _measure_before(
    encoder: CaptionEncoder, held_out: Sequence[CaptionGroup], output: Path, *, resumed: bool
) -> float:
    """The accuracy of the untuned LLM; a resumed run takes what it measured the first time."""
    file = output / RESULT_FILE
    if resumed:
        return float(json.loads(file.read_text(encoding="utf-8"))["cra_before"])
    before = measure_caption_retrieval(encoder.encode, held_out)
    if PartialState().is_main_process:
        file.write_text(json.dumps({"cra_before": before}) + "\n", encoding="utf-8")
    return before


def _write_result(output: Path, before: float, after: float, **counts: int) -> None:
    result = {"cra_before": before, "cra_after": after, **counts}
    (output / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
