"""Which task runs on which set, and the sets themselves, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .._extras import require
from ..configs.evaluation_config import EvaluatedDataset, EvaluationConfig
from .datasets.dataset_registry import find_dataset, find_languages, load_dataset
from .datasets.schema import ChoiceDataset, EvaluationSet
from .datasets.validation import ReadingCache
from .encoders.encoder import EncoderDescription
from .tasks.task import Task
from .tasks.task_registry import find_task

_DEFAULT_TASKS = {
    "retrieval": "retrieval", "captions": "cra", "classification": "classification",
    "choice": "choices",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One task on one set."""

    task: Task
    set_name: str
    sets: tuple[EvaluationSet, ...]


def read_jobs(
    data: Sequence[EvaluatedDataset], names: Sequence[str], config: EvaluationConfig
) -> list[Job]:
    """Choose the tasks of every set, and read it as they want it.

    Raises: ValueError for a task without a set or a set without a task; DataValidationError.
        MissingExtraError for a task whose optional package is not installed.
    """
    chosen = {dataset.name: _tasks_for(dataset, names) for dataset in data}
    used = {task.name for tasks in chosen.values() for task in tasks}
    if idle := [task for task in names if task not in used]:
        kinds = {task: find_task(task).kinds for task in idle}
        raise ValueError(f"No set suits these tasks, which take sets of a kind: {kinds}.")
    if idle := [name for name, tasks in chosen.items() if not tasks]:
        raise ValueError(f"None of the tasks {list(names)} suits the sets {idle}.")
    require(*(need for tasks in chosen.values() for task in tasks for need in task.needs))
    _refuse_unused(data, config)
    jobs = []
    for dataset in data:
        cache = ReadingCache()
        read: dict[tuple[bool, bool], tuple[EvaluationSet, ...]] = {}
        for task in chosen[dataset.name]:
            key = (task.languages, _wants_images(task, dataset, config))
            if key not in read:
                read[key] = _read_datasets(dataset, task, config, cache)
            task.check(read[key])
            jobs.append(Job(task, dataset.name, read[key]))
    return jobs


def _refuse_unused(data: Sequence[EvaluatedDataset], config: EvaluationConfig) -> None:
    """Raise ValueError for what only a classification takes, where there is none."""
    kinds = {dataset.name: find_dataset(dataset.name).kind for dataset in data}
    of_classification = {
        "class_names": config.class_names is not None,
        "templates": config.templates is not None,
        "allow_repeated_class_names": config.allow_repeated_class_names,
    }
    given = [f"`{name}`" for name, is_given in of_classification.items() if is_given]
    if given and "classification" not in kinds.values():
        raise ValueError(
            f"{', '.join(given)} is for a classification, and the datasets are {kinds}. Leave it "
            "out."
        )


def _tasks_for(data: EvaluatedDataset, names: Sequence[str]) -> list[Task]:
    kind = find_dataset(data.name).kind
    wanted = names or [_DEFAULT_TASKS[kind]]
    return [task for task in map(find_task, wanted) if kind in task.kinds]


def _wants_images(task: Task, data: EvaluatedDataset, config: EvaluationConfig) -> bool:
    if task.needs_images and config.captions_only:
        raise ValueError(f"{task.name} needs images. Leave out captions_only (--captions-only).")
    is_without = config.captions_only or find_dataset(data.name).kind == "captions"
    return not is_without and task.needs_images is not False


def _read_datasets(
    data: EvaluatedDataset, task: Task, config: EvaluationConfig, cache: ReadingCache
) -> tuple[EvaluationSet, ...]:
    languages: tuple[str | None, ...] = config.languages or (None,)
    if task.languages and not config.languages:
        languages = find_languages(
            data.name,
            data.folder,
            image_dir=data.image_dir,
            require_images=_wants_images(task, data, config),
            ignore_fields=config.ignore_fields,
            cache=cache,
        )
    if not task.languages and len(languages) > 1:
        raise ValueError(
            f"The task {task.name} takes one language at a time, got {list(languages)}. Run it "
            "once for each, or take cross-lingual."
        )
    is_classification = find_dataset(data.name).kind == "classification"
    assert not isinstance(config.class_names, Path) and not isinstance(config.templates, Path)
    return tuple(
        load_dataset(
            data.name,
            data.folder,
            image_dir=data.image_dir,
            lang=lang,
            skip_invalid=config.skip_invalid,
            require_images=_wants_images(task, data, config),
            check_images=config.check_images,
            class_names=config.class_names if is_classification else None,
            templates=config.templates if is_classification else None,
            allow_repeated_class_names=config.allow_repeated_class_names,
            ignore_fields=config.ignore_fields,
            show_progress=config.show_progress,
            cache=cache,
        )
        for lang in languages
    )


def require_abilities(description: EncoderDescription, job: Job) -> None:
    """Raise ValueError when a model does not encode what a job shows it."""
    first = job.sets[0]
    if isinstance(first, ChoiceDataset):
        shows_images = first.form != "text"
    else:
        shows_images = bool(first.images)
    if job.task.needs_images is False:
        shows_images = False
    lacking = [
        side
        for side, settings, needed in (
            ("texts", description.text, True),
            ("images", description.images, shows_images),
        )
        if needed and settings is None
    ]
    if lacking:
        raise ValueError(
            f"{description.source} encodes no {' and no '.join(lacking)}, which "
            f"{job.task.name} on {job.set_name} needs. Leave out one of them."
        )
