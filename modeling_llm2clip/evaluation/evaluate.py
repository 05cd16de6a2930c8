"""Evaluate models: read and check everything first, then load one model at a time.

The checks run in this order: options, datasets (reporting all errors at once), the models' types
and configurations, and existing results. Weights are loaded last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from .._extras import require
from ..configs.evaluation_config import EvaluatedDataset, EvaluatedModel, EvaluationConfig
from ..data.atomic_files import require_writable
from ..data.images.image_sources import UnreadableImagesError
from ..data.records.records import CaptionedImage
from ..encoding.devices import find_device
from .datasets.dataset_registry import DatasetSource, find_languages, load_dataset, resolve_dataset
from .datasets.dataset_spec import DatasetSpec, ReadingCache, read_lines
from .encoders.auto import load_encoder
from .encoders.encoder import EvaluationEncoder
from .report import EvaluationResults
from .results import Result, build_protocol, find_finished, find_result_file, write_result
from .tasks.task import Datasets, Task
from .tasks.task_registry import DEFAULT_TASKS, find_task

ModelSource: TypeAlias = str | Path | EvaluatedModel
DataSource: TypeAlias = DatasetSource | EvaluatedDataset
_CLASS_OPTIONS = ("class_names", "templates")  # only for classification


def evaluate(
    models: ModelSource | Sequence[ModelSource],
    data: DataSource | Sequence[DataSource],
    config: EvaluationConfig | None = None,
    *,
    tasks: Sequence[str] = (),
    on_result: Callable[[Result], object] | None = None,
) -> EvaluationResults:
    """Run every applicable task on every dataset and model; existing results are reused.

    Args:
        models: One or several models: folder, Hub id, or `EvaluatedModel`, which has more options.
            Their names must differ.
        data: One or several datasets: name, `NAME=FOLDER` if the dataset needs a folder, a folder
            of captioned images, records, or an `EvaluatedDataset`.
        config: How to read datasets, run models and compute scores.
        tasks: Names of tasks. Default: the task for each dataset's type.
        on_result: Called with each result as soon as it is available.

    Returns:
        All results, which print as a table; each is also saved as a JSON file in `config.output`.

    Raises:
        DataValidationError: A dataset has invalid samples. By default, a broken image is found when
            a model encodes it; the error then lists all broken images of the run.
        ValueError: A task does not apply to any dataset, a model's type cannot be detected, a model
            does not support images that a task needs, or the output folder has results from a
            different run. Raised before any model is loaded.
        OSError: `config.output` is not writable. Raised before any model is loaded.
        MissingExtraError: An optional package is not installed.

    Examples:
        >>> test = load_records("my-images")
        >>> results = evaluate("my-model", test, tasks=["retrieval"])
        >>> results = evaluate("my-model", "emoji", tasks=["cross-lingual"])  # doctest: +SKIP
        >>> models = ["my-model", "openai/clip-vit-base-patch16"]
        >>> print(evaluate(models, "coco=my-coco"))  # doctest: +SKIP
    """
    config = config or EvaluationConfig()
    find_device(config.device, precision=config.dtype)  # fail on a missing device before reading
    chosen = _list_models(models)
    for model in chosen:
        if not (folder := config.output / model.name).is_dir():
            require_writable(folder)
    jobs = _read_jobs(data, tasks, config)
    encoders = {model.name: load_encoder(model, config) for model in chosen}
    planned = {name: [_plan(name, encoder, job) for job in jobs]
               for name, encoder in encoders.items()}  # fmt: skip
    finished = find_finished(config.output, chain(*planned.values()))
    for name, plans in planned.items():
        if not all(find_result_file(config.output, plan) in finished for plan in plans):
            require_writable(config.output / name)
    results: dict[str, list[Result]] = {name: [] for name in encoders}
    # Stored embeddings first: a missing one is reported before any model is loaded.
    for name in sorted(encoders, key=lambda n: encoders[n].description.model_type != "embeddings"):
        encoder = encoders.pop(name)  # frees the model after its turn
        for job, plan in zip(jobs, planned[name], strict=True):
            file = find_result_file(config.output, plan)
            try:
                result = finished.get(file) or _run(encoder, job, plan, file)
            except ValueError as error:
                if isinstance(error.__cause__, UnreadableImagesError):
                    check_eval_data(data, config, tasks=tasks)  # reports every broken image
                raise
            results[name].append(result)
            if on_result is not None:
                on_result(result)
    return EvaluationResults(chain(*results.values()))


def check_eval_data(
    data: DataSource | Sequence[DataSource],
    config: EvaluationConfig | None = None,
    *,
    tasks: Sequence[str] = (),
) -> None:
    """Read and check evaluation datasets, for example before a model is trained."""
    _read_jobs(data, tasks, config or EvaluationConfig(), check_images=True)


class _Source(NamedTuple):
    """A dataset that has not been read yet."""

    spec: DatasetSpec
    folder: str | Path | None
    image_dir: str | Path | None


class _Job(NamedTuple):
    """One task to run on one dataset, which is loaded separately for each language."""

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
        raise ValueError("Got no models to evaluate. Pass at least one.")
    if len(set(names)) < len(names):
        raise ValueError(
            f"Models must have different names to keep their results apart: {', '.join(names)}. "
            "Name them with NAME=SOURCE, or EvaluatedModel(source=…, name=…)."
        )
    return chosen


def _list_datasets(data: DataSource | Sequence[DataSource]) -> list[_Source]:
    several: Any = data
    is_records = isinstance(data, Sequence) and data and isinstance(data[0], CaptionedImage)
    if isinstance(data, str | Path | DatasetSpec | EvaluatedDataset) or is_records:
        several = [data]
    sources = [
        _Source(*resolve_dataset(item), getattr(item, "image_dir", None)) for item in several
    ]
    if not sources:
        raise ValueError("Got no datasets to evaluate on. Pass at least one.")
    names = [source.spec.name for source in sources]
    if same := [source for source in sources if names.count(source.spec.name) > 1]:
        listed = ", ".join(f"{source.spec.name} ({source.folder or 'records'})" for source in same)
        raise ValueError(
            f"Datasets must have different names to keep their results apart: {listed}. Name your "
            "own images with NAME=FOLDER; for other datasets, use separate runs with separate "
            "output folders."
        )
    return sources


def _read_jobs(
    data: DataSource | Sequence[DataSource],
    names: Sequence[str],
    config: EvaluationConfig,
    *,
    check_images: bool | None = None,
) -> list[_Job]:
    sources = _list_datasets(data)
    tasks = [find_task(name) for name in dict.fromkeys(names)]
    config = _read_prompt_files(config)
    chosen = [
        (source, task)
        for source in sources
        for task in tasks or [DEFAULT_TASKS[source.spec.dataset_type]]
        if source.spec.dataset_type in task.dataset_types
    ]
    if idle := [task for task in tasks if task not in (used for _, used in chosen)]:
        listed = "; ".join(f"{task.name} ({' or '.join(task.dataset_types)})" for task in idle)
        raise ValueError(f"No dataset has the type required by these tasks: {listed}.")
    types = {source.spec.name: source.spec.dataset_type for source in sources}
    if unused := types.keys() - {source.spec.name for source, _ in chosen}:
        raise ValueError(
            f"None of the tasks {', '.join(names)} can run on the datasets "
            f"{', '.join(sorted(unused))}."
        )
    class_options = [f"`{name}`" for name in _CLASS_OPTIONS if getattr(config, name) is not None]
    if class_options and "classification" not in types.values():
        raise ValueError(
            f"{', '.join(class_options)} is only for classification, but the datasets are "
            f"{', '.join(f'{name} ({kind})' for name, kind in types.items())}. Leave it out."
        )
    require(*(need for _, task in chosen for need in task.needs))
    jobs = []
    read: dict[tuple[str, bool, bool], Datasets] = {}
    caches = {name: ReadingCache() for name in types}
    for source, task in chosen:
        name, images = source.spec.name, _wants_images(task, source, config)
        if (how := (name, task.all_languages, images)) not in read:
            read[how] = _read_datasets(
                source, task, config, caches[name], require_images=images, check_images=check_images
            )
        task.check(read[how])
        jobs.append(_Job(task, name, read[how]))
    return jobs


def _read_prompt_files(config: EvaluationConfig) -> EvaluationConfig:
    """Replace files of class names and templates with their lines."""
    read: dict[str, Any] = {}
    for name in _CLASS_OPTIONS:
        file = getattr(config, name)
        if isinstance(file, Path):
            if not file.is_file():
                raise ValueError(f"{name}={file} is not a text file. Correct the path.")
            read[name] = tuple(line.strip() for line in read_lines(file) if line.strip())
    return replace(config, **read)


def _wants_images(task: Task, source: _Source, config: EvaluationConfig) -> bool:
    if task.needs_images and config.captions_only:
        raise ValueError(f"{task.name} needs images. Leave out captions_only=True.")
    text_only = config.captions_only or source.spec.dataset_type == "captions"
    return not text_only and task.needs_images is not False


def _read_datasets(
    source: _Source,
    task: Task,
    config: EvaluationConfig,
    cache: ReadingCache,
    *,
    require_images: bool,
    check_images: bool | None,
) -> Datasets:
    shared: dict[str, Any] = {
        "image_dir": source.image_dir,
        "require_images": require_images,
        "ignore_fields": config.ignore_fields,
        "caption_fields": config.caption_fields,
        "cache": cache,
    }
    languages = config.languages or find_languages(source.spec, source.folder, **shared)
    if len(languages) > 1 and not task.all_languages:
        raise ValueError(
            f"{task.name} takes one language at a time, but got {', '.join(languages)} for "
            f"{source.spec.name}. Choose one, such as languages={languages[0]}, or use the "
            "cross-lingual task."
        )
    is_classification = source.spec.dataset_type == "classification"
    assert not isinstance(config.class_names, Path) and not isinstance(config.templates, Path)
    return tuple(
        load_dataset(
            source.spec,
            source.folder,
            lang=lang,
            skip_invalid=config.skip_invalid,
            check_images=check_images,
            class_names=config.class_names if is_classification else None,
            templates=config.templates if is_classification else None,
            show_progress=config.show_progress,
            **shared,
        )
        for lang in languages or (None,)
    )


def _plan(name: str, encoder: EvaluationEncoder, job: _Job) -> Result:
    """Plan a result; raise ValueError if the model lacks a modality that the job needs."""
    description = encoder.description
    missing = [] if description.text is not None else ["texts"]
    if job.datasets[0].has_images and job.task.needs_images is not False:
        missing += [] if description.images is not None else ["images"]
    if missing:
        raise ValueError(
            f"{description.source} cannot encode {' and '.join(missing)}, which {job.task.name} on "
            f"{job.dataset} needs. Leave out the model or the task."
        )
    return Result(
        model=name,
        task=job.task.name,
        dataset=job.dataset,
        protocol=build_protocol(job.task, job.datasets, description),
        fingerprint=description.fingerprint,
    )


def _run(encoder: EvaluationEncoder, job: _Job, planned: Result, file: Path) -> Result:
    before = dict(encoder.encoded)
    started = time.monotonic()
    try:
        measured = job.task.run(encoder, job.datasets)
    except ValueError as error:
        where = f"{planned.model}, {planned.task} on {planned.dataset}"
        raise ValueError(f"{where}: {error}") from error
    seconds = time.monotonic() - started
    far = encoder.take_far_images()
    description = encoder.description
    result = replace(
        planned,
        scores=dict(measured.scores),
        counts=dict(measured.counts),
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
