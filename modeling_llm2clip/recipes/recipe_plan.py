"""The plan of `train`: stages in order, with sizes, steps, disk, and which are finished.

Sizes of towers are read from their files without loading them. Unknown numbers are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from tabulate import tabulate
from tqdm import tqdm

from .._suggestions import counted
from ..building.pretrained_towers import (
    EFFICIENTNET,
    EMBEDDED,
    MINILM,
    SMOLLM2,
    PretrainedTower,
    find_tower,
)
from ..configs.build_config import OWN_PROMPT
from ..configs.train_config import TrainConfig
from ..data.captions.caption_groups import count_groups
from ..data.captions.sentence_views import with_views
from ..data.records.record_loading import find_example_data, load_records
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage
from ..data.records.splits import list_text_keys, split_records
from ..data.safetensors_files import read_shapes
from ..data.sources.json_files import read_object
from ..data.store.store_manifest import MANIFEST_FILE, StoreManifest
from ..evaluation.datasets.custom_folder import make_records_spec
from ..evaluation.datasets.dataset_registry import read_data
from ..model_folders.model_folder import explain_missing, fetch_hub_file, is_hub_id
from ..training.alignment.alignment_trainer import choose_batch_size, count_steps
from ..training.alignment.held_out import count_held_out
from ..training.finetuning.finetune_data import count_held_out as count_tuning_held_out
from ..training.run_folder import RUN_FILE, read_results

Split: TypeAlias = tuple[Sequence[CaptionedImage], Sequence[CaptionedImage]]
State: TypeAlias = Literal["to do", "stopped", "finished", "repeated"]

_NUM_CHECKPOINTS = 2
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ADAM_BYTES = 12  # of a trained weight: itself and two moments in float32
_WIDTHS = {
    "vision": ("hidden_size", "num_features"),
    "text": ("projection_size", "projection_dim", "hidden_size"),
}


class RecipePaths:
    """Where `train` writes below its output."""

    def __init__(self, output: Path) -> None:
        self.built = output / "built"
        self.fine_tuned = output / "fine-tuned"  # a run, with the model in `model`
        self.captions = output / "captions"
        self.images = output / "images"
        self.teacher = output / "teacher"
        self.aligned = output / "aligned"  # as `fine_tuned`
        self.exported = output / "model"
        self.evaluation = output / "evaluation"


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a recipe; an evaluation is repeated, and keeps results that are finished."""

    name: str
    size: str
    output: Path
    state: State
    num_bytes: float = 0.0


@dataclass(frozen=True)
class RecipePlan:
    """The stages of a recipe, and the numbers of images to train on and to evaluate on.

    Printing it shows a line per stage.
    """

    output: Path
    stages: tuple[PlannedStage, ...]
    num_images: tuple[int, int]
    num_shared_captions: int

    def __str__(self) -> str:
        left = [stage.num_bytes for stage in self.stages if stage.state != "finished"]
        known = [num_bytes for num_bytes in left if not math.isnan(num_bytes)]
        rows = [
            (
                stage.name,
                stage.size,
                stage.state,
                _show(stage.num_bytes),
                stage.output.relative_to(self.output),
            )
            for stage in self.stages
        ]
        table = tabulate(
            rows,
            ("stage", "size", "state", "disk", "output"),
            tablefmt="github",
            disable_numparse=True,
        )
        shared = counted(self.num_shared_captions, "caption")
        return (
            f"{counted(self.num_images[0], 'image')} to train on, {self.num_images[1]:,} to "
            "evaluate on"
            + (
                f"; {shared} to train on are also captions of these"
                if self.num_shared_captions
                else ""
            )
            + f". Everything is written to {self.output}.\n{table}\n"
            f"Left to write: {'at least ' if len(known) < len(left) else ''}"
            f"{tqdm.format_sizeof(sum(known), 'B')}. How long a stage takes is shown by its first "
            "steps."
        )


def read_split(config: TrainConfig) -> Split:
    """Read the records to train on, and those to evaluate on: none with `test_size=0`."""
    if config.data == EMBEDDED:
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
    """Plan the stages of a recipe; writes nothing and loads no model."""
    # The captions to train on that an image to evaluate on has, too.
    ours, theirs = (list_text_keys(RecordTable.from_records(part)) for part in split)
    return RecipePlan(
        output=config.output,
        stages=tuple(_Planner(config, *split).list_stages()),
        num_images=(_count_images(split[0]), _count_images(split[1])),
        num_shared_captions=int(np.isin(ours, theirs).sum()),
    )


