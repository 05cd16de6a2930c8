"""Evaluates models: reads and checks everything first, then loads one model after the other.

Order: settings, data sets with every error, kinds and configurations of the models, results that
are there already; only then weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from .._environment import list_versions
from ..configs.config_fields import Config
from ..configs.evaluation_config import EvaluatedDataset, EvaluatedModel, EvaluationConfig
from ..data.record_loading import load_records
from ..encoding.devices import find_device
from .datasets.dataset_registry import find_dataset, list_datasets
from .encoders.auto import load_encoder
from .encoders.encoder import Encoder, EncoderDescription
from .encoders.remembering import RememberingEncoder
from .jobs import Job, read_jobs, require_abilities
from .metrics.ranking import ranking_memory
from .results import (
    PACKAGES,
    Result,
    build_protocol,
    find_finished,
    list_files,
    read_result,
    require_one_model,
    result_file,
    write_result,
)
from .tasks.task_registry import find_task

ModelChoice: TypeAlias = EvaluatedModel | str | Path
DatasetChoice: TypeAlias = EvaluatedDataset | str | Path


def evaluate(
    models: ModelChoice | Sequence[ModelChoice],
    data: DatasetChoice | Sequence[DatasetChoice],
    config: EvaluationConfig | None = None,
    *,
    tasks: Sequence[str] = (),
    on_result: Callable[[Result], object] | None = None,
) -> list[Result]:
    """Run every task that suits a dataset for every model; finished ones are not computed again.

    Args:
        models: One or several models: Hub ids, folders, or `EvaluatedModel`s.
        data: One or several datasets: names, folders, or `EvaluatedDataset`s.
        config: How datasets are read and models run.
        tasks: Names of tasks; empty for what suits each dataset.
        on_result: Called with each result when it is there, computed now or before.

    Returns:
        The results, model by model.

    Raises:
        ValueError: Before any model is loaded: bad data (DataValidationError), a task that suits no
            dataset, a model of unknown type, a model without images for a task with them, or a
            result of another run in the output folder.
    """
    config = _read_files(config or EvaluationConfig())
    chosen = [_make_model(model) for model in _as_list(models)]
    datasets = [make_dataset(one) for one in _as_list(data)]
    _require_choices(chosen, datasets, tasks)
    find_device(config.device)  # or an error, before anything is read
    jobs = read_jobs(datasets, tasks, config)
    encoders = {choice.name: _open(choice, config) for choice in chosen}
    descriptions = {name: encoder.describe() for name, encoder in encoders.items()}
    for job in jobs:
        for description in descriptions.values():
            require_abilities(description, job)
    protocols = _build_protocols(jobs, descriptions)
    finished = _find_all_finished(config.output, protocols, descriptions)
    results: dict[str, list[Result]] = {name: [] for name in encoders}
    # Stored embeddings first: one that is missing is reported before any model is loaded.
    for name in sorted(encoders, key=lambda name: descriptions[name].kind != "embeddings"):
        encoder = RememberingEncoder(encoders.pop(name))  # so that a model goes with its turn
        for job in jobs:
            key = (name, job.task.name, job.set_name)
            with ranking_memory(config.max_memory_mb):
                result = finished[key] or _run(encoder, name, job, protocols[key], config.output)
            results[name].append(result)
            if on_result is not None:
                on_result(result)
    return [result for of_model in results.values() for result in of_model]


def make_dataset(choice: DatasetChoice, *, image_dir: str | None = None) -> EvaluatedDataset:
    """Make a choice of dataset of its name, or of a folder of custom data.

    Args:
        choice: A name, `NAME=FOLDER`, or a folder; a name is never taken for a folder.
        image_dir: Folder of its images.

    Raises:
        ValueError: There is no such dataset.
    """
    if isinstance(choice, EvaluatedDataset):
        return choice
    text = str(choice)
    known = {spec.name for spec in list_datasets()}
    name, sign, folder = text.partition("=")
    if text not in known and Path(text).exists():
        name, folder = "folder", text
    elif sign and not (name and folder):
        raise ValueError(f"{text!r} is not NAME=FOLDER.")
    find_dataset(name)
    return EvaluatedDataset(name=name, folder=folder or None, image_dir=image_dir)


def _make_model(choice: ModelChoice) -> EvaluatedModel:
    if isinstance(choice, EvaluatedModel):
        return choice
    return EvaluatedModel(source=str(choice))


def _as_list(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | Path | Config) else list(given)


def _require_choices(
    models: Sequence[EvaluatedModel], data: Sequence[EvaluatedDataset], tasks: Sequence[str]
) -> None:
    """Raise ValueError for nothing to evaluate, for one name twice, and for unknown names."""
    if not models or not data:
        raise ValueError("Evaluation needs at least one model and one dataset.")
    for what, names in (
        ("models", [model.name for model in models]),
        ("datasets", [dataset.name for dataset in data]),
    ):
        if len(set(names)) < len(names):
            raise ValueError(
                f"Two {what} have one name, and their results would be one: {names}. Name models "
                "as NAME=SOURCE; evaluate two folders of one dataset in two runs."
            )
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks has a name twice: {', '.join(tasks)}. Give each once.")
    for dataset in data:
        find_dataset(dataset.name)
    for task in tasks:
        find_task(task)


def _read_files(config: EvaluationConfig) -> EvaluationConfig:
    """Put the lines of files in the place of their paths."""
    names, templates = config.class_names, config.templates
    return replace(
        config,
        class_names=_read_lines(names, "class_names") if isinstance(names, Path) else names,
        templates=_read_lines(templates, "templates") if isinstance(templates, Path) else templates,
    )


def _read_lines(file: Path, option: str) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # some editors write the mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={file} is not a text file in UTF-8: {error}.") from error
    return tuple(line.strip() for line in lines if line.strip())


def _build_protocols(
    jobs: Sequence[Job], descriptions: Mapping[str, EncoderDescription]
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The protocol of every model, task and dataset."""
    return {
        (name, job.task.name, job.set_name): build_protocol(job.task, job.sets, description)
        for name, description in descriptions.items()
        for job in jobs
    }


