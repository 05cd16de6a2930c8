"""One JSON file a task: scores, every choice that moved them, the model's fingerprint.

The file is written whole or not at all, with a digest that a damaged or edited one no longer has.
A later run with the same model, data, protocol and version of this package finds it and computes
nothing; a file of another run is never overwritten. The results of one name are of one model.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from .._environment import list_versions
from ..data.atomic_files import hash_json, write_atomically
from ..data.image_sources import ImageSource, ParquetImage, TarImage
from .datasets.schema import ChoiceDataset, ClassificationDataset, EvaluationSet
from .encoders.encoder import EncoderDescription
from .tasks.task import Task

FORMAT_VERSION = 2
_DIGEST = "digest"
# Where a set or a model lies moves no score: the digests say what it is.
_MAY_DIFFER = re.compile(r"protocol\.data\.(.*\.)?(source|revision)")
OWN_PACKAGE = "modeling_llm2clip"
PACKAGES = (
    OWN_PACKAGE, "torch", "torchvision", "transformers", "tokenizers",
    "sentence-transformers", "open_clip_torch", "timm", "pillow",
)  # fmt: skip
_SHOWN = 8
_SHOWN_OF_VALUE = 60  # characters
_SHOWN_BEFORE = 15  # of what two values have in common


@dataclass(frozen=True)
class Result:
    """What one task found for one model on one set.

    Attributes:
        model, task, set: names: the model's as in tables, the others as commands take them.
        scores: from the task.
        protocol: every choice that moves a score: of the `data`, of the `model` (prompt, maximum
            tokens, resolution, preprocessing, dtype) and of the `task`.
        counts: what there was, and how many texts were cut.
        fingerprint: which model.
        run: moves no score: device, batch size, where the model lay, and how many texts and
            images were `encoded`; embeddings of an earlier task are not made again.
        versions: of the packages.
        seconds: of what was done: `encoded` embeddings and their scores.
    """

    model: str
    task: str
    set: str
    scores: dict[str, Any]
    protocol: dict[str, Any]
    counts: dict[str, Any]
    fingerprint: dict[str, str]
    run: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    format_version: int = FORMAT_VERSION


def result_file(folder: Path, *, model: str, set_name: str, task: str) -> Path:
    """Where a result lies."""
    return folder / model / f"{set_name}.{task}.json"


def build_protocol(
    task: Task, sets: Sequence[EvaluationSet], description: EncoderDescription
) -> dict[str, Any]:
    """Every choice that moves a score, known before the model is loaded."""
    described = description.to_json()
    of_data = {data.lang: {**data.protocol, "digest": hash_dataset(data)} for data in sets}
    data = {"languages": of_data} if task.languages else next(iter(of_data.values()))
    protocol = {
        "data": data,
        "model": {name: described[name] for name in ("kind", "text", "images", "dtype")},
        "task": {**task.protocol, **task.protocol_of(tuple(sets))},
    }
    # As it will be read again: tuples are lists then.
    return json.loads(json.dumps(protocol, ensure_ascii=False))  # type: ignore[no-any-return]


def hash_dataset(data: EvaluationSet) -> str:
    """SHA-256 of a set's texts, names and correspondence, and of the bytes of its images.

    Each image file is read once in a process, unless it has changed.
    """
    digest = hashlib.sha256()
    if isinstance(data, ChoiceDataset):
        parts: list[Any] = [
            [item.name, item.captions, item.anchor, list(map(_hash_image, item.images))]
            for item in data.items
        ]
    elif isinstance(data, ClassificationDataset):
        parts = [data.image_names, data.labels, data.class_names, data.templates]
        parts += [list(map(_hash_image, data.images))]
    else:
        pairs = (data.correspondence.image_of_pair, data.correspondence.text_of_pair)
        parts = [data.image_names, data.captions, *(rows.tolist() for rows in pairs)]
        parts += [list(map(_hash_image, data.images))]
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def read_result(file: Path) -> Result:
    """Read one result.

    Raises: ValueError when the file is damaged or changed, or written by another version of the
        format.
    """
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is damaged ({error}). Delete it and evaluate again.") from error
    return parse_result(content, file)


def is_result(content: Any) -> bool:
    """Whether this is what an evaluation wrote, of whatever version of the format."""
    return isinstance(content, dict) and {_DIGEST, "format_version"} <= set(content)


def parse_result(content: Any, file: Path) -> Result:
    """Make a result of a file's content; errors as `read_result`."""
    if not isinstance(content, dict) or "format_version" not in content:
        raise ValueError(f"{file} is no result of an evaluation. Name another folder.")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {content['format_version']!r}, this code reads "
            f"{FORMAT_VERSION}. Evaluate again into another folder."
        )
    content = {**content}
    digest = content.pop(_DIGEST, None)
    if set(content) != {field.name for field in fields(Result)} or digest != hash_json(content):
        raise ValueError(f"{file} was changed after it was written. Delete it and evaluate again.")
    return Result(**content)


