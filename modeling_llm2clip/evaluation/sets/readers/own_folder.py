"""Reads a folder of one's own, in any format of `data/captioned_sources.py`, and the emoji."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ....data.captioned_images import CaptionedImage
from ....data.captioned_sources import collect_captioned, read_captioned
from ....data.example_data import find_example_data
from ....data.faults import FaultCollector
from ....data.splits import choose_test_rows, hold_out
from ..card import ReadRequest
from ..intake import Intake
from ..retrieval import Entry

# What `llm2clip demo` holds out unless it is given another seed.
EMOJI_SEED = 0


def read_own_folder(request: ReadRequest, intake: Intake, *, long: bool = False) -> Iterator[Entry]:
    """Yield the records of one language.

    Args:
        long: take `long_captions` in place of `captions`; a record without one is a fault.
    """
    records = collect_captioned(
        request.folder,
        intake.faults,
        images=request.images,
        require_pictures=request.require_pictures,
        ignored_fields=request.ignored_fields,
    )
    for record, is_sound in records:
        if record.lang == request.lang:
            captions = record.long_captions if long else record.captions
            yield Entry(
                place=str(request.folder.name),
                name=record.name,
                captions=captions,
                picture=record.picture,
                key=record.key,
                is_sound=is_sound,
            )


def find_own_languages(request: ReadRequest) -> tuple[str, ...]:
    """The languages of a folder, in the order in which they first come; its faults are told later.

    Raises: ValueError for a folder that has no records.
    """
    records = collect_captioned(
        request.folder,
        FaultCollector(),
        images=request.images,
        require_pictures=False,
        ignored_fields=request.ignored_fields,
    )
    if not records:
        raise ValueError(f"{request.folder} has no records. Each picture needs one.")
    return tuple(dict.fromkeys(record.lang for record, _ in records))


def read_emoji(request: ReadRequest, intake: Intake) -> Iterator[Entry]:
    """Yield one picture of each emoji that the demo holds out, with its name in one language."""
    records = read_captioned(find_example_data() / "emoji")
    english = [record for record in records if record.lang == "en"]
    held_out = hold_out(english, seed=EMOJI_SEED)
    tested = [english[row] for row in choose_test_rows(english, held_out)]
    captions = {(record.name, record.lang): record.captions[:1] for record in records}
    intake.notes["seed"] = EMOJI_SEED
    for record in tested:
        yield _entry_of(replace(record, captions=captions[record.name, request.lang]))


def _entry_of(record: CaptionedImage) -> Entry:
    return Entry(
        "captions.jsonl", record.name, record.captions, picture=record.picture, key=record.key
    )
