"""Builds a retrieval set from what a reader found: checks, exclusions, counts, correspondence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from ...data.captioned_images import clean_text
from ...data.pictures import Picture
from ..metrics.correspondence import Correspondence
from .card import ReadRequest, SetCard
from .intake import Intake
from .schema import RetrievalSet


@dataclass(frozen=True)
class Entry:
    """A picture and its captions, as the publisher's files have them.

    Attributes:
        place: where it is written, for faults.
        name: of the picture; its path below the folder of pictures unless `picture` is given.
        captions: as they are written.
        picture: where it lies, when the reader knows.
        key: what is shown; None for `name`. Pictures of one key share their captions.
        is_sound: False when the reader has told a fault of it already.
    """

    place: str
    name: str
    captions: tuple[str, ...]
    picture: Picture | None = None
    key: str | None = None
    is_sound: bool = True


EntryReader: TypeAlias = Callable[[ReadRequest, Intake], Iterable[Entry]]


def build_retrieval_set(
    card: SetCard, request: ReadRequest, intake: Intake, *, read: EntryReader
) -> RetrievalSet:
    """Read every entry, check it, and put what is left together.

    Raises:
        DataFaults: every fault, unless they are excluded.
        ValueError: nothing is left.
    """
    has_pictures = request.require_pictures and card.kind == "retrieval"
    read_entries = list(read(request, intake))
    num_lost = intake.count_lost()
    entries: list[Entry] = []
    names: set[str] = set()
    for entry in read_entries:
        checked = _check_entry(card, entry, intake, request if has_pictures else None)
        if checked.name in names:
            intake.faults.add("picture repeated", f"{entry.place}: {entry.name}")
            checked = replace(checked, is_sound=False)
        names.add(checked.name)
        entries.append(checked)
    found = {"pictures": len(entries), "captions": sum(len(entry.captions) for entry in entries)}
    if has_pictures and request.check_pictures:
        unreadable = intake.find_unreadable(
            (entry.picture for entry in entries), show_progress=request.show_progress
        )
        entries = [
            replace(entry, is_sound=False) if entry.picture in unreadable else entry
            for entry in entries
        ]
    intake.compare_counts(found, card.published_counts(request.lang))
    intake.compare_checksums(card.checksums)
    excluded = intake.finish()
    sound = [entry for entry in entries if entry.is_sound]
    intake.notes["excluded_samples"] = num_lost + len(entries) - len(sound)
    return _assemble(card, request, intake, sound, excluded)


def find_picture(images: Path, name: str) -> Path | None:
    """The picture of this name, or of its last part: many keep the pictures without subfolders."""
    for candidate in (images / name, images / Path(name).name):
        if candidate.is_file():
            return candidate
    return None


def _check_entry(card: SetCard, entry: Entry, intake: Intake, request: ReadRequest | None) -> Entry:
    """Clean the captions and find the picture; a request is given where pictures are wanted."""
    found = []
    picture = entry.picture
    if request is not None and picture is None and entry.is_sound:
        picture = find_picture(request.images or request.folder, entry.name)
        if picture is None:
            found.append("picture missing")
    wanted = card.captions_per_picture
    captions = [clean_text(caption) for caption in entry.captions[:wanted]]
    if entry.is_sound and not captions:
        found.append("no caption")
    if entry.is_sound and not all(captions):
        found.append("blank caption")
    if captions and wanted is not None and len(captions) < wanted:
        found.append(f"fewer than {wanted} captions")
    for kind in found:
        intake.faults.add(kind, f"{entry.place}: {entry.name}")
    return replace(
        entry,
        captions=tuple(captions),
        picture=None if request is None else picture,
        is_sound=entry.is_sound and not found,
    )


def _assemble(
    card: SetCard,
    request: ReadRequest,
    intake: Intake,
    entries: list[Entry],
    excluded: dict[str, int],
) -> RetrievalSet:
    if not entries:
        raise ValueError(f"{intake.source}: nothing is left; every picture has a fault: {excluded}")
    texts_of_key: dict[str, list[str]] = {}
    for entry in entries:
        key = entry.name if entry.key is None else entry.key
        if key not in texts_of_key:
            texts_of_key[key] = list(entry.captions)
        else:  # another picture of the same thing: what is said of both is one caption
            texts = texts_of_key[key]
            texts += [caption for caption in entry.captions if caption not in texts]
    captions = [text for texts in texts_of_key.values() for text in texts]
    correspondence = Correspondence.from_keys(
        [entry.name if entry.key is None else entry.key for entry in entries],
        [key for key, texts in texts_of_key.items() for _ in texts],
    )
    pictures = tuple(entry.picture for entry in entries if entry.picture is not None)
    protocol = {
        "set": card.name,
        "lang": request.lang,
        **card.protocol,
        "pictures": len(entries),
        "with_pictures": bool(pictures),
        "captions": len(captions),
        "published": card.published_counts(request.lang),
        "captions_per_picture": card.captions_per_picture or "all",
        "captions_of_several_pictures": _count_shared(texts_of_key),
        "excluded": excluded,
        **intake.notes,
    }
    return RetrievalSet(
        name=card.name,
        pictures=pictures,
        picture_names=tuple(entry.name for entry in entries),
        captions=tuple(captions),
        correspondence=correspondence,
        lang=request.lang,
        protocol=protocol,
        picture_keys=tuple(entry.name if entry.key is None else entry.key for entry in entries),
    )


def _count_shared(texts_of_key: dict[str, list[str]]) -> int:
    """How many different texts are captions of several keys, so that rank 1 is luck for them."""
    keys_of_text: dict[str, set[str]] = {}
    for key, texts in texts_of_key.items():
        for text in texts:
            keys_of_text.setdefault(text, set()).add(key)
    return sum(len(keys) > 1 for keys in keys_of_text.values())
