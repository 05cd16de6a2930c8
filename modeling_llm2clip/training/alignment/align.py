"""Stage 3: checks everything that is cheap, loads what is needed, trains, and merges.

Writes into the output folder: `run.json`, `metrics.jsonl`, `checkpoints/`. The new Hub folder is
made of the result by `save_trained_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import set_seed

from ...data.atomic_files import hash_file
from ...data.data_hashes import describe_images, hash_records
from ...data.embedding_store import MANIFEST_FILE, EmbeddingStore
from ...data.records import CaptionedImage
from ...encoding.float32 import float32_as_such
from ...model_folders.fingerprint import fingerprint_model, fingerprint_text, fingerprint_vision
from ...processing_llm2clip import LLM2CLIPProcessor
from ..callbacks import JsonLinesCallback, ShareSignal, StopOnSignal, show_readable_progress
from ..checkpoints import (
    find_last_checkpoint,
    forget_what_came_after,
    require_finite,
)
from ..distributed import refuse_fsdp_for_lora
from ..graceful_stop import StopRequest, stop_on_signals
from ..run_record import (
    METRICS_FILE,
    read_run_entry,
    require_fresh_or_resumed,
    require_fresh_or_same_run,
    write_run_entry,
    write_run_record,
)
from .align_arguments import AlignArguments
from .alignment_data import AlignmentDataset
from .alignment_model import AlignmentModel
from .alignment_trainer import AlignmentTrainer, RunLength, make_training_arguments
from .held_out import HeldOutImages, HeldOutScores, choose_held_out
from .selection import KeepBest, restore
from .start import Start, make_start
from .trained_parts import choose_trained_parts, merge_loras

_NAMES_SHOWN = 5
# What is decided or found while a run goes on, in its record.
_START, _HELD_OUT = "start", "held_out"
_SHARE_BEFORE_ADAPTER = 0.25
# Settings of the same name of `AlignmentDataset`.
_OF_DATASET = ("long_share", "image_noise", "caption_noise", "seed")


@dataclass(frozen=True)
class AlignResult:
    """What came of a run.

    Attributes:
        trained: what differs from the model's folder now, by its name there, on the CPU, LoRAs
            merged; empty in all but the main process; None when a signal stopped the run early.
            With held-out images, the best weights that the run has seen.
        steps: steps done, those before a resumption included.
        final_loss: of the last step, with `log_every` above 1 the mean of the steps since the
            last line of metrics before it.
        exit_code: 0, or 130 and 143 after SIGINT and SIGTERM.
        is_main_process: whether this process is the one that writes.
        start: where it started.
        before, after: scores on the held-out images at the start, and of `trained`; None without
            held-out images.
        best_step: the step whose weights `trained` holds.
        has_trained_adapter: whether its text adapter has no random weights left.
    """

    trained: dict[str, Tensor] | None
    steps: int
    final_loss: float
    exit_code: int
    is_main_process: bool
    start: Start
    before: HeldOutScores | None = None
    after: HeldOutScores | None = None
    best_step: int | None = None
    has_trained_adapter: bool = False

    @property
    def has_trained_projections(self) -> bool:
        """Whether `trained` holds projections that were fitted or trained, now or before."""
        return self.start.is_trained or bool(self.best_step)


def align(
    model: Path,
    records: Sequence[CaptionedImage],
    output: Path,
    arguments: AlignArguments,
    *,
    caption_store: EmbeddingStore | None = None,
    image_store: EmbeddingStore | None = None,
    resume: bool = False,
) -> AlignResult:
    """Align images with captions.

    Args:
        model: folder of a built or exported model.
        records: the data; their images are needed where there is no `image_store`.
        output: folder for the run's files; must be new, or the same run's with `resume`.
        caption_store: caption embeddings of these records by this model's LLM; needed for
            `text_training="stored"`, and only for it.
        image_store: image embeddings by this model's frozen tower.
        resume: continue from the last whole checkpoint in `output`, which must be of the same
            settings, weights, stores, captions and images (by name and size).
    Raises:
        ValueError: before any tower is loaded: no data, too little for a batch, groups that leave
            nothing to tell apart, a batch that the processes cannot share, an output folder of
            another run, stores of another model or of other data, settings that contradict each
            other.
        FloatingPointError: at a loss, a gradient or a weight that is not finite, before anything
            is kept of it.
    """
    check_settings(arguments, caption_store=caption_store, image_store=image_store)
    _check_data(records, arguments)
    require_fresh_or_resumed(output, resume=resume)  # weights are read next, which takes a while
    made_by = {"text": fingerprint_text(model), "vision": fingerprint_vision(model)}
    _check_stores(made_by, caption_store, image_store)
    dataset = AlignmentDataset(
        records,
        LLM2CLIPProcessor.from_pretrained(model),
        caption_store=caption_store,
        image_store=image_store,
        **{name: getattr(arguments, name) for name in _OF_DATASET},
    )
    record = _identify_run(model, dataset, arguments, made_by)
    require_fresh_or_same_run(output, record, resume=resume)
    training_arguments = make_training_arguments(output, arguments)
    num_processes = training_arguments.world_size
    items, held_items = choose_held_out(dataset, arguments.held_out_share, seed=arguments.seed)
    batch_size = arguments.choose_batch_size(len(items), num_processes)
    check_processes(arguments, batch_size, num_processes)
    _check_batch(batch_size, len(items), len(held_items))
    PartialState().wait_for_everyone()  # everybody has looked at the folder before it is filled
    set_seed(arguments.seed)
    aligned = AlignmentModel.from_pretrained(
        model, with_llm=arguments.needs_llm, with_vision_tower=image_store is None
    )
    adapted = choose_trained_parts(aligned, arguments)
    last = find_last_checkpoint(output) if resume else None
    held_out = HeldOutImages(dataset, held_items) if held_items else None
    if last is None:
        start = make_start(aligned, dataset, items, held_out, arguments)
    else:
        start = Start(**read_run_entry(output, _START))
    _record_beginning(output, record, start, last=last, model=aligned)
    length = _find_length(arguments, start, num_items=len(items), batch_size=batch_size)
    with float32_as_such(), stop_on_signals() as stop:
        trainer = AlignmentTrainer(
            aligned,
            dataset,
            items=items,
            arguments=arguments,
            length=length,
            training_arguments=training_arguments,
            callbacks=[
                JsonLinesCallback(output / METRICS_FILE), ShareSignal(stop), StopOnSignal(stop),
            ],
            keep_best=_make_keep_best(held_out, output, arguments, length),
        )  # fmt: skip
        show_readable_progress(trainer)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return _conclude(trainer, adapted, output, start, stop)


def _record_beginning(
    output: Path, record: dict[str, Any], start: Start, *, last: Path | None, model: AlignmentModel
) -> None:
    """Write the run's record in the main process, and let the others wait for it."""
    state = PartialState()
    if state.is_main_process:
        write_run_record(output, arguments=record, seed=record["seed"], model=model)
        write_run_entry(output, _START, asdict(start))
        forget_what_came_after(output, last)
    state.wait_for_everyone()


