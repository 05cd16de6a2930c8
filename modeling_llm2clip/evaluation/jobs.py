"""Which task runs on which set, and the sets themselves, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._extras import require
from .arguments import DataChoice, EvaluationArguments
from .encoders.encoder import Description
from .sets.intake import ReadingCache
from .sets.registry import find_languages, find_set, read_set
from .sets.schema import ChoiceSet, EvaluationSet
from .tasks.registry import find_task
from .tasks.task import Task

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

    Raises: ValueError for a task without a set or a set without a task; DataFaults.
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
            key = (task.languages, _wants_pictures(task, data, arguments))
            if key not in read:
                read[key] = _read_sets(data, task, arguments, cache)
            task.check(read[key])
            jobs.append(Job(task, data.name, read[key]))
    return jobs


def _refuse_unused(arguments: EvaluationArguments) -> None:
    """Raise ValueError for what only a classification takes, where there is none."""
    kinds = {data.name: find_set(data.name).kind for data in arguments.data}
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


def _tasks_for(data: DataChoice, names: Sequence[str]) -> list[Task]:
    kind = find_set(data.name).kind
    wanted = names or [_DEFAULT_TASKS[kind]]
    return [task for task in map(find_task, wanted) if kind in task.kinds]


def _wants_pictures(task: Task, data: DataChoice, arguments: EvaluationArguments) -> bool:
    if task.needs_pictures and arguments.captions_only:
        raise ValueError(f"{task.name} needs pictures. Leave out captions_only (--captions-only).")
    is_without = arguments.captions_only or find_set(data.name).kind == "captions"
    return not is_without and task.needs_pictures is not False


def _read_sets(
    data: DataChoice, task: Task, arguments: EvaluationArguments, cache: ReadingCache
) -> tuple[EvaluationSet, ...]:
    languages: tuple[str | None, ...] = arguments.languages or (None,)
    if task.languages and not arguments.languages:
        languages = find_languages(
            data.name,
            data.folder,
            images=data.images,
            require_pictures=_wants_pictures(task, data, arguments),
            ignored_fields=arguments.ignored_fields,
            cache=cache,
        )
    if not task.languages and len(languages) > 1:
        raise ValueError(
            f"The task {task.name} takes one language at a time, got {list(languages)}. Run it "
            "once for each, or take cross-lingual."
        )
    is_classification = find_set(data.name).kind == "classification"
    return tuple(
        read_set(
            data.name,
            data.folder,
            images=data.images,
            lang=lang,
            exclude_faults=arguments.exclude_faults,
            require_pictures=_wants_pictures(task, data, arguments),
            check_pictures=arguments.check_pictures,
            class_names=arguments.class_names if is_classification else None,
            templates=arguments.templates if is_classification else None,
            allow_repeated_class_names=arguments.allow_repeated_class_names,
            ignored_fields=arguments.ignored_fields,
            show_progress=arguments.encoder.show_progress,
            cache=cache,
        )
        for lang in languages
    )


def require_abilities(description: Description, job: Job) -> None:
    """Raise ValueError when a model does not encode what a job shows it."""
    first = job.sets[0]
    if isinstance(first, ChoiceSet):
        shows_pictures = first.form != "text"
    else:
        shows_pictures = bool(first.pictures)
    if job.task.needs_pictures is False:
        shows_pictures = False
    lacking = [
        side
        for side, settings, needed in (
            ("texts", description.text, True),
            ("pictures", description.pictures, shows_pictures),
        )
        if needed and settings is None
    ]
    if lacking:
        raise ValueError(
            f"{description.source} encodes no {' and no '.join(lacking)}, which "
            f"{job.task.name} on {job.set_name} needs. Leave out one of them."
        )
