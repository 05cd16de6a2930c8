"""Reads COCO's caption files as published, such as `captions_val2017.json`.

`images` lists the images; each entry of `annotations` holds one caption. Most images have five
captions, some six or seven. An image's captions are ordered by annotation id.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..record_fields import RawRecord
from ..validation_errors import ErrorCollector
from .json_files import read_json


def read_coco(file: Path, errors: ErrorCollector) -> Iterator[RawRecord]:
    """Yield a raw record per image, in the order of `images`."""
    content = read_json(file)
    lists = ("images", "annotations")
    if not isinstance(content, dict) or any(not isinstance(content.get(n), list) for n in lists):
        raise ValueError(f"{file}: no 'images' and 'annotations' lists. Use COCO's caption file.")
    captions = _group_captions(file, content["annotations"], errors)
    seen: set[Any] = set()
    for index, image in enumerate(content["images"]):
        place = f"{file.name} images[{index}]"
        if not isinstance(image, dict) or not isinstance(image.get("id"), int):
            errors.add("image without 'id'", place)
            continue
        if image["id"] in seen:
            errors.add("image 'id' repeated", place)
            continue
        seen.add(image["id"])
        # COCO also publishes size, date and URLs, which are not part of a record.
        fields: dict[str, Any] = {"captions": captions.pop(image["id"], [])}
        if image.get("file_name") is not None:
            fields["file_name"] = image["file_name"]
        yield RawRecord(place, fields, default_name=str(image["id"]))
    for image_id in captions:
        errors.add("annotation of an unknown image", f"{file.name} image_id {image_id}")


def _group_captions(
    file: Path, annotations: list[Any], errors: ErrorCollector
) -> dict[int, list[str]]:
    """Return the captions of each image id, ordered by annotation id."""
    numbered: dict[int, list[tuple[int, str]]] = {}
    for index, annotation in enumerate(annotations):
        fields = annotation if isinstance(annotation, dict) else {}
        number, image_id, caption = map(fields.get, ("id", "image_id", "caption"))
        if isinstance(number, int) and isinstance(image_id, int) and isinstance(caption, str):
            numbered.setdefault(image_id, []).append((number, caption))
        else:
            place = f"{file.name} annotations[{index}]"
            errors.add("annotation without 'id', 'image_id' and 'caption'", place)
    return {image_id: [c for _, c in sorted(pairs)] for image_id, pairs in numbered.items()}
