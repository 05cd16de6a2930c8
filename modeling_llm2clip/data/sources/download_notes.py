"""What img2dataset writes beside images and captions, in tar shards and in Parquet.

| field | meaning |
| --- | --- |
| `status` | `success`, or why the image could not be downloaded; then the row is no sample |
| `jpg`, `png`, `webp` | the encoded image, in its Parquet output |
| `txt`, `caption` | the caption |
| `url` | where the image came from, which others' captions may be joined by |
| all others | notes of the download, which training does not read |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Its `key` is the sample's name in the shard, not what the image shows.
_NOTES = frozenset(
    "key url status error_message exif sha256 md5 "
    "width height original_width original_height".split()
)
# Its Parquet output always has these, and no other publisher's has all of them.
_COLUMNS = frozenset(("key", "url", "status", "error_message"))
_IMAGE_COLUMNS = ("jpg", "png", "webp")
_SUCCESS = "success"


def drop_download_notes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not notes of the download, and are not null.

    Args:
        fields: of a sample.
    """
    return {
        name: value for name, value in fields.items() if value is not None and name not in _NOTES
    }


def is_download(columns: Collection[str]) -> bool:
    """Whether a table is what img2dataset writes.

    Args:
        columns: their names.
    """
    return set(columns) >= _COLUMNS


def has_failed(fields: Mapping[str, Any]) -> bool:
    """Whether a row of img2dataset is of an image that could not be downloaded.

    Args:
        fields: of the row.
    """
    return fields.get("status") != _SUCCESS


def find_image_column(columns: Collection[str]) -> str | None:
    """Find the column that img2dataset's Parquet output has its images in.

    Args:
        columns: their names.

    Returns:
        Its name; None if the images are elsewhere, such as in tar shards of the same names.
    """
    return next((name for name in _IMAGE_COLUMNS if name in columns), None)
