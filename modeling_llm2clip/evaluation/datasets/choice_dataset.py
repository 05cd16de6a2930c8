"""Builds a compositional set from what a reader found: checks, exclusions, counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ...data.image_sources import ImageSource
from ...data.records import clean_text
from .dataset_spec import DatasetSpec, ReadRequest
from .retrieval_dataset import find_image
from .schema import ChoiceDataset, ChoiceForm, ChoiceItem
from .validation import DatasetValidator


@dataclass(frozen=True)
class ChoiceEntry:
    """A question as the publisher's files have it.

    Attributes:
        place: where it is written, for errors.
        name, category: as in `ChoiceItem`.
        captions: two texts as they are written.
        image_names: paths below the folder of images; as many as the form needs.
        images: where they lie, when the reader knows.
        anchor: in form `text`, another caption of the image.
    """

    place: str
    name: str
    category: str
    captions: tuple[str, str]
    image_names: tuple[str, ...] = ()
    images: tuple[ImageSource, ...] = ()
    anchor: str | None = None


ChoiceReader: TypeAlias = Callable[[ReadRequest, DatasetValidator], Iterable[ChoiceEntry]]


def build_choice_dataset(
    card: DatasetSpec,
    request: ReadRequest,
    intake: DatasetValidator,
    *,
    form: ChoiceForm,
    read: ChoiceReader,
) -> ChoiceDataset:
    """Read every question, check it, and keep those that are whole.

    Raises:
        DataValidationError: every error, unless they are excluded.
        ValueError: nothing is left, or images are not wanted of a form that needs them.
    """
    if form != "text" and not request.require_images:
        raise ValueError(
            f"{card.name} cannot be read without its images. Give them, or take a set of texts: "
            "sugarcrepe-text."
        )
    entries = list(read(request, intake))
    num_lost = intake.count_lost()
    items = [_check_entry(entry, form, request, intake) for entry in entries]
    if request.check_images:
        images = (image for item in items if item for image in item.images)
        unreadable = intake.find_unreadable_images(images, show_progress=request.show_progress)
        items = [None if item and unreadable & set(item.images) else item for item in items]
    intake.compare_counts({"items": len(entries)}, card.published_counts(request.lang))
    intake.compare_checksums(card.checksums)
    excluded = intake.finish()
    kept = tuple(item for item in items if item is not None)
    if not kept:
        raise ValueError(f"{intake.source}: nothing is left; every item has an error: {excluded}")
    protocol = {
        "set": card.name,
        "lang": request.lang,
        **card.protocol,
        "form": form,
        "items": len(kept),
        "published": card.published_counts(request.lang),
        "excluded": excluded,
        "skipped_samples": num_lost + len(items) - len(kept),
        **intake.notes,
    }
    return ChoiceDataset(card.name, form, kept, request.lang, protocol)


def _check_entry(
    entry: ChoiceEntry, form: ChoiceForm, request: ReadRequest, intake: DatasetValidator
) -> ChoiceItem | None:
    """Clean the texts and find the images; None where there is an error."""
    first, second = (clean_text(caption) for caption in entry.captions)
    anchor = None if entry.anchor is None else clean_text(entry.anchor)
    found = []
    if not (first and second) or anchor == "":
        found.append("blank caption")
    elif first == second:
        found.append("the two captions are the same")
    images = entry.images
    if form != "text" and not images:
        image_dir = request.image_dir or request.folder
        candidates = [find_image(image_dir, name) for name in entry.image_names]
        images = tuple(image for image in candidates if image is not None)
        if not images or len(images) < len(candidates):
            found.append("image missing")
    for kind in found:
        intake.errors.add(kind, f"{entry.place}: {' '.join(entry.image_names) or entry.name}")
    if found:
        return None
    return ChoiceItem(
        name=entry.name,
        category=entry.category,
        captions=(first, second),
        images=() if form == "text" else images,
        anchor=anchor,
    )