def uses_stores(config: TrainConfig) -> tuple[bool, bool]:
    """Return whether captions and images are extracted for the alignment."""
    align = config.align
    reads_images = align.vision_training == "frozen" or align.distillation_weight > 0
    return align.text_training == "stored", reads_images


def list_eval_data(config: TrainConfig, test: Sequence[CaptionedImage]) -> list[Any]:
    held_out = [make_records_spec(test, name="held-out")] if test else []
    return [*held_out, *config.eval_datasets]


def _show(num_bytes: float) -> str:
    """Show an estimate; nothing for 0."""
    return "?" if math.isnan(num_bytes) else tqdm.format_sizeof(num_bytes, "B") if num_bytes else ""


@dataclass(frozen=True)
class TowerSize:
    """Number of parameters and width of a tower, NaN where they are unknown."""

    num_parameters: float = math.nan
    width: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.num_parameters):
            return "?"
        if self.num_parameters < 1e9:
            return f"{self.num_parameters / 1e6:,.0f}M"
        return f"{self.num_parameters / 1e9:,.1f}B"


def measure_tower(
    source: str, *, embedded: PretrainedTower, part: Literal["vision", "text"] = "vision"
) -> TowerSize:
    """Read the size of a tower from its configuration and the headers of its weight files.

    The size of a dual encoder is that of one part; the width of its texts is the shared space's.
    """
    folder = find_tower(embedded) if source == EMBEDDED else Path(source)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        shapes = {name: shape for file in files for name, shape in read_shapes(file).items()}
        return _read_config(folder / "config.json", _count_parameters(shapes, part), part)
    if folder.exists() or not is_hub_id(source) or explain_missing(source):
        return TowerSize()
    try:
        files_metadata = get_safetensors_metadata(source).files_metadata.values()
        tensors = {name: info for file in files_metadata for name, info in file.tensors.items()}
        on_hub = {name: info.shape for name, info in tensors.items()}
        num_parameters = _count_parameters(on_hub, part)
    except (OSError, ValueError, NotASafetensorsRepoError):  # no Hub, no such repository or files
        num_parameters = math.nan
    return _read_config(fetch_hub_file(source, "config.json"), num_parameters, part)


def _count_parameters(shapes: Mapping[str, Sequence[int]], part: str) -> float:
    """Count weights by name; of a dual encoder only those of one part."""
    of_part = {name: shape for name, shape in shapes.items() if name.startswith(f"{part}_model.")}
    return sum(map(math.prod, (of_part or shapes).values())) or math.nan


def _read_config(file: Path | None, num_parameters: float, part: str) -> TowerSize:
    config: dict[str, Any] = {}
    if file is not None and file.is_file():
        config = read_object(file)
    section = config.get(f"{part}_config")
    section = section if isinstance(section, dict) else {}
    # The width of the shared space at the top is the one that holds.
    config = {**config, **section} if part == "vision" else {**section, **config}
    width = next((config[name] for name in _WIDTHS[part] if config.get(name)), None)
    return TowerSize(num_parameters, width if isinstance(width, int) else math.nan)