def _find_length(
    arguments: AlignArguments, start: Start, *, num_items: int, batch_size: int
) -> RunLength:
    num_steps = arguments.count_steps(num_items, batch_size)
    return RunLength(
        num_steps=num_steps,
        batch_size=batch_size,
        lr=start.default_lr if arguments.lr is None else arguments.lr,
        # A new adapter is the identity, and joins when the projections have settled.
        adapter_begin=round(_SHARE_BEFORE_ADAPTER * num_steps) if start.has_new_adapter else 0,
    )


def _make_keep_best(
    held_out: HeldOutImages | None, output: Path, arguments: AlignArguments, length: RunLength
) -> KeepBest | None:
    if held_out is None:
        return None
    return KeepBest(
        held_out,
        output,
        every=arguments.space_evaluations(length.num_steps),
        patience=arguments.patience,
        patient_until=length.adapter_begin,
    )


def _conclude(
    trainer: AlignmentTrainer,
    adapted: dict[str, Any],
    output: Path,
    start: Start,
    stop: StopRequest,
) -> AlignResult:
    """Take the weights that the run ends with, and record how they do."""
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    keep_best = trainer.keep_best
    finished = trainer.state.global_step >= trainer.state.max_steps
    finished = finished or (keep_best is not None and keep_best.has_stopped_early)
    if finished and keep_best is not None and trainer.args.should_save:
        write_run_entry(output, _HELD_OUT, keep_best.as_record())
    best_step = trainer.state.global_step if keep_best is None else keep_best.best_step
    was_trained = trainer.alignment_model.config.text_adapter_trained
    return AlignResult(
        trained=_collect(trainer, adapted, output) if finished else None,
        steps=trainer.state.global_step,
        final_loss=losses[-1] if losses else float("nan"),
        exit_code=0 if finished else stop.exit_code,
        is_main_process=trainer.args.should_save,
        start=start,
        before=None if keep_best is None else keep_best.before,
        after=None if keep_best is None else keep_best.best,
        best_step=best_step,
        # The identity, which the closed form starts from, is not random either.
        has_trained_adapter=was_trained or start.has_new_adapter or best_step > 0,
    )


def _collect(trainer: AlignmentTrainer, adapted: dict[str, Any], output: Path) -> dict[str, Tensor]:
    model = trainer.alignment_model
    best = trainer.keep_best and trainer.keep_best.load_best()
    if trainer.is_fsdp_enabled:
        state = best or trainer.collect_trained()
    else:
        if best:
            restore(trainer, best)
        state = merge_loras(model, adapted)
    require_finite(state, step=trainer.state.global_step)
    if not trainer.args.should_save:
        return {}
    return model.name_as_saved({name: value.cpu() for name, value in state.items()}, output)


