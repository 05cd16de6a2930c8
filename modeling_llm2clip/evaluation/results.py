"""One JSON file per task: scores, every choice that changed them, the model's fingerprint.

A file is written whole or not at all, with a digest that a damaged or edited one no longer has. A
later run with the same model, data, protocol and version of this package finds it and computes
nothing; a file of another run is never overwritten. In one folder, all results of a name are of one
model, and all scores of a task on a dataset can be compared.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .._environment import list_versions
from .._suggestions import list_first
from ..data.atomic_files import lock_folder, write_atomically
from ..data.images.image_sources import EncodedImage, ImageSource, TarImage
from ..data.remote.file_locations import FileLocation, find_state
from ..data.sealed_manifest import read_sealed, write_sealed
from .datasets.dataset_spec import EvaluationDataset
from .encoders.encoder import EncoderDescription
from .tasks.task import Task

FORMAT_VERSION = 1
OWN_PACKAGE = "modeling_llm2clip"
_ADVICE = "Name another output folder or another name for the model, or remove it."
# Where a dataset or a model is stored changes no score: the digests identify it.
_MAY_DIFFER = re.compile(r"(protocol\.)?data\.(.*\.)?(source|revision)")
_PACKAGES = (
    OWN_PACKAGE, "torch", "torchvision", "transformers", "tokenizers",
    "sentence-transformers", "open_clip_torch", "timm", "pillow",
)  # fmt: skip
# Fields of an encoder's description that change a score.
_OF_MODEL = ("model_type", "text", "images", "dtype")
_SHOWN_OF_VALUE = 60  # characters
_SHOWN_BEFORE = 15  # of the part that two values share


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of one task for one model on one dataset; without scores it is planned.

    Attributes:
        model: Name of the model in tables.
        protocol: Every choice that changes a score: of the `data`, of the `model` (prompt, maximum
            tokens, resolution, preprocessing, dtype) and of the `task`.
        counts: Numbers of images, texts and truncated texts.
        fingerprint: Digests that identify the model.
        run: Facts that change no score: device, batch size, where the model was, and how many texts
            and images were `encoded`; embeddings of an earlier task are not computed again.
            `far_images` describes images that are unlike the training data.
        versions: Those of Python and of every package that takes part in an embedding.
        seconds: Time to compute the `encoded` embeddings and the scores.
    """

    model: str
    task: str
    dataset: str
    scores: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any]
    counts: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, str]
    run: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: list_versions(_PACKAGES))
    seconds: float = 0.0
    format_version: int = FORMAT_VERSION


def find_result_file(folder: Path, result: Result) -> Path:
    return folder / result.model / f"{result.dataset}.{result.task}.json"


def build_protocol(
    task: Task, datasets: Sequence[EvaluationDataset], description: EncoderDescription
) -> dict[str, Any]:
    """Collect every choice that changes a score, before the model is loaded."""
    of_data = {data.lang: {**data.protocol, "digest": hash_dataset(data)} for data in datasets}
    data = {"languages": of_data} if task.all_languages else next(iter(of_data.values()))
    protocol = {
        "data": data,
        "model": {name: getattr(description, name) for name in _OF_MODEL},
        "task": {**task.protocol, **task.describe_data(tuple(datasets))},
    }
    # As it will be read again: tuples become lists.
    return json.loads(json.dumps(protocol, ensure_ascii=False))  # type: ignore[no-any-return]


def hash_dataset(dataset: EvaluationDataset) -> str:
    """Hash a dataset's texts, names and correspondence, and the bytes of its images.

    Each image file is read once per process, unless it changes.
    """
    digest = hashlib.sha256()
    for part in dataset.list_content():
        digest.update(json.dumps(part, default=_hash_image).encode())
    return digest.hexdigest()


def read_result(file: Path) -> Result:
    try:
        content = read_sealed(file.read_text(encoding="utf-8"))
        if (version := content["format_version"]) == FORMAT_VERSION:
            return Result(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a result of an evaluation, or was changed after it was written: "
            f"{error}. Name another, or remove it and evaluate again."
        ) from error
    raise ValueError(
        f"{file} has format_version {version!r}, this code reads {FORMAT_VERSION}. Evaluate again "
        "into another folder."
    )


def list_result_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.json"))


