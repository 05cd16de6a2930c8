"""Reads Winoground: as Parquet, or as `examples.jsonl` with the unpacked `images.zip`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....data.pictures import ParquetPicture, Picture
from ....data.sources.json_lines import read_json_lines
from ..card import ReadRequest
from ..choices import ChoiceEntry
from ..intake import Intake
from .parquet import has_parquet, iterate_rows

_TEXTS = ("caption_0", "caption_1")
_PICTURES = ("image_0", "image_1")


def read_winoground(request: ReadRequest, intake: Intake) -> Iterator[ChoiceEntry]:
    """Yield the items; the category is what the two captions differ in (`collapsed_tag`)."""
    if has_parquet(request.folder):
        for place, file, row, fields in iterate_rows(request, intake, "**/*.parquet"):
            packed = tuple(ParquetPicture(file, n, row) for n in _PICTURES if fields.get(n))
            yield from _build(place, fields, packed, intake)
        return
    lines = intake.find_file(
        request.folder,
        "examples.jsonl",
        "data/examples.jsonl",
        advice="Get it from huggingface.co/datasets/facebook/winoground, whose licence you accept.",
    )
    images = request.images or lines.parent / "images"
    for raw in read_json_lines(lines, intake.faults):
        found = [_find_image(images, raw.fields.get(name)) for name in _PICTURES]
        pictures = tuple(picture for picture in found if picture is not None)
        yield from _build(raw.place, dict(raw.fields), pictures, intake)


def _find_image(images: Path, name: Any) -> Path | None:
    """The picture of a name that is written without its ending."""
    candidates = [images / f"{name}{ending}" for ending in ("", ".png", ".jpg")]
    return next((path for path in candidates if path.is_file()), None)


def _build(
    place: str,
    fields: dict[str, Any],
    pictures: tuple[Picture, ...],
    intake: Intake,
) -> Iterator[ChoiceEntry]:
    first, second = (fields.get(name) for name in _TEXTS)
    if not isinstance(first, str) or not isinstance(second, str):
        intake.faults.add("no 'caption_0' and 'caption_1'", place)
    elif len(pictures) < len(_PICTURES):
        intake.faults.add("picture missing", place)
    else:
        category = str(fields.get("collapsed_tag") or "all")
        yield ChoiceEntry(
            place, str(fields.get("id", place)), category, (first, second), pictures=pictures
        )
