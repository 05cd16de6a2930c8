"""Retrieval in one's own data: a folder in any format that the package reads, or records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ....data.images.image_sources import IMAGE_SUFFIXES
from ....data.records.data_hashes import hash_records
from ....data.records.record_loading import CollectedRecord, iterate_records
from ....data.records.records import CaptionedImage
from ....data.validation_errors import ErrorCollector
from ..dataset_spec import CLEANED_TEXTS, DatasetSpec, ReadRequest
from ..retrieval_dataset import PublishedRecord, build_retrieval_dataset
from ..validation import DatasetValidator

_DIGEST_SHOWN = 8  # hexadecimal digits
_OWN: dict[str, Any] = {
    "dataset_type": "retrieval",
    "languages": (),
    "counts": {},
    "license": "yours",
    "citation": "none",
    "takes_distractors": True,
}
_OF_DISTRACTORS = ("no caption", "no image")  # errors of a record that may be a distractor
_CORRESPONDENCE = {"correspondence": "images of one group share their captions"}


@dataclass(frozen=True)
class _Collected:
    """A folder as it was read.

    Attributes:
        stray: Errors that belong to none of the records.
        records: The records of all languages.
        num_unused_images: Number of files that no record names, whatever its language.
    """

    stray: ErrorCollector
    records: list[CollectedRecord]
    num_unused_images: int


def read_custom_folder(
    request: ReadRequest, validator: DatasetValidator, *, long: bool = False
) -> Iterator[PublishedRecord]:
    """Yield the records of one language.

    Errors of other languages stop the reading too, but nothing of this language is skipped for
    them.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
        long: Take `long_captions` in place of `captions`; a record without one is an error.
    """
    collected = _collect(request, validator)
    validator.errors.extend(collected.stray)
    if collected.num_unused_images:
        validator.notes["images_without_a_record"] = collected.num_unused_images
    for item in collected.records:
        record = item.record
        is_wanted = record is None or record.lang == request.lang
        errors = item.errors
        if request.allow_distractors:
            errors = errors.without(*_OF_DISTRACTORS)
        if is_wanted or not validator.skip_invalid:
            validator.errors.extend(errors)
            validator.num_errors_of_yielded += errors.total - (record is None)
        if record is not None and is_wanted:
            has_image = "no image" not in item.errors.counts
            yield _publish(record, long=long, is_valid=not errors.total, has_image=has_image)


def _find_languages(request: ReadRequest, validator: DatasetValidator) -> tuple[str, ...]:
    """List the languages of a folder by first occurrence; errors are reported later.

    Raises:
        ValueError: The folder has no records.
        DataValidationError: All records are broken.
    """
    collected = _collect(request, validator)
    languages = dict.fromkeys(
        item.record.lang for item in collected.records if item.record is not None
    )
    if not languages:
        errors = ErrorCollector()
        for found in (collected.stray, *(item.errors for item in collected.records)):
            errors.extend(found)
        errors.raise_if_any(str(request.folder))
        raise ValueError(f"{request.folder} has no records. Each image needs one.")
    return tuple(languages)


def _collect(request: ReadRequest, validator: DatasetValidator) -> _Collected:
    """Read the folder, once for all languages."""
    how = (request.folder, request.image_dir, request.require_images, request.ignore_fields)
    if how not in validator.cache.records:
        stray = ErrorCollector()
        records = iterate_records(
            str(request.folder),
            stray,
            image_dir=request.image_dir,
            require_images=request.require_images,
            ignore_fields=request.ignore_fields,
        )
        num_unused = _count_unused(request, records)
        validator.cache.records[how] = _Collected(stray, records, num_unused)
    collected: _Collected = validator.cache.records[how]
    return collected


def _count_unused(request: ReadRequest, records: Iterable[CollectedRecord]) -> int:
    """Count the images that no record names, if images are files and wanted."""
    used = {
        item.record.image
        for item in records
        if item.record is not None and isinstance(item.record.image, Path)
    }
    if not (used and request.require_images):
        return 0
    given = request.data_folder
    folder = given if given.is_dir() else given.parent
    named = {os.path.normpath(path) for path in used}
    return sum(
        file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
        and os.path.normpath(file) not in named
        for file in (request.image_dir or folder).rglob("*")
    )


def _publish(
    record: CaptionedImage, *, long: bool, is_valid: bool, has_image: bool
) -> PublishedRecord:
    return PublishedRecord(
        place=record.place,
        name=record.name,
        captions=record.long_captions if long else record.captions,
        image=record.image,
        group_id=record.group_id,
        is_valid=is_valid,
        has_image=has_image,
    )


def make_records_spec(records: Sequence[CaptionedImage], *, name: str | None = None) -> DatasetSpec:
    """Make the spec of records that are in memory.

    Args:
        records: At least one.
        name: Name of the dataset. Default: one with the hash of the records.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError("Got no records to evaluate on; give at least one.")
    languages = tuple(dict.fromkeys(record.lang for record in records))

    def read(request: ReadRequest, validator: DatasetValidator) -> Iterator[PublishedRecord]:  # noqa: ARG001
        may_lack_images = request.allow_distractors and request.require_images
        for record in records:
            if record.lang == request.lang:
                has_image = record.image is not None or not may_lack_images
                yield _publish(record, long=False, is_valid=True, has_image=has_image)

    return DatasetSpec(
        **{**_OWN, "languages": languages},
        name=name or f"records-{hash_records(records)[:_DIGEST_SHOWN]}",
        title="Records in memory",
        source="your program",
        files="none",
        protocol={"split": "all", "fields": "captions", **_CORRESPONDENCE, **CLEANED_TEXTS},
        build=partial(build_retrieval_dataset, read=read),
        origin="records",
    )


def _make_folder_spec(name: str, title: str, *, long: bool) -> DatasetSpec:
    return DatasetSpec(
        **_OWN,
        name=name,
        title=title,
        source="your disk",
        files="captions.jsonl and images, or Parquet, tar shards, COCO captions",
        protocol={
            "split": "all",
            "fields": "long_captions" if long else "captions",
            **_CORRESPONDENCE,
            **CLEANED_TEXTS,
        },
        build=partial(build_retrieval_dataset, read=partial(read_custom_folder, long=long)),
        find_languages=_find_languages,
    )


DATASETS = (
    _make_folder_spec("folder", "Your own images with captions", long=False),
    _make_folder_spec("folder-long", "Your own images with their long captions", long=True),
)
