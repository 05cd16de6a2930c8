"""Stage 3: checks everything that is cheap, loads what is needed, trains, and merges.

Writes into the output folder: `run.json`, `metrics.jsonl`, `checkpoints/`. The new Hub folder is
made of the result by `hub.assemble`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainingArguments, set_seed

from ...data.captioned_images import CaptionedImage, hash_records
from ...data.vector_store import VectorStore
from ...data.vector_store_layout import MANIFEST_FILE, hash_file
from ...encoding.fingerprint import fingerprint_model, fingerprint_text, fingerprint_vision
from ...processing_llm2clip import LLM2CLIPProcessor
from ..callbacks import JsonLinesCallback, ShareSignal, StopOnSignal, show_readable_progress
from ..checkpoints import (
    find_last_checkpoint,
    find_trained,
    forget_what_came_after,
    require_finite,
)
from ..closed_form_start import start_from_canonical_correlation
from ..picture_files import describe_pictures
from ..run_record import (
    METRICS_FILE,
    require_fresh_or_resumed,
    require_fresh_or_same_run,
    write_run_record,
)
from ..stopping import StopRequest, stop_on_signals
from .arguments import AlignArguments
from .dataset import AlignmentDataset
from .model import AlignmentModel
from .towers import choose_trained_parts, merge_loras
from .trainer import AlignmentTrainer, make_training_arguments

# As many pairs fix a linear fit of vectors of a few thousand elements, and fit into memory.
_MOST_PAIRS_OF_START = 50_000
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class AlignResult:
    """What came of a run.

    Attributes:
        trained: what differs from the model's folder now, by its name there, on the CPU, LoRAs
            merged; empty in all but the main process; None when a signal stopped the run early.
        steps: steps done, those before a resumption included.
        final_loss: of the last step, with `log_every` above 1 the mean of the steps since the
            last line of metrics before it.
        exit_code: 0, or 130 and 143 after SIGINT and SIGTERM.
        is_main_process: whether this process is the one that writes.
    """

    trained: dict[str, Tensor] | None
    steps: int
    final_loss: float
    exit_code: int
    is_main_process: bool


def align(
    model: Path,
    records: Sequence[CaptionedImage],
    output: Path,
    arguments: AlignArguments,
    *,
    caption_store: VectorStore | None = None,
    picture_store: VectorStore | None = None,
    resume: bool = False,
) -> AlignResult:
    """Align pictures with captions.

    Args:
        model: folder of a built or exported model.
        records: the data; their pictures are needed where there is no `picture_store`.
        output: folder for the run's files; must be new, or the same run's with `resume`.
        caption_store: caption vectors of these records by this model's LLM; needed for
            `text_training="stored"`, and only for it.
        picture_store: picture vectors by this model's frozen tower.
        resume: continue from the last whole checkpoint in `output`, which must be of the same
            settings, weights, stores, captions and pictures (by name and size).
    Raises:
        ValueError: before any tower is loaded: no data, too little for a batch, keys that leave
            nothing to tell apart, a batch that the processes cannot share, an output folder of
            another run, stores of another model or of other data, settings that contradict each
            other.
        FloatingPointError: at a loss, a gradient or a weight that is not finite, before anything
            is kept of it.
    """
    check_settings(arguments, caption_store=caption_store, picture_store=picture_store)
    _check_data(records, arguments)
    require_fresh_or_resumed(output, resume=resume)  # weights are read next, which takes a while
    made_by = {"text": fingerprint_text(model), "vision": fingerprint_vision(model)}
    _check_stores(made_by, caption_store, picture_store)
    dataset = AlignmentDataset(
        records,
        LLM2CLIPProcessor.from_pretrained(model),
        caption_store=caption_store,
        picture_store=picture_store,
        long_share=arguments.long_share,
        seed=arguments.seed,
    )
    record = _identify_run(model, dataset, arguments, made_by)
    require_fresh_or_same_run(output, record, resume=resume)
    training_arguments = make_training_arguments(
        output, arguments, num_steps=arguments.count_steps(len(records))
    )
    check_processes(arguments, training_arguments.world_size)
    PartialState().wait_for_everyone()  # everybody has looked at the folder before it is filled
    set_seed(arguments.seed)
    aligned = AlignmentModel.from_pretrained(
        model, with_llm=arguments.needs_llm, with_vision_tower=picture_store is None
    )
    adapted = choose_trained_parts(aligned, arguments)
    last = find_last_checkpoint(output) if resume else None
    if last is None and arguments.start == "canonical-correlation":
        start_from_canonical_correlation(aligned, *_pair_vectors(dataset, arguments.seed))
    if training_arguments.should_save:
        write_run_record(output, arguments=record, seed=arguments.seed, model=aligned)
        forget_what_came_after(output, last)
    PartialState().wait_for_everyone()
    with stop_on_signals() as stop:
        trainer = _make_trainer(aligned, dataset, output, arguments, training_arguments, stop)
        show_readable_progress(trainer)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    finished = trainer.state.global_step >= training_arguments.max_steps
    return AlignResult(
        trained=_collect(trainer, adapted, output) if finished else None,
        steps=trainer.state.global_step,
        final_loss=losses[-1] if losses else float("nan"),
        exit_code=0 if finished else stop.exit_code,
        is_main_process=training_arguments.should_save,
    )


def _make_trainer(
    model: AlignmentModel,
    dataset: AlignmentDataset,
    output: Path,
    arguments: AlignArguments,
    training_arguments: TrainingArguments,
    stop: StopRequest,
) -> AlignmentTrainer:
    return AlignmentTrainer(
        model,
        dataset,
        arguments=arguments,
        training_arguments=training_arguments,
        callbacks=[JsonLinesCallback(output / METRICS_FILE), ShareSignal(stop), StopOnSignal(stop)],
    )


def _collect(trainer: AlignmentTrainer, adapted: dict[str, Any], output: Path) -> dict[str, Tensor]:
    model = trainer.alignment_model
    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        names = find_trained(model)
        state = {name: value for name, value in state.items() if name in names}
    else:
        state = merge_loras(model, adapted)
    require_finite(state, step=trainer.state.global_step)
    if not trainer.args.should_save:
        return {}
    return model.name_as_saved({name: value.cpu() for name, value in state.items()}, output)


def check_settings(
    arguments: AlignArguments,
    *,
    caption_store: VectorStore | None,
    picture_store: VectorStore | None,
) -> None:
    """Raise ValueError when settings and stores contradict each other; asks for no data."""
    faults = []
    if arguments.needs_llm and caption_store is not None:
        faults.append(
            f"text_training={arguments.text_training!r} runs the LLM and reads no caption store"
        )
    if not arguments.needs_llm and caption_store is None:
        faults.append("text_training='stored' needs a caption store; llm2clip extract makes one")
    if picture_store is not None and arguments.vision_training != "frozen":
        faults.append(
            f"vision_training={arguments.vision_training!r} changes the picture vectors, so that a "
            "picture store is of no use"
        )
    if arguments.start != "as-is" and (caption_store is None or picture_store is None):
        faults.append(f"start={arguments.start!r} needs a caption store and a picture store")
    for store, kind in ((caption_store, "caption_embeds"), (picture_store, "vision_embeds")):
        if store is not None and store.manifest.kind != kind:
            faults.append(f"{store.folder} holds {store.manifest.kind}, wanted {kind}")
    if faults:
        raise ValueError("; ".join(faults) + ".")


def _check_data(records: Sequence[CaptionedImage], arguments: AlignArguments) -> None:
    if not records:
        raise ValueError("Got no pictures to align with; give at least a batch of them.")
    if len(records) < arguments.batch_size:
        raise ValueError(
            f"{len(records)} pictures are too few for a batch of {arguments.batch_size}. Set "
            f"batch_size to at most {len(records)}, or give more data."
        )
    _check_keys(records)


def _check_keys(records: Sequence[CaptionedImage]) -> None:
    """Raise ValueError where keys leave no negatives, or make a picture its own."""
    keys_of: dict[str, set[str]] = {}
    for record in records:
        keys_of.setdefault(record.name, set()).add(record.key)
    if len(keys := set().union(*keys_of.values())) < 2:
        raise ValueError(
            f"All {len(records)} records have the key {keys.pop()!r}: they show the same thing, so "
            "that there is nothing to tell apart. Give what differs different keys, or none."
        )
    torn = {name: sorted(keys) for name, keys in keys_of.items() if len(keys) > 1}
    if torn:
        shown = "; ".join(f"{name} {keys}" for name, keys in [*torn.items()][:_NAMES_SHOWN])
        raise ValueError(
            f"{len(torn)} pictures have several keys over their languages, and would be their own "
            f"negatives: {shown}. Give all records of a picture one key."
        )


def _check_stores(
    made_by: dict[str, dict[str, str]],
    caption_store: VectorStore | None,
    picture_store: VectorStore | None,
) -> None:
    if caption_store is not None:
        caption_store.require_fingerprint(made_by["text"])
    if picture_store is not None:
        picture_store.require_fingerprint(made_by["vision"])


def _identify_run(
    model: Path,
    dataset: AlignmentDataset,
    arguments: AlignArguments,
    made_by: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """All that the run's numbers hang on, for its record."""
    reads_pictures = dataset.picture_store is None
    return {
        **asdict(arguments),
        "model": str(model),
        "fingerprint": {**made_by, "all": fingerprint_model(model)},
        "caption_store": _identify_store(dataset.caption_store),
        "picture_store": _identify_store(dataset.picture_store),
        "num_records": len(dataset.records),
        "data": hash_records(dataset.records),
        "pictures": describe_pictures(dataset.records) if reads_pictures else None,
    }


