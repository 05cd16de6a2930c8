"""Reads a folder of one's own, in any format of `data/captioned_sources.py`, and the emoji."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ....data.captioned_images import CaptionedImage
from ....data.captioned_sources import CollectedRecord, collect_captioned, read_captioned
from ....data.example_data import find_example_data
from ....data.faults import FaultCollector
from ....data.pictures import PICTURE_SUFFIXES
from ....data.splits import choose_test_rows, hold_out
from ..card import ReadRequest
from ..intake import Intake
from ..retrieval import Entry

# What `llm2clip demo` holds out unless it is given another seed.
EMOJI_SEED = 0


@dataclass(frozen=True)
class _Collected:
    """A folder as it was read.

    Attributes:
        stray: faults that belong to none of the records.
        num_unused_pictures: files that no record names, whatever its language.
    """

    stray: FaultCollector
    records: list[CollectedRecord]
    num_unused_pictures: int


def read_own_folder(request: ReadRequest, intake: Intake, *, long: bool = False) -> Iterator[Entry]:
    """Yield the records of one language.

    Faults of other languages stop the reading too, but are no exclusions of this one.

    Args:
        long: take `long_captions` in place of `captions`; a record without one is a fault.
    """
    collected = _collect(request, intake)
    intake.faults.extend(collected.stray)
    if collected.num_unused_pictures:
        intake.notes["pictures_without_a_record"] = collected.num_unused_pictures
    for item in collected.records:
        record = item.record
        is_asked_for = record is None or record.lang == request.lang
        if is_asked_for or not intake.exclude:
            intake.faults.extend(item.faults)
            intake.faults_of_samples += item.faults.total - (record is None)
        if record is not None and is_asked_for:
            yield Entry(
                place=record.place,
                name=record.name,
                captions=record.long_captions if long else record.captions,
                picture=record.picture,
                key=record.key,
                is_sound=not item.faults.total,
            )


def find_own_languages(request: ReadRequest, intake: Intake) -> tuple[str, ...]:
    """The languages of a folder, in the order in which they first come; its faults are told later.

    Raises: ValueError for a folder that has no records; DataFaults where all of them are broken.
    """
    collected = _collect(request, intake)
    languages = dict.fromkeys(
        item.record.lang for item in collected.records if item.record is not None
    )
    if not languages:
        faults = FaultCollector()
        for found in (collected.stray, *(item.faults for item in collected.records)):
            faults.extend(found)
        faults.raise_if_any(str(request.folder))
        raise ValueError(f"{request.folder} has no records. Each picture needs one.")
    return tuple(languages)


def _collect(request: ReadRequest, intake: Intake) -> _Collected:
    """Read the folder, once for all languages."""
    how = (request.folder, request.images, request.require_pictures, request.ignored_fields)
    if how not in intake.cache.records:
        stray = FaultCollector()
        records = collect_captioned(
            request.folder,
            stray,
            images=request.images,
            require_pictures=request.require_pictures,
            ignored_fields=request.ignored_fields,
        )
        intake.cache.records[how] = _Collected(stray, records, _count_unused(request, records))
    collected: _Collected = intake.cache.records[how]
    return collected


def _count_unused(request: ReadRequest, records: Iterable[CollectedRecord]) -> int:
    """How many pictures lie there that no record names, where pictures are files and wanted."""
    used = {
        item.record.picture
        for item in records
        if item.record is not None and isinstance(item.record.picture, Path)
    }
    if not (used and request.require_pictures):
        return 0
    folder = request.folder if request.folder.is_dir() else request.folder.parent
    lying = (request.images or folder).rglob("*")
    named = {os.path.normpath(path) for path in used}
    return sum(
        file.suffix.lower().removeprefix(".") in PICTURE_SUFFIXES
        and os.path.normpath(file) not in named
        for file in lying
    )


def read_emoji(request: ReadRequest, intake: Intake) -> Iterator[Entry]:
    """Yield one picture of each emoji that the demo holds out, with its name in one language."""
    if "emoji" not in intake.cache.records:
        intake.cache.records["emoji"] = _choose_emoji()
    tested, captions = intake.cache.records["emoji"]
    intake.notes["seed"] = EMOJI_SEED
    for record in tested:
        yield Entry(
            place="captions.jsonl",
            name=record.name,
            captions=captions[record.name, request.lang],
            picture=record.picture,
            key=record.key,
        )


def _choose_emoji() -> tuple[list[CaptionedImage], dict[tuple[str, str], tuple[str, ...]]]:
    """The records that test English, and of each picture and language the first caption."""
    records = read_captioned(find_example_data() / "emoji")
    english = [record for record in records if record.lang == "en"]
    held_out = hold_out(english, seed=EMOJI_SEED)
    tested = [english[row] for row in choose_test_rows(english, held_out)]
    return tested, {(record.name, record.lang): record.captions[:1] for record in records}