def list_files(folder: Path) -> list[Path]:
    """The files of all results of a folder, by model, set and task."""
    return sorted(folder.glob("*/*.json"))


def read_results(folder: Path) -> list[Result]:
    """Read all results of a folder, by model, set and task.

    Raises: ValueError when there are none.
    """
    files = list_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no results. Evaluate something into it first.")
    return [read_result(file) for file in files]


def require_one_model(folder: Path, *, fingerprint: Mapping[str, str]) -> None:
    """Raise ValueError when the results of one name are of another model than this one.

    Args:
        folder: of all results of the name; need not be there.
    """
    for file in sorted(folder.glob("*.json")):
        then = {"fingerprint": read_result(file).fingerprint}
        _require_no_difference(file, "model", then, {"fingerprint": fingerprint})


def find_finished(file: Path, *, protocol: Mapping[str, Any]) -> Result | None:
    """Return the result that is there already, or None.

    Another version of this package may score otherwise, and is another run. Another version of a
    package that it calls is warned of.

    Raises: ValueError naming every choice in which the file's run differs from this one.
    """
    if not file.is_file():
        return None
    found = read_result(file)
    versions = list_versions(PACKAGES)
    _require_no_difference(
        file,
        "run",
        {"protocol": found.protocol, "versions": {OWN_PACKAGE: found.versions.get(OWN_PACKAGE)}},
        {"protocol": protocol, "versions": {OWN_PACKAGE: versions[OWN_PACKAGE]}},
    )
    if differences := list(find_differences(found.versions, versions)):
        warnings.warn(
            f"{file} is taken as it is, though it was computed with other packages: "
            f"{'; '.join(differences)}. Remove it to have it computed again.",
            stacklevel=2,
        )
    return found


def _require_no_difference(file: Path, what: str, then: Any, now: Any) -> None:
    differences = list(find_differences(then, now))
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(
            f"{file} is of another {what}: {'; '.join(differences[:_SHOWN])}{more}. Name another "
            "output folder or another name for the model, or remove the file."
        )


def write_result(file: Path, result: Result) -> None:
    """Write one result, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {**asdict(result), _DIGEST: hash_json(asdict(result))}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(file, text.encode())


def find_differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    """Say of every value in which two protocols differ what it was and what it is."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in sorted(set(then) | set(now)):
            below = f"{path}.{name}" if path else name
            yield from find_differences(then.get(name), now.get(name), below)
    elif then != now and not _MAY_DIFFER.fullmatch(path):
        was, now_is = _shorten(repr(then), repr(now))
        yield f"{path} was {was} and is {now_is}"


def _shorten(*texts: str) -> list[str]:
    """Cut long texts so that the first place where they differ is seen."""
    if max(map(len, texts)) <= _SHOWN_OF_VALUE:
        return list(texts)
    differ = (i for i, signs in enumerate(zip(*texts, strict=False)) if len(set(signs)) > 1)
    same = next(differ, min(map(len, texts)))
    start = same - _SHOWN_BEFORE if same > _SHOWN_OF_VALUE // 2 else 0
    return [
        "…" * (start > 0)
        + text[start : start + _SHOWN_OF_VALUE]
        + "…" * (len(text) > start + _SHOWN_OF_VALUE)
        for text in texts
    ]


def _hash_image(image: ImageSource) -> str:
    """SHA-256 of the encoded bytes, which are the same wherever the data set lies."""
    if isinstance(image, TarImage):
        state = image.shard.stat()
    else:
        state = (image.file if isinstance(image, ParquetImage) else image).stat()
    return _hash_unchanged(image, state.st_mtime_ns, state.st_size)


@cache
def _hash_unchanged(image: ImageSource, changed_ns: int, size: int) -> str:  # noqa: ARG001
    return hashlib.sha256(image.read_bytes()).hexdigest()
