"""Read compositional choices between captions: SugarCrepe, its text-only form, and Winoground."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...data.images.image_sources import ImageSource, ParquetImage
from ...data.records.records import clean_text
from ...data.sources.coco import read_coco
from ...data.sources.json_files import read_json, read_json_lines
from ...data.sources.parquet import iterate_rows
from .caption_readers import COCO_ADVICE, COCO_FILES
from .dataset_spec import ChoiceForm, DatasetReading, EvaluationDataset, find_image

_SUGARCREPE_CATEGORIES = (
    "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj",
)  # fmt: skip
_WINOGROUND_IMAGES = ("image_0", "image_1")


@dataclass(frozen=True)
class ChoiceItem:
    """One question of a compositional dataset, in one of the forms listed at `ChoiceDataset`.

    Attributes:
        name: Unique name of the item, by which embeddings of its images are looked up.
        category: How the two captions differ; each category is also scored separately.
        captions: In form `images`, the first belongs to the first image and the second to the
            second image. In the other forms, the first is true and the second is false.
        images: The item's images: two in form `images`, one in form `image`, none in form `text`.
        anchor: In form `text`, another true caption that replaces the image.
        image_names: Paths in the image folder, from readers that do not set `images`. In form
            `text`, the path of the image that the texts describe.
        place: Location in the source, for error messages.
    """

    name: str
    category: str
    captions: tuple[str, str]
    images: tuple[ImageSource, ...] = ()
    anchor: str | None = None
    image_names: tuple[str, ...] = ()
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class ChoiceDataset(EvaluationDataset):
    """Questions that only a model sensitive to word order and relations can answer.

    There are three forms. `image` has one image with a true and a false caption (SugarCrepe),
    `images` has two images and two captions (Winoground), and `text` is like `image` but replaces
    the image with another true caption.
    """

    form: ChoiceForm
    items: tuple[ChoiceItem, ...]

    @property
    def has_images(self) -> bool:
        return self.form != "text"

    def list_content(self) -> list[Any]:
        return [[item.name, item.captions, item.anchor, list(item.images)] for item in self.items]


def build_choice_dataset(reading: DatasetReading) -> ChoiceDataset:
    """Read every question, check it, and keep the valid ones."""
    spec, form = reading.spec, reading.spec.form
    if form != "text" and not reading.require_images:
        raise ValueError(
            f"{spec.name} cannot be read without its images. Pass their folder, or use the "
            "text-only dataset sugarcrepe-text."
        )
    published = list(spec.read(reading))
    num_lost = reading.count_lost()
    items, names = [], set()
    for item in published:
        items.append(_check_item(item, reading, is_repeated=item.name in names))
        names.add(item.name)
    images = (image for item in items if item for image in item.images)
    unreadable = reading.find_unreadable_images(images)
    skipped = reading.finish({"items": len(published)})
    kept = tuple(item for item in items if item and not unreadable & set(item.images))
    if not kept:
        raise ValueError(f"{reading.source}: every item has an error, so none is left: {skipped}")
    protocol = {
        "dataset": spec.name,
        "lang": reading.lang,
        **spec.protocol,
        "form": form,
        "items": len(kept),
        "published": spec.list_published_counts(reading.lang),
        "skipped": skipped,
        "skipped_samples": num_lost + len(items) - len(kept),
        **reading.notes,
    }
    return ChoiceDataset(
        name=spec.name, form=form, items=kept, lang=reading.lang, protocol=protocol
    )


def _check_item(
    item: ChoiceItem, reading: DatasetReading, *, is_repeated: bool
) -> ChoiceItem | None:
    """Clean an item's texts and find its images; return None if the item is invalid."""
    first, second = (clean_text(caption) for caption in item.captions)
    anchor = None if item.anchor is None else clean_text(item.anchor)
    kinds = ["item repeated"] if is_repeated else []
    if not (first and second) or anchor == "":
        kinds.append("blank caption")
    elif first == second:
        kinds.append("the two captions are the same")
    images = item.images
    if item.image_names and anchor is None:
        image_dir = reading.image_dir or reading.data_folder
        candidates = [find_image(image_dir, name) for name in item.image_names]
        images = tuple(image for image in candidates if image is not None)
        if len(images) < len(candidates):
            kinds.append("image missing")
    for kind in kinds:
        reading.errors.add(kind, f"{item.place}: {' '.join(item.image_names) or item.name}")
    if kinds:
        return None
    return replace(item, captions=(first, second), images=images, anchor=anchor)


