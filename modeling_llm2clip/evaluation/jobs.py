"""Which task runs on which set, and the sets themselves, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._extras import require
from .arguments import EvaluatedDataset, EvaluationArguments
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


def read_jobs(arguments: EvaluationArguments) -> list[Job]:
    """Choose the tasks of every set, and read it as they want it.

    Raises: ValueError for a task without a set or a set without a task; DataValidationError.
        MissingExtraError for a task whose optional package is not installed.
    """
    chosen = {data.name: _tasks_for(data, arguments.tasks) for data in arguments.data}
    used = {task.name for tasks in chosen.values() for task in tasks}
    if idle := [task for task in arguments.tasks if task not in used]:
        kinds = {task: find_task(task).kinds for task in idle}
        raise ValueError(f"No set suits these tasks, which take sets of a kind: {kinds}.")
    if idle := [name for name, tasks in chosen.items() if not tasks]:
        raise ValueError(f"None of the tasks {list(arguments.tasks)} suits the sets {idle}.")
    require(*(need for tasks in chosen.values() for task in tasks for need in task.needs))
    _refuse_unused(arguments)
    jobs = []
    for data in arguments.data:
        cache = ReadingCache()
        read: dict[tuple[bool, bool], tuple[EvaluationSet, ...]] = {}
        for task in chosen[data.name]:
            key = (task.languages, _wants_images(task, data, arguments))
            if key not in read:
                read[key] = _read_datasets(data, task, arguments, cache)
            task.check(read[key])
            jobs.append(Job(task, data.name, read[key]))
    return jobs


def _refuse_unused(arguments: EvaluationArguments) -> None:
    """Raise ValueError for what only a classification takes, where there is none."""
    kinds = {data.name: find_dataset(data.name).kind for data in arguments.data}
    of_classification = {
        "class_names": arguments.class_names is not None,
        "templates": arguments.templates is not None,
        "allow_repeated_class_names": arguments.allow_repeated_class_names,
    }
    given = [name for name, is_given in of_classification.items() if is_given]
    if given and "classification" not in kinds.values():
        raise ValueError(
            f"{given} is for a classification, and the sets are {kinds}. Leave it out."
        )


def _tasks_for(data: EvaluatedDataset, names: Sequence[str]) -> list[Task]:
    kind = find_dataset(data.name).kind
    wanted = names or [_DEFAULT_TASKS[kind]]
    return [task for task in map(find_task, wanted) if kind in task.kinds]


def _wants_images(task: Task, data: EvaluatedDataset, arguments: EvaluationArguments) -> bool:
    if task.needs_images and arguments.captions_only:
        raise ValueError(f"{task.name} needs images. Leave out captions_only (--captions-only).")
    is_without = arguments.captions_only or find_dataset(data.name).kind == "captions"
    return not is_without and task.needs_images is not False


def _read_datasets(
    data: EvaluatedDataset, task: Task, arguments: EvaluationArguments, cache: ReadingCache
) -> tuple[EvaluationSet, ...]:
    languages: tuple[str | None, ...] = arguments.languages or (None,)
    if task.languages and not arguments.languages:
        languages = find_languages(
            data.name,
            data.folder,
            image_dir=data.image_dir,
            require_images=_wants_images(task, data, arguments),
            ignore_fields=arguments.ignore_fields,
            cache=cache,
        )
    if not task.languages and len(languages) > 1:
        raise ValueError(
            f"The task {task.name} takes one language at a time, got {list(languages)}. Run it "
            "once for each, or take cross-lingual."
        )
    is_classification = find_dataset(data.name).kind == "classification"
    return tuple(
        load_dataset(
            data.name,
            data.folder,
            image_dir=data.image_dir,
            lang=lang,
            skip_invalid=arguments.skip_invalid,
            require_images=_wants_images(task, data, arguments),
            check_images=arguments.check_images,
            class_names=arguments.class_names if is_classification else None,
            templates=arguments.templates if is_classification else None,
            allow_repeated_class_names=arguments.allow_repeated_class_names,
            ignore_fields=arguments.ignore_fields,
            show_progress=arguments.encoder.show_progress,
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
