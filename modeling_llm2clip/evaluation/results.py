"""Save results as JSON files: scores, all choices that affect scores, and model fingerprint.

Each file is written atomically, with a digest that reveals damage and edits. A later run with the
same model, data, protocol and version of this package reuses the file; a file from another run is
never overwritten. In one folder, all results under one model name belong to the same model, and all
scores of a task on a dataset are comparable.
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
_ADVICE = "Choose another output folder or another name for the model, or delete the file."
# Where a dataset or a model is stored does not affect scores; digests identify it.
_MAY_DIFFER = re.compile(r"(protocol\.)?data\.(.*\.)?(source|revision)")
_PACKAGES = (
    OWN_PACKAGE, "torch", "torchvision", "transformers", "tokenizers",
    "sentence-transformers", "open_clip_torch", "timm", "pillow",
)  # fmt: skip
# Fields of an encoder's description that affect scores.
_MODEL_FIELDS = ("model_type", "text", "images", "dtype")
_SHOWN_OF_VALUE = 60  # characters
_SHOWN_BEFORE = 15  # characters of the common prefix of two values


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of one model for one task on one dataset; a planned result has no scores yet.

    Attributes:
        model: Name of the model in tables.
        protocol: Every choice that affects scores, for the `data`, the `model` (prompt, maximum
            tokens, resolution, preprocessing, dtype) and the `task`.
        counts: Numbers of images, texts and truncated texts.
        fingerprint: Digests that identify the model.
        run: Facts that do not affect scores: device, batch size, the model's location, and how many
            texts and images were `encoded`, since embeddings from an earlier task are reused.
            `far_images` describes images unlike the training data.
        versions: Versions of Python and of every package involved in computing embeddings.
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
    """Collect every choice that affects scores, before the model is loaded."""
    of_data = {data.lang: {**data.protocol, "digest": hash_dataset(data)} for data in datasets}
    data = {"languages": of_data} if task.all_languages else next(iter(of_data.values()))
    protocol = {
        "data": data,
        "model": {name: getattr(description, name) for name in _MODEL_FIELDS},
        "task": {**task.protocol, **task.describe_data(tuple(datasets))},
    }
    # Match what will be read from the file: JSON turns tuples into lists.
    return json.loads(json.dumps(protocol, ensure_ascii=False))  # type: ignore[no-any-return]


def hash_dataset(dataset: EvaluationDataset) -> str:
    """Hash a dataset's texts, names and correspondence, and the bytes of its images.

    Each image is read once per process unless its file changes.
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
            f"{file} is not an evaluation result, or was modified after it was written: {error}. "
            "Choose another file, or delete it and evaluate again."
        ) from error
    raise ValueError(
        f"{file} has format_version {version!r}, but this version reads {FORMAT_VERSION}. Evaluate "
        "again into another folder."
    )


def list_result_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.json"))


def read_evaluation_results(folder: Path) -> list[Result]:
    files = list_result_files(folder)
    if not files:
        raise ValueError(f"{folder} has no results. Run an evaluation with this output first.")
    return [read_result(file) for file in files]


def find_finished(folder: Path, planned: Iterable[Result]) -> dict[Path, Result]:
    """Find the results in a folder, by file; raise ValueError if any conflicts with `planned`.

    The error lists every conflict. A different version of a dependency only causes a warning.
    """
    errors: dict[str, None] = {}  # the same file may fail in the same way for several plans
    results: dict[Path, Result] = {}
    for file in list_result_files(folder):
        try:
            result = read_result(file)
        except ValueError as error:
            errors[str(error)] = None
        else:
            results[find_result_file(folder, result)] = result
    for plan in planned:
        for file, result in results.items():
            if conflict := find_conflict(result, plan):
                errors[f"{file} comes from {conflict}. {_ADVICE}"] = None
        if (finished := results.get(find_result_file(folder, plan))) is not None:
            if differences := list(find_differences(finished.versions, plan.versions)):
                warnings.warn(
                    f"{find_result_file(folder, plan)} is reused, although it was computed with "
                    f"other package versions: {'; '.join(differences)}. Delete it to compute it "
                    "again.",
                    stacklevel=2,
                )
    if errors:
        raise ValueError("\n".join(errors))
    return results


def find_conflict(first: Result, second: Result) -> str | None:
    """Return why two results cannot be in the same folder or table; None if they can.

    All results under one model name must belong to the same model, and all scores of a task on a
    dataset must be comparable. Results of another version of this package conflict, because that
    version may score differently.
    """
    then, now = (
        {
            "model": {"fingerprint": result.fingerprint},
            "dataset or protocol": {name: result.protocol[name] for name in ("data", "task")},
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
        compared.append("run" if is_one_model else "dataset or protocol")
    for what in compared:
        if differences := list(find_differences(then[what], now[what])):
            return f"another {what}: {list_first(differences, '; ')}"
    return None


def write_result(file: Path, result: Result) -> None:
    text = write_sealed(asdict(result))
    with lock_folder(file.parent):
        # Another process may have written it since the last check.
        if file.is_file() and (conflict := find_conflict(read_result(file), result)):
            raise ValueError(f"{file} comes from {conflict}. {_ADVICE}")
        write_atomically(file, text.encode())


def find_differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield the old and new value of every field in which two protocols differ."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in sorted(set(then) | set(now)):
            below = f"{path}.{name}" if path else name
            yield from find_differences(then.get(name), now.get(name), below)
    elif then != now and not _MAY_DIFFER.fullmatch(path):
        values = repr(then), repr(now)
        # Long values are shown from just before they begin to differ.
        equal = next(i for i, (a, b) in enumerate(zip_longest(*values)) if a != b)
        start = max(0, equal - _SHOWN_BEFORE)
        start *= max(map(len, values)) > _SHOWN_OF_VALUE  # a short value is shown whole
        stop = start + _SHOWN_OF_VALUE
        was, now_is = ("…" * (start > 0) + v[start:stop] + "…" * (len(v) > stop) for v in values)
        yield f"{path} was {was} and is {now_is}"


def _hash_image(image: ImageSource) -> str:
    """Hash an image's encoded bytes, which do not depend on where the dataset is stored."""
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
