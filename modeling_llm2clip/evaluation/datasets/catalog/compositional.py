"""Compositional choices: SugarCrepe, with images and as texts, and Winoground."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....data.images.image_sources import ImageSource, ParquetImage
from ....data.records.records import clean_text
from ....data.sources.coco import read_coco
from ....data.sources.json_files import read_json, read_json_lines
from ....data.sources.parquet import iterate_rows
from ..choice_dataset import ChoiceEntry
from ..dataset_spec import CLEANED_TEXTS, DatasetSpec, ReadRequest
from ..validation import DatasetValidator
from .caption_readers import COCO_ADVICE, COCO_FILES

_SUGARCREPE_CITATION = "Hsieh et al., SugarCrepe, NeurIPS 2023, arXiv:2306.14610"
_SUGARCREPE_CHECKSUMS = {
    "add_att.json": "sha256:012d88d729693d193760e6f3393b06a1cf874380a9db0062e937201199fe044d",
    "add_obj.json": "sha256:1b9d76b93139a937b8dc1ada92a4f05ecc821bb3c291d752428bafadd4bb0682",
    "replace_att.json": "sha256:9fe55fd4c0a9ad1f85d486d9f6d0215b41f867eb025026e7f7b5ce44352545ee",
    "replace_obj.json": "sha256:9d299600639947e9d15281a9ded1382b376cf4ea088a8d08a1314bfe76e81898",
    "replace_rel.json": "sha256:356bcc2fc4c6aed3f4d9fd50acc58489bb1fe70c28791f9368d4cbf9ea39cdc9",
    "swap_att.json": "sha256:7a7ce04e5c4c80412b48c6f0c1347fb1a2f5d54c0be6aa429b64d390e442f8d0",
    "swap_obj.json": "sha256:073cdb8e253d053614e80710834d9773b09dbc1dd0a412f6f9492262caa1dcad",
}
_SUGARCREPE_CATEGORIES = (
    "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj",
)  # fmt: skip
_WINOGROUND_TEXTS = ("caption_0", "caption_1")
_WINOGROUND_IMAGES = ("image_0", "image_1")


def read_sugarcrepe(request: ReadRequest, validator: DatasetValidator) -> Iterator[ChoiceEntry]:
    """Yield a caption and a hard negative of a COCO image, category after category.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    for category in _SUGARCREPE_CATEGORIES:
        file = validator.find_file(
            request.data_folder,
            f"{category}.json",
            f"data/{category}.json",
            advice="Give the folder `data` of github.com/RAIVNLab/sugar-crepe.",
        )
        items = read_json(file)
        if not isinstance(items, dict):
            raise ValueError(f"{file}: not an object of items. Download it again.")
        for number, item in items.items():
            place = f"{file.name} {number}"
            fields: dict[str, Any] = item if isinstance(item, dict) else {}
            texts = [fields.get(name) for name in ("filename", "caption", "negative_caption")]
            if all(isinstance(text, str) for text in texts):
                image, true, false = map(str, texts)
                name = f"{category}/{number}"
                yield ChoiceEntry(place, name, category, (true, false), (image,))
            else:
                validator.errors.add("no 'filename', 'caption' and 'negative_caption'", place)


