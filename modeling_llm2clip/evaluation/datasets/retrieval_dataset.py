"""Builds a retrieval set from what a reader found: checks, exclusions, counts, correspondence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from ...data.image_sources import ImageSource
from ...data.records import clean_text
from ..metrics.correspondence import Correspondence
from .dataset_spec import DatasetSpec, ReadRequest
from .schema import RetrievalDataset
from .validation import DatasetValidator


@dataclass(frozen=True)
class RawRecord:
    """An image and its captions, as the publisher's files have them.

    Attributes:
        place: where it is written, for errors.
        name: of the image; its path below the folder of images unless `image` is given.
        captions: as they are written.
        image: where it lies, when the reader knows.
        group_id: what is shown; None for `name`. Images of one group share their captions.
        is_sound: False when the reader has told an error of it already.
    """

    place: str
    name: str
    captions: tuple[str, ...]
    image: ImageSource | None = None
    group_id: str | None = None
    is_sound: bool = True


EntryReader: TypeAlias = Callable[[ReadRequest, DatasetValidator], Iterable[RawRecord]]


def build_retrieval_dataset(
    card: DatasetSpec, request: ReadRequest, intake: DatasetValidator, *, read: EntryReader
) -> RetrievalDataset:
    """Read every entry, check it, and put what is left together.

    Raises:
        DataValidationError: every error, unless they are excluded.
        ValueError: nothing is left.
    """
    has_images = request.require_images and card.kind == "retrieval"
    read_entries = list(read(request, intake))
    num_lost = intake.count_lost()
    entries: list[RawRecord] = []
    names: set[str] = set()
    for entry in read_entries:
        checked = _check_entry(card, entry, intake, request if has_images else None)
        if checked.name in names:
            intake.errors.add("image repeated", f"{entry.place}: {entry.name}")
            checked = replace(checked, is_sound=False)
        names.add(checked.name)
        entries.append(checked)
    found = {"images": len(entries), "captions": sum(len(entry.captions) for entry in entries)}
    if has_images and request.check_images:
        unreadable = intake.find_unreadable_images(
            (entry.image for entry in entries), show_progress=request.show_progress
        )
        entries = [
            replace(entry, is_sound=False) if entry.image in unreadable else entry
            for entry in entries
        ]
    intake.compare_counts(found, card.published_counts(request.lang))
    intake.compare_checksums(card.checksums)
    excluded = intake.finish()
    sound = [entry for entry in entries if entry.is_sound]
    intake.notes["skipped_samples"] = num_lost + len(entries) - len(sound)
    return _assemble(card, request, intake, sound, excluded)


def find_image(image_dir: Path, name: str) -> Path | None:
    """The image of this name, or of its last part: many keep the images without subfolders."""
    for candidate in (image_dir / name, image_dir / Path(name).name):
        if candidate.is_file():
            return candidate
    return None


def _check_entry(
    card: DatasetSpec, entry: RawRecord, intake: DatasetValidator, request: ReadRequest | None
) -> RawRecord:
    """Clean the captions and find the image; a request is given where images are wanted."""
    found = []
    image = entry.image
    if request is not None and image is None and entry.is_sound:
        image = find_image(request.image_dir or request.folder, entry.name)
        if image is None:
            found.append("image missing")
    wanted = card.captions_per_image
    captions = [clean_text(caption) for caption in entry.captions[:wanted]]
    if entry.is_sound and not captions:
        found.append("no caption")
    if entry.is_sound and not all(captions):
        found.append("blank caption")
    if captions and wanted is not None and len(captions) < wanted:
        found.append(f"fewer than {wanted} captions")
    for kind in found:
        intake.errors.add(kind, f"{entry.place}: {entry.name}")
    return replace(
        entry,
        captions=tuple(captions),
        image=None if request is None else image,
        is_sound=entry.is_sound and not found,
    )


def _assemble(
    card: DatasetSpec,
    request: ReadRequest,
    intake: DatasetValidator,
    entries: list[RawRecord],
    excluded: dict[str, int],
) -> RetrievalDataset:
    if not entries:
        raise ValueError(f"{intake.source}: nothing is left; every image has an error: {excluded}")
    texts_of_group: dict[str, list[str]] = {}
    for entry in entries:
        group_id = entry.name if entry.group_id is None else entry.group_id
        if group_id not in texts_of_group:
            texts_of_group[group_id] = list(entry.captions)
        else:  # another image of the same thing: what is said of both is one caption
            texts = texts_of_group[group_id]
            texts += [caption for caption in entry.captions if caption not in texts]
    captions = [text for texts in texts_of_group.values() for text in texts]
    correspondence = Correspondence.from_group_ids(
        [entry.name if entry.group_id is None else entry.group_id for entry in entries],
        [group_id for group_id, texts in texts_of_group.items() for _ in texts],
    )
    images = tuple(entry.image for entry in entries if entry.image is not None)
    protocol = {
        "set": card.name,
        "lang": request.lang,
        **card.protocol,
        "images": len(entries),
        "with_images": bool(images),
        "captions": len(captions),
        "published": card.published_counts(request.lang),
        "captions_per_image": card.captions_per_image or "all",
        "captions_of_several_images": _count_shared(texts_of_group),
        "excluded": excluded,
        **intake.notes,
    }
    return RetrievalDataset(
        name=card.name,
        images=images,
        image_names=tuple(entry.name for entry in entries),
        captions=tuple(captions),
        correspondence=correspondence,
        lang=request.lang,
        protocol=protocol,
        image_group_ids=tuple(
            entry.name if entry.group_id is None else entry.group_id for entry in entries
        ),
    )


def _count_shared(texts_of_group: dict[str, list[str]]) -> int:
    """How many different texts are captions of several groups, so that rank 1 is luck for them."""
    groups_of_text: dict[str, set[str]] = {}
    for group_id, texts in texts_of_group.items():
        for text in texts:
            groups_of_text.setdefault(text, set()).add(group_id)
    return sum(len(group_ids) > 1 for group_ids in groups_of_text.values())
