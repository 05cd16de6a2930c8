"""Evaluates models: reads and checks everything first, then loads one model after the other.

Order: settings, data sets with every error, kinds and configurations of the models, results that
are there already; only then weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.record_loading import load_records
from .arguments import EvaluatedModel, EvaluationArguments
from .encoders.auto import load_encoder
from .encoders.encoder import Encoder, EncoderDescription, EncoderSettings
from .encoders.remembering import RememberingEncoder
from .jobs import Job, read_jobs, require_abilities
from .metrics.ranking import ranking_memory
from .results import (
    Result,
    build_protocol,
    find_finished,
    list_files,
    list_versions,
    read_result,
    require_one_model,
    result_file,
    write_result,
)


def evaluate(
    arguments: EvaluationArguments, *, on_result: Callable[[Result], object] | None = None
) -> list[Result]:
    """Run every task that suits a set for every model; finished ones are not computed again.

    Args:
        on_result: told each result when it is there, computed now or before.
    Raises: ValueError, before any model is loaded, for bad data (DataValidationError), a task that
        suits no set, a model of no known kind, a model without images for a task with them, or a
        result of another run in the output folder.
    """
    jobs = read_jobs(arguments)
    encoders = {choice.name: _open(choice, arguments.encoder) for choice in arguments.models}
    descriptions = {name: encoder.describe() for name, encoder in encoders.items()}
    for job in jobs:
        for description in descriptions.values():
            require_abilities(description, job)
    protocols = _build_protocols(jobs, descriptions)
    finished = _find_all_finished(arguments.output, protocols, descriptions)
    results: dict[str, list[Result]] = {name: [] for name in encoders}
    # Stored embeddings first: one that is missing is told before any model is loaded.
    for name in sorted(encoders, key=lambda name: descriptions[name].kind != "embeddings"):
        encoder = RememberingEncoder(encoders.pop(name))  # so that a model goes with its turn
        for job in jobs:
            key = (name, job.task.name, job.set_name)
            with ranking_memory(arguments.max_memory_mb):
                result = finished[key] or _run(encoder, name, job, protocols[key], arguments.output)
            results[name].append(result)
            if on_result is not None:
                on_result(result)
    return [result for of_model in results.values() for result in of_model]


def _build_protocols(
    jobs: Sequence[Job], descriptions: Mapping[str, EncoderDescription]
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The protocol of every model, task and dataset."""
    return {
        (name, job.task.name, job.set_name): build_protocol(job.task, job.sets, description)
        for name, description in descriptions.items()
        for job in jobs
    }


def _open(choice: EvaluatedModel, settings: EncoderSettings) -> Encoder:
    records = None
    if choice.extracted_from is not None:
        records = load_records(choice.extracted_from, require_images=False)
    return load_encoder(
        choice.source,
        settings,
        kind=choice.kind,
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
        versions=list_versions(),
        seconds=round(seconds, 2),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    # The scores come last: where they are, the images are too.
    for name, image in found.images.items():
        image.save(file.with_suffix(f".{name}.png"))
    write_result(file, result)
    return result