def _identify_store(store: VectorStore | None) -> dict[str, str] | None:
    """Where a store lies, and what its vectors are: the manifest has the hash of every file."""
    if store is None:
        return None
    return {"folder": str(store.folder), "manifest": hash_file(store.folder / MANIFEST_FILE)}


def check_processes(arguments: AlignArguments, num_processes: int) -> None:
    """Raise ValueError when so many processes cannot share a batch, or the work."""
    if arguments.batch_size < num_processes:
        raise ValueError(
            f"batch_size={arguments.batch_size} is smaller than the number of processes "
            f"({num_processes}). It counts the pictures of all processes together."
        )
    if arguments.batch_size % num_processes:
        raise ValueError(
            f"batch_size={arguments.batch_size} cannot be shared evenly by {num_processes} "
            "processes. Choose a multiple of their number."
        )
    # Set by accelerate launch. A LoRA's merging needs whole matrices, which no process has there.
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if is_sharded and "lora" in (arguments.vision_training, arguments.text_training):
        raise ValueError("A LoRA is not trained under FSDP. Use the configuration for DDP.")


def _pair_vectors(dataset: AlignmentDataset, seed: int) -> tuple[Tensor, Tensor]:
    """Captions beside their pictures from the stores, evenly drawn where there are very many."""
    generator = torch.Generator().manual_seed(seed)
    captions: list[int] = []
    pictures: list[int] = []
    for item in torch.randperm(len(dataset), generator=generator).tolist():
        rows = dataset.caption_rows(item).tolist()
        captions += rows
        pictures += [dataset.picture_row(item)] * len(rows)
        if len(captions) >= _MOST_PAIRS_OF_START:
            break
    assert dataset.caption_store is not None and dataset.picture_store is not None
    return dataset.caption_store.read(captions), dataset.picture_store.read(pictures)