def read_evaluation_results(folder: Path) -> list[Result]:
    files = list_result_files(folder)
    if not files:
        raise ValueError(f"{folder} has no results. Evaluate something into it first.")
    return [_read_named(file) for file in files]


def _read_named(file: Path) -> Result:
    result = read_result(file)
    if file.name != find_result_file(file.parent, result).name:
        raise ValueError(
            f"{file} holds the result of {result.task} on {result.dataset}. Delete it and evaluate "
            "again."
        )
    return result


def find_finished(folder: Path, planned: Iterable[Result]) -> dict[Path, Result]:
    """Find the results in a folder, by file; raise ValueError with every reason not to add to them.

    Another version of a package that this one calls causes a warning.
    """
    errors: dict[str, None] = {}  # one file may fail in the same way for several plans
    results: dict[Path, Result] = {}
    for file in list_result_files(folder):
        try:
            results[file] = _read_named(file)
        except ValueError as error:
            errors[str(error)] = None
    for plan in planned:
        for file, result in results.items():
            if conflict := find_conflict(result, plan):
                errors[f"{file} is {conflict}. {_ADVICE}"] = None
        if (finished := results.get(find_result_file(folder, plan))) is not None:
            if differences := list(find_differences(finished.versions, plan.versions)):
                warnings.warn(
                    f"{find_result_file(folder, plan)} is taken as it is, though it was computed "
                    f"with other packages: {'; '.join(differences)}. Remove it to have it computed "
                    "again.",
                    stacklevel=2,
                )
    if errors:
        raise ValueError("\n".join(errors))
    return results


def find_conflict(first: Result, second: Result) -> str | None:
    """Say why two results cannot be in one folder or table; None if they can.

    All results of a name are of one model, and all scores of a task on a dataset have one meaning.
    Another version of this package may score otherwise, and is another run.
    """
    then, now = (
        {
            "model": {"fingerprint": result.fingerprint},
            "data or in another way": {name: result.protocol[name] for name in ("data", "task")},
            "run": {
                "protocol": result.protocol,
                "versions": {OWN_PACKAGE: result.versions.get(OWN_PACKAGE)},
            },
        }
        for result in (first, second)
    )
    is_one_model = first.model == second.model
    compared = ["model"] if is_one_model else []
    if (first.task, first.dataset) == (second.task, second.dataset):
        compared.append("run" if is_one_model else "data or in another way")
    for what in compared:
        if differences := list(find_differences(then[what], now[what])):
            return f"of another {what}: {list_first(differences, '; ')}"
    return None


def write_result(file: Path, result: Result) -> None:
    text = write_sealed(asdict(result))
    with lock_folder(file.parent):
        # Another process may have written it since this one looked.
        if file.is_file() and (conflict := find_conflict(read_result(file), result)):
            raise ValueError(f"{file} is {conflict}. {_ADVICE}")
        write_atomically(file, text.encode())


def find_differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield the old and the new value wherever two protocols differ."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in sorted(set(then) | set(now)):
            below = f"{path}.{name}" if path else name
            yield from find_differences(then.get(name), now.get(name), below)
    elif then != now and not _MAY_DIFFER.fullmatch(path):
        values = repr(then), repr(now)
        # Of long values, the part where they begin to differ.
        equal = next(i for i, (a, b) in enumerate(zip_longest(*values)) if a != b)
        start = max(0, equal - _SHOWN_BEFORE)
        start *= max(map(len, values)) > _SHOWN_OF_VALUE  # a short value is shown whole
        stop = start + _SHOWN_OF_VALUE
        was, now_is = ("…" * (start > 0) + v[start:stop] + "…" * (len(v) > stop) for v in values)
        yield f"{path} was {was} and is {now_is}"


def _hash_image(image: ImageSource) -> str:
    """Hash the encoded bytes, which are the same wherever the dataset is."""
    if isinstance(image, EncodedImage):
        return hashlib.sha256(image.content).hexdigest()
    if isinstance(image, Path):
        file: FileLocation = image
    else:
        file = image.shard if isinstance(image, TarImage) else image.file
    return _hash_unchanged(image, find_state(file))


@cache
def _hash_unchanged(image: ImageSource, version: Hashable) -> str:  # noqa: ARG001
    return hashlib.sha256(image.read_bytes()).hexdigest()
