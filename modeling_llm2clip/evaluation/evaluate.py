"""Evaluates models: reads and checks everything first, then loads one model after the other.

The order is: options, datasets with all their errors, types and configurations of the models,
results that exist already; only then weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from .._extras import require
from ..configs.evaluation_config import EvaluatedDataset, EvaluatedModel, EvaluationConfig
from ..data.atomic_files import require_writable
from ..data.records.records import CaptionedImage
from ..encoding.devices import find_device
from .datasets.dataset_registry import DatasetSource, find_languages, load_dataset, resolve_dataset
from .datasets.dataset_spec import DatasetSpec, ReadingCache, read_lines
from .encoders.auto import load_encoder
from .encoders.encoder import EncoderDescription, EvaluationEncoder
from .report import EvaluationResults
from .results import Result, build_protocol, find_finished, find_result_file, write_result
from .tasks.task import Datasets, Task
from .tasks.task_registry import DEFAULT_TASKS, find_task

ModelSource: TypeAlias = str | Path | EvaluatedModel
DataSource: TypeAlias = DatasetSource | EvaluatedDataset


def evaluate(
    models: ModelSource | Sequence[ModelSource],
    data: DataSource | Sequence[DataSource],
    config: EvaluationConfig | None = None,
    *,
    tasks: Sequence[str] = (),
    on_result: Callable[[Result], object] | None = None,
) -> EvaluationResults:
    """Run every task that suits a dataset for every model; finished results are not repeated.

    Args:
        models: One or several: folder, Hub id, or an `EvaluatedModel`, which has
            further options. Models of one name are refused.
        data: One or several: name of a dataset, as `NAME=FOLDER` if it needs a folder; a folder of
            captioned images; records; or an `EvaluatedDataset`.
        config: How datasets are read, models run and scores computed.
        tasks: Names of tasks. Default: the task of each dataset's type.
        on_result: Called with each result as soon as it is available.

    Returns:
        All results, which print as a table; each is also a JSON file in `config.output`.

    Raises:
        DataValidationError: A dataset has invalid samples.
        ValueError: Before any model is loaded: a task suits no dataset, a model's type cannot be
            detected, a model takes no images and a task has them, or the output folder has results
            of another run.
        OSError: `config.output` cannot be written, before any model is loaded.
        MissingExtraError: An optional package is not installed.

    Examples:
        >>> test = load_records("my-images")
        >>> results = evaluate("my-model", test, tasks=["retrieval"])
        >>> results = evaluate("my-model", "emoji", tasks=["cross-lingual"])  # doctest: +SKIP
        >>> models = ["my-model", "openai/clip-vit-base-patch16"]
        >>> print(evaluate(models, "coco=my-coco"))  # doctest: +SKIP
    """
    config = config or EvaluationConfig()
    find_device(config.device)  # raises for one that does not exist, before anything is read
    chosen = _list_models(models)
    for model in chosen:
        if not (folder := config.output / model.name).is_dir():
            require_writable(folder)
    jobs = _read_jobs(data, tasks, config)
    encoders = {model.name: load_encoder(model, config) for model in chosen}
    descriptions = {name: encoder.description for name, encoder in encoders.items()}
    for job in jobs:
        for description in descriptions.values():
            _require_abilities(description, job)
    planned = {
        name: [
            Result(
                model=name,
                task=job.task.name,
                dataset=job.dataset,
                protocol=build_protocol(job.task, job.datasets, description),
                fingerprint=description.fingerprint,
            )
            for job in jobs
        ]
        for name, description in descriptions.items()
    }
    finished = find_finished(config.output, chain(*planned.values()))
    for name, plans in planned.items():
        if not all(find_result_file(config.output, plan) in finished for plan in plans):
            require_writable(config.output / name)
    results: dict[str, list[Result]] = {name: [] for name in encoders}
    # Stored embeddings first: a missing one is reported before any model is loaded.
    for name in sorted(encoders, key=lambda name: descriptions[name].model_type != "embeddings"):
        encoder = encoders.pop(name)  # so that a model is freed after its turn
        for job, plan in zip(jobs, planned[name], strict=True):
            file = find_result_file(config.output, plan)
            result = finished.get(file) or _run(encoder, job, plan, file)
            results[name].append(result)
            if on_result is not None:
                on_result(result)
    return EvaluationResults(chain(*results.values()))


def check_data(
    data: DataSource | Sequence[DataSource],
    config: EvaluationConfig | None = None,
    *,
    tasks: Sequence[str] = (),
) -> None:
    """Read and check the datasets of an evaluation, for a model that is yet to be trained."""
    _read_jobs(data, tasks, config or EvaluationConfig())


@dataclass(frozen=True)
class _Source:
    """A dataset that is not read yet."""

    spec: DatasetSpec
    folder: str | Path | None
    image_dir: str | Path | None


@dataclass(frozen=True)
class _Job:
    """One task on one dataset, which was read once per language."""

    task: Task
    dataset: str
    datasets: Datasets


def _list_models(models: ModelSource | Sequence[ModelSource]) -> list[EvaluatedModel]:
    several = [models] if isinstance(models, str | Path | EvaluatedModel) else list(models)
    chosen = [
        model if isinstance(model, EvaluatedModel) else EvaluatedModel(source=str(model))
        for model in several
    ]
    names = [model.name for model in chosen]
    if not chosen:
        raise ValueError("Got no models to evaluate; give at least one.")
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two models have one name, and their results would be mixed up: {', '.join(names)}. "
            "Name them: NAME=SOURCE, or EvaluatedModel(source=…, name=…)."
        )
    return chosen


def _list_datasets(data: DataSource | Sequence[DataSource]) -> list[_Source]:
    several: Any = data
    is_records = isinstance(data, Sequence) and data and isinstance(data[0], CaptionedImage)
    if isinstance(data, str | Path | DatasetSpec | EvaluatedDataset) or is_records:
        several = [data]
    found = []
    for item in several:
        spec, folder = resolve_dataset(item)
        image_dir = item.image_dir if isinstance(item, EvaluatedDataset) else None
        found.append(_Source(spec, folder, image_dir))
    names = [source.spec.name for source in found]
    if not found:
        raise ValueError("Got no datasets to evaluate on; give at least one.")
    same = [source for source in found if names.count(source.spec.name) > 1]
    if same:
        listed = ", ".join(f"{one.spec.name} ({one.folder or 'records'})" for one in same)
        raise ValueError(
            f"Two datasets have one name, and their results would be mixed up: {listed}. Give your "
            "own images names of their own (NAME=FOLDER); evaluate on others in two runs, with two "
            "output folders."
        )
    return found


def _read_jobs(
    data: DataSource | Sequence[DataSource], names: Sequence[str], config: EvaluationConfig
) -> list[_Job]:
    sources = _list_datasets(data)
    if len(set(names)) < len(names):
        raise ValueError(f"tasks has a name twice: {', '.join(names)}. Give each once.")
    tasks = [find_task(name) for name in names]
    config = _read_prompt_files(config)
    chosen = {
        source.spec.name: [
            task
            for task in tasks or [DEFAULT_TASKS[source.spec.dataset_type]]
            if source.spec.dataset_type in task.dataset_types
        ]
        for source in sources
    }
    used = {task.name for of_dataset in chosen.values() for task in of_dataset}
    if idle := {task.name: task.dataset_types for task in tasks if task.name not in used}:
        wanted = "; ".join(f"{name} ({' or '.join(types)})" for name, types in idle.items())
        raise ValueError(f"None of the datasets has the type that a task takes: {wanted}.")
    if unused := [name for name, of_dataset in chosen.items() if not of_dataset]:
        raise ValueError(
            f"None of the tasks {', '.join(names)} suits the datasets {', '.join(unused)}."
        )
    require(*(need for of_dataset in chosen.values() for task in of_dataset for need in task.needs))
    _refuse_unused(sources, config)
    jobs = []
    for source in sources:
        cache = ReadingCache(keeps_indexes=config.cache)
        read: dict[tuple[bool, bool], Datasets] = {}
        for task in chosen[source.spec.name]:
            how = (task.all_languages, _wants_images(task, source, config))
            if how not in read:
                read[how] = _read_datasets(source, task, config, cache, require_images=how[1])
            task.check(read[how])
            jobs.append(_Job(task, source.spec.name, read[how]))
    return jobs


def _read_prompt_files(config: EvaluationConfig) -> EvaluationConfig:
    """Replace files of class names and templates by their lines."""
    read: dict[str, Any] = {}
    for name in ("class_names", "templates"):
        file = getattr(config, name)
        if isinstance(file, Path):
            if not file.is_file():
                raise ValueError(f"{name}={file} is not a text file. Correct the path.")
            read[name] = tuple(line.strip() for line in read_lines(file) if line.strip())
    return replace(config, **read)


def _refuse_unused(sources: Sequence[_Source], config: EvaluationConfig) -> None:
    """Raise ValueError for options that only a classification takes, if there is none."""
    types = {source.spec.name: source.spec.dataset_type for source in sources}
    names = ("class_names", "templates", "allow_repeated_class_names")
    given = [f"`{name}`" for name in names if getattr(config, name) not in (None, False)]
    if given and "classification" not in types.values():
        listed = ", ".join(f"{name} ({of_dataset})" for name, of_dataset in types.items())
        raise ValueError(
            f"{', '.join(given)} is only for classification, and the datasets are {listed}. Leave "
            "it out."
        )


def _wants_images(task: Task, source: _Source, config: EvaluationConfig) -> bool:
    if task.needs_images and config.captions_only:
        raise ValueError(f"{task.name} needs images. Leave captions_only=True out.")
    is_without = config.captions_only or source.spec.dataset_type == "captions"
    return not is_without and task.needs_images is not False


def _read_datasets(
    source: _Source,
    task: Task,
    config: EvaluationConfig,
    cache: ReadingCache,
    *,
    require_images: bool,
) -> Datasets:
    shared: dict[str, Any] = {
        "image_dir": source.image_dir,
        "require_images": require_images,
        "ignore_fields": config.ignore_fields,
        "cache": cache,
    }
    languages = config.languages or find_languages(source.spec, source.folder, **shared)
    if len(languages) > 1 and not task.all_languages:
        listed = ", ".join(languages)
        if config.languages:
            raise ValueError(
                f"The task {task.name} takes one language at a time, got {listed}. Run it once for "
                "each, or take cross-lingual."
            )
        raise ValueError(
            f"{source.spec.name} has several languages ({listed}), and {task.name} takes one: "
            f"languages={languages[0]}. The task cross-lingual takes all."
        )
    is_classification = source.spec.dataset_type == "classification"
    assert not isinstance(config.class_names, Path) and not isinstance(config.templates, Path)
    return tuple(
        load_dataset(
            source.spec,
            source.folder,
            lang=lang,
            skip_invalid=config.skip_invalid,
            check_images=config.check_images,
            class_names=config.class_names if is_classification else None,
            templates=config.templates if is_classification else None,
            allow_repeated_class_names=config.allow_repeated_class_names,
            allow_distractors=config.allow_distractors,
            show_progress=config.show_progress,
            **shared,
        )
        for lang in languages or (None,)
    )


def _require_abilities(description: EncoderDescription, job: _Job) -> None:
    lacking = [] if description.text is not None else ["texts"]
    if job.datasets[0].has_images and job.task.needs_images is not False:
        lacking += [] if description.images is not None else ["images"]
    if lacking:
        raise ValueError(
            f"{description.source} encodes no {' and no '.join(lacking)}, which "
            f"{job.task.name} on {job.dataset} needs. Leave out one of them."
        )


def _run(encoder: EvaluationEncoder, job: _Job, planned: Result, file: Path) -> Result:
    before = dict(encoder.encoded)
    started = time.monotonic()
    try:
        found = job.task.run(encoder, job.datasets)
    except ValueError as error:
        where = f"{planned.model}, {planned.task} on {planned.dataset}"
        raise ValueError(f"{where}: {error}") from error
    seconds = time.monotonic() - started
    far = encoder.take_far_images()
    description = encoder.description
    result = replace(
        planned,
        scores=dict(found.scores),
        counts=dict(found.counts),
        run={
            **description.run,
            "model": description.source,
            "encoded": {what: count - before[what] for what, count in encoder.encoded.items()},
            **({} if far is None else {"far_images": far}),
        },
        seconds=round(seconds, 2),
    )
    write_result(file, result)
    return result
