"""Compositional choices between captions: what such a dataset is, and how it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...data.images.image_sources import ImageSource
from ...data.records.records import clean_text
from .dataset_spec import ChoiceForm, DatasetSpec, EvaluationDataset, ReadRequest, find_image
from .validation import DatasetValidator

_NUM_IMAGES: Mapping[ChoiceForm, int] = {"image": 1, "images": 2, "text": 0}


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """One question of a compositional dataset.

    Attributes:
        name: Name within the dataset.
        category: What differs between the two captions; each category also has its scores.
        captions: Two texts. In form `images` the first belongs to the first image, the second to
            the second; in the other forms the first is true and the second is false.
        images: Two in form `images`, one in form `image`, none in form `text`.
        anchor: In form `text`, another true caption of the same image, in place of the image.
    """

    name: str
    category: str
    captions: tuple[str, str]
    images: tuple[ImageSource, ...] = ()
    anchor: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChoiceDataset(EvaluationDataset):
    """Questions that take a model which reads word order and relations.

    Attributes:
        form: `image`: one image, a true and a false caption (SugarCrepe); `images`: two of each
            (Winoground); `text`: a caption of the image in place of the image.
        items: At least one.

    Raises:
        ValueError: There are no items, or an item has another form.
    """

    form: ChoiceForm
    items: tuple[ChoiceItem, ...]

    def __post_init__(self) -> None:
        if self.form not in _NUM_IMAGES:
            raise ValueError(
                f"{self.name}: form={self.form!r} must be one of {', '.join(_NUM_IMAGES)}."
            )
        if not self.items:
            raise ValueError(f"{self.name}: there are no items.")
        wanted = (_NUM_IMAGES[self.form], self.form == "text")
        for item in self.items:
            if (len(item.images), item.anchor is not None) != wanted:
                raise ValueError(
                    f"{self.name}: item {item.name} has {len(item.images)} images and anchor "
                    f"{item.anchor!r}; form {self.form!r} has {wanted[0]} images and "
                    f"{'an' if wanted[1] else 'no'} anchor."
                )

    @property
    def has_images(self) -> bool:
        """Whether a model has to encode images for it."""
        return self.form != "text"

    def list_content(self) -> list[Any]:
        """List what its digest covers."""
        return [[item.name, item.captions, item.anchor, list(item.images)] for item in self.items]


@dataclass(frozen=True)
class ChoiceEntry:
    """A question as the publisher's files have it.

    Attributes:
        place: Where it is written, for errors.
        name: Name within the dataset.
        category: What differs between the two captions.
        captions: Two texts as they are written.
        image_names: Paths in the folder of images; as many as the form needs.
        images: Where the images are, if the reader knows.
        anchor: In form `text`, another caption of the image.
    """

    place: str
    name: str
    category: str
    captions: tuple[str, str]
    image_names: tuple[str, ...] = ()
    images: tuple[ImageSource, ...] = ()
    anchor: str | None = None


def build_choice_dataset(
    spec: DatasetSpec,
    request: ReadRequest,
    validator: DatasetValidator,
) -> ChoiceDataset:
    """Read every question, check it, and keep the valid ones.

    Args:
        spec: What is known of the dataset.
        request: How it is to be read.
        validator: Collects the errors.

    Raises:
        DataValidationError: There are errors, and invalid samples are not to be skipped.
        ValueError: No item is left, or a form that needs images is to be read without them.
    """
    form = spec.form
    if form != "text" and not request.require_images:
        raise ValueError(
            f"{spec.name} cannot be read without its images. Name their folder, or take a dataset "
            "of texts: sugarcrepe-text."
        )
    entries = list(spec.read(request, validator))
    num_lost = validator.count_lost()
    items = [_check_entry(entry, form, request, validator) for entry in entries]
    if request.check_images:
        images = (image for item in items if item for image in item.images)
        unreadable = validator.find_unreadable_images(images, show_progress=request.show_progress)
        items = [None if item and unreadable & set(item.images) else item for item in items]
    published = spec.list_published_counts(request.lang)
    validator.compare_counts({"items": len(entries)}, published)
    validator.compare_checksums(spec.checksums)
    skipped = validator.finish()
    kept = tuple(item for item in items if item is not None)
    if not kept:
        raise ValueError(
            f"{validator.source}: no item is left, because each has an error: {skipped}"
        )
    protocol = {
        "dataset": spec.name,
        "lang": request.lang,
        **spec.protocol,
        "form": form,
        "items": len(kept),
        "published": published,
        "skipped": skipped,
        "skipped_samples": num_lost + len(items) - len(kept),
        **validator.notes,
    }
    return ChoiceDataset(
        name=spec.name, form=form, items=kept, lang=request.lang, protocol=protocol
    )


def _check_entry(
    entry: ChoiceEntry, form: ChoiceForm, request: ReadRequest, validator: DatasetValidator
) -> ChoiceItem | None:
    """Clean the texts and find the images; None if there is an error."""
    first, second = (clean_text(caption) for caption in entry.captions)
    anchor = None if entry.anchor is None else clean_text(entry.anchor)
    found = []
    if not (first and second) or anchor == "":
        found.append("blank caption")
    elif first == second:
        found.append("the two captions are the same")
    images = entry.images
    if form != "text" and not images:
        image_dir = request.image_dir or request.data_folder
        candidates = [find_image(image_dir, name) for name in entry.image_names]
        images = tuple(image for image in candidates if image is not None)
        if not images or len(images) < len(candidates):
            found.append("image missing")
    for error in found:
        validator.errors.add(error, f"{entry.place}: {' '.join(entry.image_names) or entry.name}")
    if found:
        return None
    return ChoiceItem(
        name=entry.name,
        category=entry.category,
        captions=(first, second),
        images=() if form == "text" else images,
        anchor=anchor,
    )