def read_sugarcrepe_text(
    request: ReadRequest, validator: DatasetValidator
) -> Iterator[ChoiceEntry]:
    """Yield the items with another caption of the image in place of the image.

    It is the first one in COCO's own file that is not the true caption itself.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    file = validator.find_file(request.data_folder, *COCO_FILES, advice=COCO_ADVICE)
    captions = {
        raw.fields.get("file_name"): raw.fields["captions"]
        for raw in read_coco(file, validator.errors)
    }
    for entry in read_sugarcrepe(request, validator):
        true = clean_text(entry.captions[0])
        others = (clean_text(caption) for caption in captions.get(entry.image_names[0], ()))
        anchor = next((text for text in others if text and text != true), None)
        if anchor is None:
            validator.errors.add("no other caption of the image", entry.place)
        else:
            yield ChoiceEntry(
                entry.place, entry.name, entry.category, entry.captions, anchor=anchor
            )


def read_winoground(request: ReadRequest, validator: DatasetValidator) -> Iterator[ChoiceEntry]:
    """Yield the items; the category is what the two captions differ in (`collapsed_tag`).

    The files are Parquet, or `examples.jsonl` with the unpacked `images.zip`.

    Args:
        request: How the dataset is to be read.
        validator: Collects the errors.
    """
    if tables := request.list_parquet_files():
        for place, fields in iterate_rows(tables, request.data_folder, validator.errors):
            found = [fields.get(name) for name in _WINOGROUND_IMAGES]
            packed = tuple(image for image in found if isinstance(image, ParquetImage))
            yield from _build_winoground(place, fields, packed, validator)
        return
    lines = validator.find_file(
        request.data_folder,
        "examples.jsonl",
        "data/examples.jsonl",
        advice="Get it from huggingface.co/datasets/facebook/winoground, whose license you accept.",
    )
    image_dir = request.image_dir or lines.parent / "images"
    for raw in read_json_lines(lines, validator.errors):
        paths = [_find_by_stem(image_dir, raw.fields.get(name)) for name in _WINOGROUND_IMAGES]
        images = tuple(path for path in paths if path is not None)
        yield from _build_winoground(raw.place, dict(raw.fields), images, validator)


def _find_by_stem(image_dir: Path, name: Any) -> Path | None:
    """Find an image whose name is written without its suffix."""
    candidates = [image_dir / f"{name}{suffix}" for suffix in ("", ".png", ".jpg")]
    return next((path for path in candidates if path.is_file()), None)


def _build_winoground(
    place: str,
    fields: dict[str, Any],
    images: tuple[ImageSource, ...],
    validator: DatasetValidator,
) -> Iterator[ChoiceEntry]:
    first, second = (fields.get(name) for name in _WINOGROUND_TEXTS)
    if not isinstance(first, str) or not isinstance(second, str):
        validator.errors.add("no 'caption_0' and 'caption_1'", place)
    elif len(images) < len(_WINOGROUND_IMAGES):
        validator.errors.add("image missing", place)
    else:
        category = str(fields.get("collapsed_tag") or "all")
        yield ChoiceEntry(
            place, str(fields.get("id", place)), category, (first, second), images=images
        )


DATASETS = (
    DatasetSpec(
        name="sugarcrepe",
        title="SugarCrepe: a caption and a hard negative of an image",
        dataset_type="choice",
        counts={"items": 7511},
        license="texts MIT; images: COCO val2017, Flickr terms of use",
        citation=_SUGARCREPE_CITATION,
        source="github.com/RAIVNLab/sugar-crepe, folder data; images: val2017.zip of "
        "cocodataset.org",
        files="add_att.json … swap_obj.json; name val2017 as the folder of images",
        protocol={"split": "all seven categories", **CLEANED_TEXTS},
        checksums=_SUGARCREPE_CHECKSUMS,
        read=read_sugarcrepe,
    ),
    DatasetSpec(
        name="sugarcrepe-text",
        title="SugarCrepe as texts: another caption in place of the image",
        dataset_type="choice",
        counts={"items": 7511},
        license="texts MIT; other captions CC BY 4.0 (COCO Consortium)",
        citation=f"{_SUGARCREPE_CITATION}; COCO captions, arXiv:1504.00325",
        source="github.com/RAIVNLab/sugar-crepe, folder data, and annotations_trainval2017.zip of "
        "cocodataset.org",
        files="add_att.json … swap_obj.json and captions_val2017.json",
        protocol={
            "split": "all seven categories",
            "anchor": "first COCO caption of the image that is not the true caption",
            **CLEANED_TEXTS,
        },
        checksums=_SUGARCREPE_CHECKSUMS,
        form="text",
        read=read_sugarcrepe_text,
    ),
    DatasetSpec(
        name="winoground",
        title="Winoground: two images, two captions of the same words",
        dataset_type="choice",
        counts={"items": 400},
        license="Winoground's own agreement (Getty Images), accepted on the Hub",
        citation="Thrush et al., Winoground, CVPR 2022, arXiv:2204.03162",
        source="hub:facebook/winoground@b400e173549071916ad1b3d449293bc8d8b4b763",
        files="Parquet files, or examples.jsonl and images/ of images.zip",
        protocol={"split": "test", **CLEANED_TEXTS},
        form="images",
        read=read_winoground,
    ),
)