def check_settings(
    arguments: AlignArguments,
    *,
    caption_store: EmbeddingStore | None,
    image_store: EmbeddingStore | None,
) -> None:
    """Raise ValueError when settings and stores contradict each other; asks for no data."""
    errors = []
    if arguments.needs_llm and caption_store is not None:
        errors.append(
            f"text_training={arguments.text_training!r} runs the LLM and reads no caption store"
        )
    if not arguments.needs_llm and caption_store is None:
        errors.append("text_training='stored' needs a caption store; llm2clip extract makes one")
    if image_store is not None and arguments.vision_training != "frozen":
        errors.append(
            f"vision_training={arguments.vision_training!r} changes the image embeddings, so that "
            "a "
            "image store is of no use"
        )
    if arguments.start == "canonical-correlation" and (
        caption_store is None or image_store is None
    ):
        errors.append(f"start={arguments.start!r} needs a caption store and an image store")
    for store, content in ((caption_store, "caption_embeds"), (image_store, "vision_embeds")):
        if store is not None and store.manifest.content != content:
            errors.append(f"{store.folder} holds {store.manifest.content}, wanted {content}")
    if errors:
        raise ValueError("; ".join(errors) + ".")


def _check_data(records: Sequence[CaptionedImage], arguments: AlignArguments) -> None:
    if not records:
        raise ValueError("Got no images to align with; give at least a batch of them.")
    _check_batch(arguments.batch_size or 1, len(records), 0)
    _check_group_ids(records)


def _check_batch(batch_size: int, num_images: int, num_held_out: int) -> None:
    if num_images < batch_size:
        raise ValueError(
            f"{num_images} images to train on ({num_held_out} are held out) are too few for a "
            f"batch of {batch_size}. Set batch_size to at most {num_images}, leave it out, or give "
            "more data."
        )


def _check_group_ids(records: Sequence[CaptionedImage]) -> None:
    """Raise ValueError where groups leave no negatives, or make an image its own."""
    group_ids_of: dict[str, set[str]] = {}
    for record in records:
        group_ids_of.setdefault(record.name, set()).add(record.group_id)
    if len(group_ids := set().union(*group_ids_of.values())) < 2:
        raise ValueError(
            f"All {len(records)} records have the group_id {group_ids.pop()!r}, so that no image "
            "has a negative. Give images that show different things different group_ids, or none."
        )
    torn = {
        name: sorted(group_ids) for name, group_ids in group_ids_of.items() if len(group_ids) > 1
    }
    if torn:
        shown = "; ".join(
            f"{name} {group_ids}" for name, group_ids in [*torn.items()][:_NAMES_SHOWN]
        )
        raise ValueError(
            f"{len(torn)} images have several group_ids over their languages and would be their "
            f"own negatives: {shown}. Give all records of an image one group_id."
        )


def _check_stores(
    made_by: dict[str, dict[str, str]],
    caption_store: EmbeddingStore | None,
    image_store: EmbeddingStore | None,
) -> None:
    if caption_store is not None:
        caption_store.require_fingerprint(made_by["text"])
    if image_store is not None:
        image_store.require_fingerprint(made_by["vision"])


def _identify_run(
    model: Path,
    dataset: AlignmentDataset,
    arguments: AlignArguments,
    made_by: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """All that the run's numbers hang on, for its record."""
    reads_images = dataset.image_store is None
    return {
        **asdict(arguments),
        "model": str(model),
        "fingerprint": {**made_by, "all": fingerprint_model(model)},
        "caption_store": _identify_store(dataset.caption_store),
        "image_store": _identify_store(dataset.image_store),
        "num_records": len(dataset.records),
        "data": hash_records(dataset.records),
        "images": describe_images(dataset.records) if reads_images else None,
    }


def _identify_store(store: EmbeddingStore | None) -> dict[str, str] | None:
    """Where a store lies, and what its embeddings are: the manifest has the hash of every file."""
    if store is None:
        return None
    return {"folder": str(store.folder), "manifest": hash_file(store.folder / MANIFEST_FILE)}


def check_processes(arguments: AlignArguments, batch_size: int, num_processes: int) -> None:
    """Raise ValueError when so many processes cannot share a batch, or the work."""
    if batch_size < num_processes:
        raise ValueError(
            f"batch_size={batch_size} is smaller than the number of processes "
            f"({num_processes}). It counts the images of all processes together."
        )
    if batch_size % num_processes:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared evenly by {num_processes} "
            "processes. Choose a multiple of their number."
        )
    if "lora" in (arguments.vision_training, arguments.text_training):
        refuse_fsdp_for_lora()
