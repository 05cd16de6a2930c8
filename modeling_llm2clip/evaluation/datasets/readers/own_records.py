"""Reads a folder of one's own, in any format of `data/record_loading.py`, and the emoji."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ....data.image_sources import IMAGE_SUFFIXES
from ....data.record_loading import (
    CollectedRecord,
    find_example_data,
    iterate_records,
    load_records,
)
from ....data.records import CaptionedImage
from ....data.splits import choose_test_rows, split_records
from ....data.validation_errors import ErrorCollector
from ..dataset_spec import ReadRequest
from ..retrieval_dataset import RawRecord
from ..validation import DatasetValidator

# What `llm2clip demo` holds out unless it is given another seed.
EMOJI_SEED = 0
_NUM_EMOJI_GROUPS = 300


@dataclass(frozen=True)
class _Collected:
    """A folder as it was read.

    Attributes:
        stray: errors that belong to none of the records.
        num_unused_images: files that no record names, whatever its language.
    """

    stray: ErrorCollector
    records: list[CollectedRecord]
    num_unused_images: int


def read_own_folder(
    request: ReadRequest, intake: DatasetValidator, *, long: bool = False
) -> Iterator[RawRecord]:
    """Yield the records of one language.

    Errors of other languages stop the reading too, but are no exclusions of this one.

    Args:
        long: take `long_captions` in place of `captions`; a record without one is an error.
    """
    collected = _collect(request, intake)
    intake.errors.extend(collected.stray)
    if collected.num_unused_images:
        intake.notes["images_without_a_record"] = collected.num_unused_images
    for item in collected.records:
        record = item.record
        is_asked_for = record is None or record.lang == request.lang
        if is_asked_for or not intake.exclude:
            intake.errors.extend(item.errors)
            intake.errors_of_samples += item.errors.total - (record is None)
        if record is not None and is_asked_for:
            yield RawRecord(
                place=record.place,
                name=record.name,
                captions=record.long_captions if long else record.captions,
                image=record.image,
                group_id=record.group_id,
                is_sound=not item.errors.total,
            )


def find_own_languages(request: ReadRequest, intake: DatasetValidator) -> tuple[str, ...]:
    """The languages of a folder, in the order in which they first come; its errors are told later.

    Raises: ValueError for a folder that has no records; DataValidationError where all of them are
        broken.
    """
    collected = _collect(request, intake)
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


def _collect(request: ReadRequest, intake: DatasetValidator) -> _Collected:
    """Read the folder, once for all languages."""
    how = (request.folder, request.image_dir, request.require_images, request.ignore_fields)
    if how not in intake.cache.records:
        stray = ErrorCollector()
        records = iterate_records(
            request.folder,
            stray,
            image_dir=request.image_dir,
            require_images=request.require_images,
            ignore_fields=request.ignore_fields,
        )
        intake.cache.records[how] = _Collected(stray, records, _count_unused(request, records))
    collected: _Collected = intake.cache.records[how]
    return collected


def _count_unused(request: ReadRequest, records: Iterable[CollectedRecord]) -> int:
    """How many images lie there that no record names, where images are files and wanted."""
    used = {
        item.record.image
        for item in records
        if item.record is not None and isinstance(item.record.image, Path)
    }
    if not (used and request.require_images):
        return 0
    folder = request.folder if request.folder.is_dir() else request.folder.parent
    lying = (request.image_dir or folder).rglob("*")
    named = {os.path.normpath(path) for path in used}
    return sum(
        file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
        and os.path.normpath(file) not in named
        for file in lying
    )


def read_emoji(request: ReadRequest, intake: DatasetValidator) -> Iterator[RawRecord]:
    """Yield one image of each emoji that the demo holds out, with its name in one language."""
    if "emoji" not in intake.cache.records:
        intake.cache.records["emoji"] = _choose_emoji()
    tested, captions = intake.cache.records["emoji"]
    intake.notes["seed"] = EMOJI_SEED
    for record in tested:
        yield RawRecord(
            place="captions.jsonl",
            name=record.name,
            captions=captions[record.name, request.lang],
            image=record.image,
            group_id=record.group_id,
        )


def _choose_emoji() -> tuple[list[CaptionedImage], dict[tuple[str, str], tuple[str, ...]]]:
    """The records that test English, and of each image and language the first caption."""
    records = load_records(find_example_data() / "emoji")
    english = [record for record in records if record.lang == "en"]
    _, held_out = split_records(english, test_size=_NUM_EMOJI_GROUPS, seed=EMOJI_SEED)
    groups = {record.group_id for record in held_out}
    tested = [english[row] for row in choose_test_rows(english, groups)]
    return tested, {(record.name, record.lang): record.captions[:1] for record in records}