def _open(choice: EvaluatedModel, config: EvaluationConfig) -> Encoder:
    records = None
    if choice.extracted_from is not None:
        records = load_records(choice.extracted_from, require_images=False)
    return load_encoder(
        choice.source,
        config,
        model_type=choice.model_type,
        revision=choice.revision,
        architecture=choice.architecture,
        activation=choice.activation,
        records=records,
        head=choice.head,
    )


def _find_all_finished(
    output: Path,
    protocols: Mapping[tuple[str, str, str], dict[str, Any]],
    descriptions: Mapping[str, EncoderDescription],
) -> dict[tuple[str, str, str], Result | None]:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; results need a folder. Name another output.")
    found: dict[tuple[str, str, str], Result | None] = {}
    errors = _find_broken(output)
    for name, description in descriptions.items():
        try:
            require_one_model(output / name, fingerprint=description.fingerprint)
        except ValueError as error:
            errors.append(str(error))
    for (model, task, set_name), protocol in protocols.items():
        file = result_file(output, model=model, set_name=set_name, task=task)
        try:
            found[model, task, set_name] = find_finished(file, protocol=protocol)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(dict.fromkeys(errors)))  # one file may fail in several ways
    return found


def _find_broken(output: Path) -> list[str]:
    """Files of other runs in the folder that cannot be read, as the table of all results would."""
    errors = []
    for file in list_files(output):
        try:
            read_result(file)
        except ValueError as error:
            errors.append(str(error))
    return errors


def _run(
    encoder: RememberingEncoder, model: str, job: Job, protocol: dict[str, Any], output: Path
) -> Result:
    before = dict(encoder.encoded)
    started = time.monotonic()
    found = job.task.run(encoder, job.sets)
    seconds = time.monotonic() - started
    encoded = {what: number - before[what] for what, number in encoder.encoded.items()}
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
        run={**description.run, "model": description.source, "encoded": encoded},
        versions=list_versions(PACKAGES),
        seconds=round(seconds, 2),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    # The scores come last: where they are, the images are too.
    for name, image in found.images.items():
        image.save(file.with_suffix(f".{name}.png"))
    write_result(file, result)
    return result
