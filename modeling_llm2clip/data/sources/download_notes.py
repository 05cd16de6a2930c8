"""Separates the fields of records from img2dataset's download notes, in tar and Parquet files.

| field | meaning |
| --- | --- |
| `status` | `success`, or why the download failed; a failed row is not a sample |
| `jpg`, `png`, `webp` | the encoded image, in Parquet output |
| `txt`, `caption` | the caption |
| `url` | source of the image; a field of the record |
| all others | notes on the download, not read |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# `key` is the sample's name in the shard, not a group of images.
_NOTES = frozenset(
    "key status error_message exif sha256 md5 width height original_width original_height".split()
)
# img2dataset's Parquet output always has all of these columns, and nothing else does.
_COLUMNS = frozenset(("key", "url", "status", "error_message"))
_IMAGE_COLUMNS = ("jpg", "png", "webp")
KEY, STATUS = "key", "status"
DOWNLOAD_COLUMNS = (KEY, STATUS)
_TEXT = "txt"


def drop_download_notes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are neither download notes nor null."""
    return {
        name: value for name, value in fields.items() if value is not None and name not in _NOTES
    }


def is_download(columns: Collection[str]) -> bool:
    """Return whether a table was written by img2dataset."""
    return set(columns) >= _COLUMNS


def find_failure(fields: Mapping[str, Any]) -> str:
    """Return why the image of a row was not downloaded; empty if it was downloaded."""
    status = fields.get(STATUS)
    return "" if status == "success" else f"image not downloaded: {status}"


def choose_download_columns(columns: Collection[str]) -> dict[str, str]:
    """Map the fields of a record to the columns of img2dataset's Parquet output."""
    chosen = {name: name for name in columns if name not in (*_NOTES, *_IMAGE_COLUMNS)}
    image = next((name for name in _IMAGE_COLUMNS if name in columns), None)
    if image is not None:
        chosen["image"] = image
    text = chosen.pop(_TEXT, None)
    if text is not None and "caption" not in chosen:
        chosen["caption"] = text
    return chosen