def read_sugarcrepe(reading: DatasetReading) -> Iterator[ChoiceItem]:
    """Yield items with a caption and a hard negative of a COCO image, one category at a time."""
    for category in _SUGARCREPE_CATEGORIES:
        file = reading.find_file(
            f"{category}.json",
            f"data/{category}.json",
            advice="Pass the folder `data` of github.com/RAIVNLab/sugar-crepe.",
        )
        items = read_json(file)
        if not isinstance(items, dict):
            raise ValueError(f"{file} must be a JSON object of items. Download it again.")
        for number, item in items.items():
            place = f"{file.name} {number}"
            fields: dict[str, Any] = item if isinstance(item, dict) else {}
            texts = [fields.get(name) for name in ("filename", "caption", "negative_caption")]
            if all(isinstance(text, str) for text in texts):
                image, true, false = map(str, texts)
                name = f"{category}/{number}"
                yield ChoiceItem(name, category, (true, false), image_names=(image,), place=place)
            else:
                reading.errors.add("no 'filename', 'caption' and 'negative_caption'", place)


def read_sugarcrepe_text(reading: DatasetReading) -> Iterator[ChoiceItem]:
    """Yield SugarCrepe's items with another caption of the image as the anchor.

    The anchor is the first of the image's captions in COCO's own file that differs from the true
    caption.
    """
    file = reading.find_file(*COCO_FILES, advice=COCO_ADVICE)
    captions = {
        raw.fields.get("file_name"): raw.fields["captions"]
        for raw in read_coco(file, reading.errors)
    }
    for item in read_sugarcrepe(reading):
        true = clean_text(item.captions[0])
        others = (clean_text(caption) for caption in captions.get(item.image_names[0], ()))
        anchor = next((text for text in others if text and text != true), None)
        if anchor is None:
            reading.errors.add("no other caption of the image", item.place)
        else:
            yield replace(item, anchor=anchor)


def read_winoground(reading: DatasetReading) -> Iterator[ChoiceItem]:
    """Yield the items; `collapsed_tag`, which says how the captions differ, is the category."""
    for place, fields in _iterate_winoground(reading):
        first, second = (fields.get(name) for name in ("caption_0", "caption_1"))
        paths = [fields.get(name) for name in _WINOGROUND_IMAGES]
        images = tuple(image for image in paths if isinstance(image, ParquetImage | Path))
        if not isinstance(first, str) or not isinstance(second, str):
            reading.errors.add("no 'caption_0' and 'caption_1'", place)
        elif len(images) < len(_WINOGROUND_IMAGES):
            reading.errors.add("image missing", place)
        else:
            name, category = str(fields.get("id", place)), str(fields.get("collapsed_tag") or "all")
            yield ChoiceItem(name, category, (first, second), images, place=place)


def _iterate_winoground(reading: DatasetReading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield items from Parquet files, or from `examples.jsonl` and the unpacked `images.zip`."""
    if tables := reading.list_parquet_files():
        yield from iterate_rows(tables, reading.data_folder, reading.errors)
        return
    lines = reading.find_file(
        "examples.jsonl",
        "data/examples.jsonl",
        advice="Accept the license at huggingface.co/datasets/facebook/winoground to download it.",
    )
    image_dir = reading.image_dir or lines.parent / "images"
    for raw in read_json_lines(lines, reading.errors):
        images = {}
        for name in _WINOGROUND_IMAGES:  # their file names may lack the suffix
            paths = [image_dir / f"{raw.fields.get(name)}{end}" for end in ("", ".png", ".jpg")]
            images[name] = next((path for path in paths if path.is_file()), None)
        yield raw.place, {**raw.fields, **images}
