"""Builds a compositional set from what a reader found: checks, exclusions, counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ...data.captioned_images import clean_text
from ...data.pictures import Picture
from .card import ReadRequest, SetCard
from .intake import Intake
from .retrieval import find_picture
from .schema import ChoiceForm, ChoiceItem, ChoiceSet


@dataclass(frozen=True)
class ChoiceEntry:
    """A question as the publisher's files have it.

    Attributes:
        place: where it is written, for faults.
        name, category: as in `ChoiceItem`.
        captions: two texts as they are written.
        picture_names: paths below the folder of pictures; as many as the form needs.
        pictures: where they lie, when the reader knows.
        anchor: in form `text`, another caption of the picture.
    """

    place: str
    name: str
    category: str
    captions: tuple[str, str]
    picture_names: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    anchor: str | None = None


ChoiceReader: TypeAlias = Callable[[ReadRequest, Intake], Iterable[ChoiceEntry]]


def build_choice_set(
    card: SetCard, request: ReadRequest, intake: Intake, *, form: ChoiceForm, read: ChoiceReader
) -> ChoiceSet:
    """Read every question, check it, and keep those that are whole.

    Raises:
        DataFaults: every fault, unless they are excluded.
        ValueError: nothing is left, or pictures are not wanted of a form that needs them.
    """
    if form != "text" and not request.require_pictures:
        raise ValueError(
            f"{card.name} cannot be read without its pictures. Give them, or take a set of texts: "
            "sugarcrepe-text."
        )
    entries = list(read(request, intake))
    num_lost = intake.count_lost()
    items = [_check_entry(entry, form, request, intake) for entry in entries]
    if request.check_pictures:
        pictures = (picture for item in items if item for picture in item.pictures)
        unreadable = intake.find_unreadable(pictures, show_progress=request.show_progress)
        items = [None if item and unreadable & set(item.pictures) else item for item in items]
    intake.compare_counts({"items": len(entries)}, card.published_counts(request.lang))
    intake.compare_checksums(card.checksums)
    excluded = intake.finish()
    kept = tuple(item for item in items if item is not None)
    if not kept:
        raise ValueError(f"{intake.source}: nothing is left; every item has a fault: {excluded}")
    protocol = {
        "set": card.name,
        "lang": request.lang,
        **card.protocol,
        "form": form,
        "items": len(kept),
        "published": card.published_counts(request.lang),
        "excluded": excluded,
        "excluded_samples": num_lost + len(items) - len(kept),
        **intake.notes,
    }
    return ChoiceSet(card.name, form, kept, request.lang, protocol)


def _check_entry(
    entry: ChoiceEntry, form: ChoiceForm, request: ReadRequest, intake: Intake
) -> ChoiceItem | None:
    """Clean the texts and find the pictures; None where there is a fault."""
    first, second = (clean_text(caption) for caption in entry.captions)
    anchor = None if entry.anchor is None else clean_text(entry.anchor)
    found = []
    if not (first and second) or anchor == "":
        found.append("blank caption")
    elif first == second:
        found.append("the two captions are the same")
    pictures = entry.pictures
    if form != "text" and not pictures:
        images = request.images or request.folder
        candidates = [find_picture(images, name) for name in entry.picture_names]
        pictures = tuple(picture for picture in candidates if picture is not None)
        if not pictures or len(pictures) < len(candidates):
            found.append("picture missing")
    for kind in found:
        intake.faults.add(kind, f"{entry.place}: {' '.join(entry.picture_names) or entry.name}")
    if found:
        return None
    return ChoiceItem(
        name=entry.name,
        category=entry.category,
        captions=(first, second),
        pictures=() if form == "text" else pictures,
        anchor=anchor,
    )
