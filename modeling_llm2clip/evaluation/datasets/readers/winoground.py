"""Reads Winoground: as Parquet, or as `examples.jsonl` with the unpacked `images.zip`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....data.image_sources import ImageSource, ParquetImage
from ....data.sources.json_files import read_json_lines
from ..choice_dataset import ChoiceEntry
from ..dataset_spec import ReadRequest
from ..validation import DatasetValidator
from .parquet_columns import has_parquet, iterate_rows

_TEXTS = ("caption_0", "caption_1")
_IMAGES = ("image_0", "image_1")


def read_winoground(request: ReadRequest, intake: DatasetValidator) -> Iterator[ChoiceEntry]:
    """Yield the items; the category is what the two captions differ in (`collapsed_tag`)."""
    if has_parquet(request.folder):
        for place, file, row, fields in iterate_rows(request, intake, "**/*.parquet"):
            packed = tuple(ParquetImage(file, n, row) for n in _IMAGES if fields.get(n))
            yield from _build(place, fields, packed, intake)
        return
    lines = intake.find_file(
        request.folder,
        "examples.jsonl",
        "data/examples.jsonl",
        advice="Get it from huggingface.co/datasets/facebook/winoground, whose license you accept.",
    )
    image_dir = request.image_dir or lines.parent / "images"
    for raw in read_json_lines(lines, intake.errors):
        found = [_find_image(image_dir, raw.fields.get(name)) for name in _IMAGES]
        images = tuple(image for image in found if image is not None)
        yield from _build(raw.place, dict(raw.fields), images, intake)


def _find_image(image_dir: Path, name: Any) -> Path | None:
    """The image of a name that is written without its ending."""
    candidates = [image_dir / f"{name}{ending}" for ending in ("", ".png", ".jpg")]
    return next((path for path in candidates if path.is_file()), None)


def _build(
    place: str,
    fields: dict[str, Any],
    images: tuple[ImageSource, ...],
    intake: DatasetValidator,
) -> Iterator[ChoiceEntry]:
    first, second = (fields.get(name) for name in _TEXTS)
    if not isinstance(first, str) or not isinstance(second, str):
        intake.errors.add("no 'caption_0' and 'caption_1'", place)
    elif len(images) < len(_IMAGES):
        intake.errors.add("image missing", place)
    else:
        category = str(fields.get("collapsed_tag") or "all")
        yield ChoiceEntry(
            place, str(fields.get("id", place)), category, (first, second), images=images
        )
