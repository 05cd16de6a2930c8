"""Plan of `train`: the stages in order, the work in each stage, and which are finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tabulate import tabulate

from .._suggestions import counted
from ..building.pretrained_towers import EMBEDDED
from ..configs.build_config import list_vision_sources
from ..configs.train_config import TrainConfig
from ..data.key_arrays import count_distinct
from ..data.records.record_loading import find_example_data, load_records
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage
from ..data.records.splits import count_shared_captions, split_records
from ..data.store.store_manifest import MANIFEST_FILE, StoreManifest
from ..evaluation.datasets.custom_folder import make_records_spec
from ..evaluation.datasets.dataset_registry import read_data
from ..training.alignment.alignment_trainer import choose_batch_size, count_steps
from ..training.alignment.held_out import choose_held_out
from ..training.finetuning.finetune_llm import check_finetuning
from ..training.run_folder import RUN_FILE

Split: TypeAlias = tuple[Sequence[CaptionedImage], Sequence[CaptionedImage]]
State: TypeAlias = Literal["to do", "stopped", "finished", "repeated"]


class RecipePaths:
    """Paths that `train` writes to inside its output folder."""

    def __init__(self, output: Path) -> None:
        self.built = output / "built"
        self.fine_tuned = output / "fine-tuned"  # run folder with the model in `model`
        self.captions = output / "captions"
        self.images = output / "images"
        self.teacher = output / "teacher"
        self.aligned = output / "aligned"  # like `fine_tuned`
        self.exported = output / "model"
        self.evaluation = output / "evaluation"


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a recipe; an evaluation stage is repeated, but reuses finished results."""

    name: str
    size: str
    output: Path
    state: State


@dataclass(frozen=True)
class RecipePlan:
    """Stages of a recipe, and the number of images to train on and to evaluate on.

    Printing the plan shows one line per stage.
    """

    output: Path
    stages: tuple[PlannedStage, ...]
    num_images: tuple[int, int]
    num_shared_captions: int

    def __str__(self) -> str:
        rows = [(s.name, s.size, s.state, s.output.relative_to(self.output)) for s in self.stages]
        heads = ("stage", "size", "state", "output")
        shared = (
            f" ({counted(self.num_shared_captions, 'training caption')} also in the evaluation "
            "data)"
            if self.num_shared_captions
            else ""
        )
        return (
            f"{counted(self.num_images[0], 'image')} to train on, {self.num_images[1]:,} to "
            f"evaluate on{shared}. Everything is written to {self.output}.\n"
            f"{tabulate(rows, heads, tablefmt='github', disable_numparse=True)}"
        )


def read_split(config: TrainConfig) -> Split:
    """Read the records and split off those to evaluate on (none with `test_size=0`)."""
    if config.data == EMBEDDED:
        if config.caption_fields or config.ignore_fields or config.image_dir:
            raise ValueError(
                "data=embedded is read as it is. Leave caption_fields, ignore_fields and image_dir "
                "out."
            )
        emoji = load_records(find_example_data() / "emoji")
        records: Sequence[CaptionedImage] = [r for r in emoji if r.lang == "en"]
    else:
        records = read_data(config.data, config, require_images=True)
    if not config.test_size:
        return records, []
    return split_records(
        records, test_size=config.test_size, seed=config.seed, allow_shared_captions=True
    )


def plan_recipe(config: TrainConfig, split: Split) -> RecipePlan:
    """Plan the stages of a recipe without writing anything or loading a model."""
    train, test = map(RecordTable.from_records, split)
    num_images = _count(train, "name_key"), _count(test, "name_key")
    return RecipePlan(
        output=config.output,
        stages=tuple(_list_stages(config, train, num_images)),
        num_images=num_images,
        num_shared_captions=count_shared_captions(train, test),
    )


def uses_stores(config: TrainConfig) -> tuple[bool, bool]:
    """Return whether the alignment uses a caption store and an image store."""
    align = config.align
    reads_images = align.vision_training == "frozen" or align.distillation_weight > 0
    return align.text_training == "stored", reads_images


def list_eval_data(config: TrainConfig, test: Sequence[CaptionedImage]) -> list[Any]:
    return [*([make_records_spec(test, name="held-out")] if test else []), *config.eval_datasets]


def _list_stages(
    config: TrainConfig, train: RecordTable, num_images: tuple[int, int]
) -> list[PlannedStage]:
    paths, captions = RecipePaths(config.output), counted(_count(train, "text_keys"), "caption")
    sources = (*list_vision_sources(config.vision_model), config.text_model)
    towers = " + ".join(Path(source).name for source in sources)
    stages = [PlannedStage("build", towers, paths.built, _find_state(paths.built))]
    if config.finetune is not None:
        size, tuned = _describe_finetuning(config, train), paths.fine_tuned / "model"
        state = _find_state(tuned, run=paths.fine_tuned)
        stages.append(PlannedStage("finetune-llm", size, tuned, state))
    for is_wanted, modality, size, store in zip(
        (*uses_stores(config), config.inherit),
        ("text", "image", "teacher"),
        (captions, counted(num_images[0], "image"), captions),
        (paths.captions, paths.images, paths.teacher),
        strict=True,
    ):
        if is_wanted:
            state = "stopped" if (store / MANIFEST_FILE).is_file() else "to do"
            state = "finished" if is_complete_store(store) else state
            stages.append(PlannedStage(f"extract {modality}", size, store, state))
    final = paths.aligned / "model"
    state = _find_state(final, run=paths.aligned)
    stages.append(PlannedStage("align", _describe_alignment(config, train), final, state))
    if config.export is not None:
        final = paths.exported
        size = f"{config.export.components}, {config.export.dtype or 'unchanged dtype'}"
        stages.append(PlannedStage("export", size, final, _find_state(final)))
    stages.append(PlannedStage("doctor", "every check", final, "repeated"))
    if num_images[1] or config.eval_datasets:
        held_out = [counted(num_images[1], "held-out image")] if num_images[1] else []
        size = ", ".join([*held_out, *config.eval_datasets])
        stages.append(PlannedStage("evaluate", size, paths.evaluation, "repeated"))
    return stages


def _describe_finetuning(config: TrainConfig, train: RecordTable) -> str:
    finetune = config.finetune
    assert finetune is not None
    num_steps = counted(finetune.max_steps or check_finetuning(train, finetune), "step")
    return f"{num_steps} of {counted(finetune.per_device_train_batch_size, 'pair')}"


def _describe_alignment(config: TrainConfig, train: RecordTable) -> str:
    items, _ = choose_held_out(train, config.align.held_out_ratio, seed=config.align.seed)
    batch_size = choose_batch_size(config.align, len(items), 1)
    num_steps = count_steps(config.align, len(items), batch_size)
    return (
        f"{counted(num_steps, 'step')} of {counted(batch_size, 'image')}, vision tower "
        f"{config.align.vision_training}"
    )


def _count(records: RecordTable, name: str) -> int:
    """Count the distinct numbers in a column."""
    return count_distinct(partial(records.iterate_numbers, name), len(records))


def is_complete(folder: Path) -> bool:
    """Return True if a folder is not empty; folders get their final name only when complete."""
    return folder.is_dir() and any(folder.iterdir())


def is_complete_store(store: Path) -> bool:
    return (store / MANIFEST_FILE).is_file() and StoreManifest.read(store).complete


def _find_state(folder: Path, *, run: Path | None = None) -> State:
    if is_complete(folder):
        return "finished"
    return "stopped" if run is not None and (run / RUN_FILE).is_file() else "to do"
