"""Evaluates models: reads and checks everything first, then loads one model after the other.

Order: settings, data sets with every fault, kinds and configurations of the models, results that
are there already; only then weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.captioned_sources import read_captioned
from ..data.pictures import Picture
from .encoders.encoder import Description, Encoder, EncoderSettings
from .encoders.kinds import KINDS, open_encoder
from .encoders.remembering import RememberingEncoder
from .results import (
    Result,
    build_protocol,
    find_finished,
    list_versions,
    result_file,
    write_result,
)
from .sets.registry import find_languages, find_set, read_set
from .sets.schema import ChoiceSet, EvaluationSet
from .tasks.registry import find_task
from .tasks.task import Task

_DEFAULT_TASKS = {
    "retrieval": "retrieval", "captions": "cra", "classification": "classification",
    "choice": "choices",
}  # fmt: skip


@dataclass(frozen=True)
class ModelChoice:
    """One model to evaluate.

    Attributes:
        source: folder, Hub id, or weights file.
        name: in tables and as the folder of its results; default: the last part of the source.
        kind, revision, architecture, head: as `open_encoder` takes them.
        extracted_from: the captioned data that stores were extracted from.
    """

    source: str
    name: str = ""
    kind: str | None = None
    revision: str | None = None
    architecture: str | None = None
    head: str | None = None
    extracted_from: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", Path(self.source).name)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"{self.source!r} gives no name for tables and folders: {self.name!r}. Name it: "
                f"NAME={self.source}."
            )
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"No kind is called {self.kind!r}; known are {list(KINDS)}.")


@dataclass(frozen=True)
class DataChoice:
    """One set to evaluate on.

    Attributes:
        name: in the registry.
        folder: where its files are; None for an embedded one.
        images: folder of the pictures where they lie apart.
    """

    name: str
    folder: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        find_set(self.name)


@dataclass(frozen=True)
class EvaluationArguments:
    """What is evaluated on what.

    Attributes:
        models: at least one, of different names.
        data: at least one set.
        tasks: names; empty for what suits each set.
        output: folder of the results; those of earlier runs are kept.
        languages: of sets in several languages; empty for all, which only `cross-lingual` takes.
        exclude_faults: leave faulty samples out and report how many, instead of raising.
        check_pictures: decode every picture before a model is loaded.
        class_names, templates: of a classification; see `read_set`.
        ignored_fields: of one's own data.
        encoder: how models are run.
    """

    models: tuple[ModelChoice, ...]
    data: tuple[DataChoice, ...]
    tasks: tuple[str, ...] = ()
    output: Path = Path("evaluation")
    languages: tuple[str, ...] = ()
    exclude_faults: bool = False
    check_pictures: bool = True
    class_names: Mapping[str, str] | Sequence[str] | None = None
    templates: tuple[str, ...] | None = None
    ignored_fields: tuple[str, ...] = ()
    encoder: EncoderSettings = field(default_factory=EncoderSettings)

    def __post_init__(self) -> None:
        if not self.models or not self.data:
            raise ValueError("Evaluation needs at least one model and one set (--data).")
        for what, names in (
            ("models", [model.name for model in self.models]),
            ("sets", [data.name for data in self.data]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(
                    f"Two {what} have one name, and their results would be one: {names}. Name "
                    "models as NAME=SOURCE; evaluate two folders of one set in two runs."
                )
        for task in self.tasks:
            find_task(task)


@dataclass(frozen=True)
class _Job:
    """One task on one set."""

    task: Task
    set_name: str
    sets: tuple[EvaluationSet, ...]


def evaluate(
    arguments: EvaluationArguments, *, on_result: Callable[[Result], object] | None = None
) -> list[Result]:
    """Run every task that suits a set for every model; finished ones are not computed again.

    Args:
        on_result: told each result when it is there, computed now or before.
    Raises: ValueError, before any model is loaded, for bad data (DataFaults), a task that suits no
        set, a model of no known kind, a model without pictures for a task with them, or a result
        of another run in the output folder.
    """
    jobs = _read_jobs(arguments)
    encoders = {choice.name: _open(choice, arguments.encoder) for choice in arguments.models}
    descriptions = {name: encoder.describe() for name, encoder in encoders.items()}
    for job in jobs:
        for description in descriptions.values():
            _require_abilities(description, job)
    protocols = {
        (name, job.task.name, job.set_name): build_protocol(job.task, job.sets, description)
        for name, description in descriptions.items()
        for job in jobs
    }
    finished = _find_all_finished(arguments.output, protocols, descriptions)
    results = []
    for name in list(encoders):
        encoder = RememberingEncoder(encoders.pop(name))  # so that a model goes with its turn
        for job in jobs:
            key = (name, job.task.name, job.set_name)
            result = finished[key] or _run(encoder, name, job, protocols[key], arguments.output)
            results.append(result)
            if on_result is not None:
                on_result(result)
    return results


def _read_jobs(arguments: EvaluationArguments) -> list[_Job]:
    chosen = {data.name: _tasks_for(data, arguments.tasks) for data in arguments.data}
    used = {task.name for tasks in chosen.values() for task in tasks}
    if idle := [task for task in arguments.tasks if task not in used]:
        kinds = {task: find_task(task).kinds for task in idle}
        raise ValueError(f"No set suits these tasks, which take sets of a kind: {kinds}.")
    if idle := [name for name, tasks in chosen.items() if not tasks]:
        raise ValueError(f"None of the tasks {list(arguments.tasks)} suits the sets {idle}.")
    jobs = []
    for data in arguments.data:
        read: dict[tuple[bool, bool], tuple[EvaluationSet, ...]] = {}
        for task in chosen[data.name]:
            key = (task.languages, _wants_pictures(task, data))
            if key not in read:
                read[key] = _read_sets(data, task, arguments)
            jobs.append(_Job(task, data.name, read[key]))
    return jobs


def _tasks_for(data: DataChoice, names: Sequence[str]) -> list[Task]:
    kind = find_set(data.name).kind
    wanted = names or [_DEFAULT_TASKS[kind]]
    return [task for task in map(find_task, wanted) if kind in task.kinds]


def _wants_pictures(task: Task, data: DataChoice) -> bool:
    return find_set(data.name).kind != "captions" and task.needs_pictures is not False


def _read_sets(
    data: DataChoice, task: Task, arguments: EvaluationArguments
) -> tuple[EvaluationSet, ...]:
    languages: tuple[str | None, ...] = arguments.languages or (None,)
    if task.languages and not arguments.languages:
        languages = find_languages(data.name, data.folder, ignored_fields=arguments.ignored_fields)
    if not task.languages and len(languages) > 1:
        raise ValueError(
            f"The task {task.name} takes one language at a time, got {list(languages)}. Run it "
            "once for each, or take cross-lingual."
        )
    is_classification = find_set(data.name).kind == "classification"
    checked: set[Picture] = set()
    return tuple(
        read_set(
            data.name,
            data.folder,
            images=data.images,
            lang=lang,
            exclude_faults=arguments.exclude_faults,
            require_pictures=_wants_pictures(task, data),
            check_pictures=arguments.check_pictures,
            class_names=arguments.class_names if is_classification else None,
            templates=arguments.templates if is_classification else None,
            ignored_fields=arguments.ignored_fields,
            show_progress=arguments.encoder.show_progress,
            checked=checked,
        )
        for lang in languages
    )


def _open(choice: ModelChoice, settings: EncoderSettings) -> Encoder:
    records = None
    if choice.extracted_from is not None:
        records = read_captioned(choice.extracted_from)
    return open_encoder(
        choice.source,
        settings,
        kind=choice.kind,
        revision=choice.revision,
        architecture=choice.architecture,
        records=records,
        head=choice.head,
    )


def _require_abilities(description: Description, job: _Job) -> None:
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


def _find_all_finished(
    output: Path,
    protocols: Mapping[tuple[str, str, str], dict[str, Any]],
    descriptions: Mapping[str, Description],
) -> dict[tuple[str, str, str], Result | None]:
    found: dict[tuple[str, str, str], Result | None] = {}
    faults = []
    for (model, task, set_name), protocol in protocols.items():
        file = result_file(output, model=model, set_name=set_name, task=task)
        try:
            found[model, task, set_name] = find_finished(
                file, protocol=protocol, fingerprint=descriptions[model].fingerprint
            )
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return found


def _run(encoder: Encoder, model: str, job: _Job, protocol: dict[str, Any], output: Path) -> Result:
    started = time.monotonic()
    found = job.task.run(encoder, job.sets)
    seconds = time.monotonic() - started
    file = result_file(output, model=model, set_name=job.set_name, task=job.task.name)
    description = encoder.describe()
    result = Result(
        model=model,
        task=job.task.name,
        set=job.set_name,
        scores=dict(found.scores),
        protocol=protocol,
        counts=dict(found.counts),
        fingerprint=description.fingerprint,
        run={**description.run, "model": description.source},
        versions=list_versions(),
        seconds=round(seconds, 2),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    # The scores come last: where they are, the pictures are too.
    for name, picture in found.pictures.items():
        picture.save(file.with_suffix(f".{name}.png"))
    write_result(file, result)
    return result