class _Planner:
    """Counts the items, steps and bytes of each stage of a recipe."""

    def __init__(
        self,
        config: TrainConfig,
        train: Sequence[CaptionedImage],
        test: Sequence[CaptionedImage],
    ) -> None:
        self.config, self.train, self.test = config, train, test
        self.paths = RecipePaths(config.output)
        embedded = MINILM if config.build.prompt == OWN_PROMPT else SMOLLM2
        self.text = measure_tower(config.text_model, embedded=embedded)
        self.vision = measure_tower(config.vision_model, embedded=EFFICIENTNET)
        num_views = config.extract.sentence_views or config.align.sentence_views
        texts = {t for r in train for t in (*r.captions, *with_views(r.long_captions, num_views))}
        self.num_texts = len(texts)

    def list_stages(self) -> list[PlannedStage]:
        config, paths = self.config, self.paths
        stages = [self._plan_building()]
        if config.finetune is not None:
            stages.append(self._plan_finetuning())
        captions, images = uses_stores(config)
        if captions:
            stages.append(self._plan_extraction("text", paths.captions, self.num_texts, self.text))
        if images:
            num_images = _count_images(self.train)
            stages.append(self._plan_extraction("image", paths.images, num_images, self.vision))
        if config.inherit:
            teacher = measure_tower(config.vision_model, embedded=EFFICIENTNET, part="text")
            stages.append(self._plan_extraction("teacher", paths.teacher, self.num_texts, teacher))
        stages.append(self._plan_alignment())
        final = paths.aligned / "model"
        if config.export is not None:
            final = paths.exported
            size = f"{config.export.components}, {config.export.dtype or 'dtype as it is'}"
            num_bytes = self._count_model_bytes(config.export.dtype)
            stages.append(
                PlannedStage("export", size, final, _find_state(final), num_bytes=num_bytes)
            )
        is_healthy = read_results(config.output).get("is_healthy")
        state: State = "finished" if is_healthy else "to do"
        stages.append(PlannedStage("doctor", "every check", final, state))
        if self.test or config.eval_datasets:
            held_out = [counted(_count_images(self.test), "held-out image")] if self.test else []
            size = ", ".join([*held_out, *config.eval_datasets])
            stages.append(PlannedStage("evaluate", size, paths.evaluation, "repeated"))
        return stages

    def _plan_building(self) -> PlannedStage:
        sizes = " + ".join(
            f"{Path(source).name} ({tower})"
            for source, tower in (
                (self.config.vision_model, self.vision),
                (self.config.text_model, self.text),
            )
        )
        state = _find_state(self.paths.built)
        num_bytes = self._count_model_bytes(self.config.build.dtype)
        return PlannedStage("build", sizes, self.paths.built, state, num_bytes=num_bytes)

    def _plan_finetuning(self) -> PlannedStage:
        config = self.config.finetune
        assert config is not None
        groups = count_groups(self.train)[0]
        trained_ratio = 1 - count_tuning_held_out(len(groups), config) / max(1, len(groups))
        num_pairs = config.num_pairings * round(groups.num_pairs * trained_ratio)
        batch_size = config.per_device_train_batch_size
        num_steps = config.max_steps or max(
            1, round(config.num_train_epochs * (num_pairs // batch_size))
        )
        return PlannedStage(
            "finetune-llm",
            f"{counted(num_steps, 'step')} of {counted(batch_size, 'pair')}",
            self.paths.fine_tuned / "model",
            _find_state(self.paths.fine_tuned / "model", run=self.paths.fine_tuned),
            num_bytes=self._count_model_bytes(self.config.build.dtype),
        )

    def _plan_extraction(
        self, modality: str, store: Path, num_rows: int, tower: TowerSize
    ) -> PlannedStage:
        width = _BYTES[self.config.extract.store_dtype]
        state: State = "stopped" if (store / MANIFEST_FILE).is_file() else "to do"
        if is_complete_store(store):
            state = "finished"
        return PlannedStage(
            f"extract {modality}",
            counted(num_rows, "image" if modality == "image" else "caption"),
            store,
            state,
            num_bytes=num_rows * tower.width * width,
        )

    def _plan_alignment(self) -> PlannedStage:
        config, trained = self.config.align, self.config.align.vision_training
        num_groups = max(1, len({record.group_id for record in self.train}))
        num_held_out = count_held_out(num_groups, config.held_out_ratio)
        num_items = round(len(self.train) * (1 - num_held_out / num_groups))
        batch_size = choose_batch_size(config, num_items, 1)
        num_steps = count_steps(config, num_items, batch_size)
        num_bytes = self._count_model_bytes(self.config.build.dtype)
        if trained == "full":
            num_bytes += _NUM_CHECKPOINTS * _ADAM_BYTES * self.vision.num_parameters
        return PlannedStage(
            "align",
            f"{counted(num_steps, 'step')} of {counted(batch_size, 'image')}, vision tower "
            f"{trained}",
            self.paths.aligned / "model",
            _find_state(self.paths.aligned / "model", run=self.paths.aligned),
            num_bytes=num_bytes,
        )

    def _count_model_bytes(self, dtype: str | None) -> float:
        num_parameters = self.text.num_parameters + self.vision.num_parameters
        return num_parameters * _BYTES[dtype or self.config.build.dtype]


def _count_images(records: Sequence[CaptionedImage]) -> int:
    return len({record.name for record in records})


def is_complete(folder: Path) -> bool:
    """Tell whether a folder is there that is written under another name and renamed."""
    return folder.is_dir() and any(folder.iterdir())


def is_complete_store(store: Path) -> bool:
    return (store / MANIFEST_FILE).is_file() and StoreManifest.read(store).complete


def _find_state(folder: Path, *, run: Path | None = None) -> State:
    if is_complete(folder):
        return "finished"
    return "stopped" if run is not None and (run / RUN_FILE).is_file() else "to do"
