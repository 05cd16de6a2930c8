"""Build datasets for image-text retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...data.captions.caption_groups import CaptionGroup
from ...data.images.image_sources import ImageSource
from ...data.records.records import CaptionedImage, clean_text
from ...data.validation_errors import ErrorCollector
from ..metrics.correspondence import Correspondence
from .dataset_spec import DatasetReading, EvaluationDataset, find_image


@dataclass(frozen=True, kw_only=True)
class RetrievalDataset(EvaluationDataset):
    """Images and captions for retrieval: images by caption, and captions by image.

    Attributes:
        images: Empty if the dataset was read or published without images.
        image_names: Unique name of each image, even if `images` is empty.
        captions: Captions, one line each; the same text may occur again for another image.
        image_group_ids: Group of each image; empty if it is the image's name.
    """

    images: tuple[ImageSource, ...]
    image_names: tuple[str, ...]
    captions: tuple[str, ...]
    correspondence: Correspondence
    image_group_ids: tuple[str, ...] = ()

    @property
    def has_images(self) -> bool:
        return bool(self.images)

    @property
    def group_ids(self) -> tuple[str, ...]:
        """Group of each image; images in a group share their captions."""
        return self.image_group_ids or self.image_names

    def number_groups(self) -> Tensor:
        """Return the group number of each image, (num_images,) int64, from 0 in group order."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(g, len(numbers)) for g in self.group_ids])

    @property
    def records(self) -> list[CaptionedImage]:
        texts = self.correspondence.texts_of_images()
        return [
            CaptionedImage(
                image=self.images[row] if self.images else None,
                name=name,
                group_id=group_id,
                captions=tuple(self.captions[text] for text in texts.of(row).tolist()),
                lang=self.lang,
                place=f"{self.name} image {name}",
            )
            for row, (name, group_id) in enumerate(
                zip(self.image_names, self.group_ids, strict=True)
            )
        ]

    def group_captions(self) -> list[CaptionGroup]:
        """Group the captions by image, in the dataset's order, to evaluate a text encoder.

        A repeated caption of an image is kept once, because it would retrieve itself. Images that
        share all their captions form one group, named after the group's first image.
        """
        texts = self.correspondence.texts_of_images()
        groups: dict[tuple[int, ...], CaptionGroup] = {}
        for image, name in enumerate(self.image_names):
            rows = tuple(texts.of(image).tolist())
            captions = tuple(dict.fromkeys(self.captions[row] for row in rows))
            groups.setdefault(rows, CaptionGroup(name, captions))
        return list(groups.values())

    def list_content(self) -> list[Any]:
        pairs = (self.correspondence.image_of_pair, self.correspondence.text_of_pair)
        rows = [of_pair.tolist() for of_pair in pairs]
        return [self.image_names, self.captions, *rows, list(self.images)]


@dataclass(frozen=True, slots=True)
class PublishedRecord:
    """An image and its captions as read from the publisher's files.

    Attributes:
        place: Location in the source, for error messages.
        name: Name of the image, and its path in the image folder unless `image` is set.
        group_id: Group whose images share their captions. Default: `name`.
        is_valid: False if the reader already reported an error for the record.
    """

    place: str
    name: str
    captions: tuple[str, ...]
    image: ImageSource | None = None
    group_id: str | None = None
    is_valid: bool = True

    @property
    def group(self) -> str:
        return self.name if self.group_id is None else self.group_id


RecordReader: TypeAlias = Callable[[DatasetReading], Iterable[PublishedRecord]]


def build_retrieval_dataset(reading: DatasetReading) -> RetrievalDataset:
    """Read and check every record, and build a dataset from the valid ones."""
    has_images = reading.require_images and reading.spec.dataset_type == "retrieval"
    records: list[PublishedRecord] = []
    names: set[str] = set()
    errors = ErrorCollector()  # errors found by the checks, separate from reading errors
    for record in reading.spec.read(reading):
        checked = _check_record(record, errors, reading, has_images=has_images)
        if checked.name in names:
            errors.add("image repeated", f"{record.place}: {record.name}")
            checked = replace(checked, is_valid=False)
        names.add(checked.name)
        records.append(checked)
    num_lost = reading.count_lost()
    reading.errors.extend(errors)
    num_captions = sum(len(record.captions) for record in records)
    counts = {"images": len(records), "captions": num_captions}
    images = (record.image for record in records if has_images)
    unreadable = reading.find_unreadable_images(images)
    skipped = reading.finish(counts)
    valid = [record for record in records if record.is_valid and record.image not in unreadable]
    reading.notes["skipped_samples"] = num_lost + len(records) - len(valid)
    return _assemble(reading, valid, skipped)


def _check_record(
    record: PublishedRecord, errors: ErrorCollector, reading: DatasetReading, *, has_images: bool
) -> PublishedRecord:
    kinds = []
    image = record.image
    if has_images and image is None and record.is_valid:
        image_dir = reading.image_dir or reading.folder
        if image_dir is not None and not isinstance(image_dir, str):
            image = find_image(image_dir, record.name)
        if image is None:
            kinds.append("image missing")
    num_captions = reading.spec.captions_per_image
    captions = [clean_text(caption) for caption in record.captions[:num_captions]]
    if record.is_valid and not captions:
        kinds.append("no caption")
    if record.is_valid and not all(captions):
        kinds.append("blank caption")
    if captions and num_captions is not None and len(captions) < num_captions:
        kinds.append(f"fewer than {num_captions} captions")
    for kind in kinds:
        errors.add(kind, f"{record.place}: {record.name}")
    return replace(
        record,
        captions=tuple(captions),
        image=image if has_images else None,
        is_valid=record.is_valid and not kinds,
    )


def _assemble(
    reading: DatasetReading, records: list[PublishedRecord], skipped: dict[str, int]
) -> RetrievalDataset:
    spec = reading.spec
    if not records:
        raise ValueError(f"{reading.source}: every image has an error, so none is left: {skipped}")
    texts_of_group: dict[str, list[str]] = {}
    for record in records:
        if record.group not in texts_of_group:
            texts_of_group[record.group] = list(record.captions)
        else:  # another image in the group: texts that both have are one caption
            texts = texts_of_group[record.group]
            texts += [caption for caption in record.captions if caption not in texts]
    captions = [text for texts in texts_of_group.values() for text in texts]
    image_group_ids = tuple(record.group for record in records)
    correspondence = Correspondence.from_group_ids(
        image_group_ids,
        [group for group, texts in texts_of_group.items() for _ in texts],
    )
    images = tuple(record.image for record in records if record.image is not None)
    protocol = {
        "dataset": spec.name,
        "lang": reading.lang,
        **spec.protocol,
        "images": len(records),
        "with_images": bool(images),
        "captions": len(captions),
        "published": spec.list_published_counts(reading.lang),
        "captions_per_image": spec.captions_per_image or "all",
        "captions_of_several_images": _count_shared(texts_of_group),
        "skipped": skipped,
        **reading.notes,
    }
    return RetrievalDataset(
        name=spec.name,
        images=images,
        image_names=tuple(record.name for record in records),
        captions=tuple(captions),
        correspondence=correspondence,
        lang=reading.lang,
        protocol=protocol,
        image_group_ids=image_group_ids,
    )


def _count_shared(texts_of_group: dict[str, list[str]]) -> int:
    """Count the distinct texts that several groups share, for which rank 1 is a matter of luck."""
    first_group: dict[str, str] = {}
    return len(
        {
            text
            for group, texts in texts_of_group.items()
            for text in texts
            if first_group.setdefault(text, group) != group
        }
    )
