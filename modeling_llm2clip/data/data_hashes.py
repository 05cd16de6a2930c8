"""Hashes that identify a dataset: its texts, and its images by name and size; no image is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .image_sources import ImageSource, ParquetImage, TarImage, open_table
from .records import CaptionedImage

_TABLES_HELD = 256


def hash_records(records: Sequence[CaptionedImage]) -> str:
    """Hash the names, group ids, languages and texts of a dataset.

    Args:
        records: records of the dataset; their order matters.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for r in records:
        line = json.dumps([r.name, r.group_id, r.lang, r.captions, r.long_captions])
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def hash_image_sizes(records: Iterable[CaptionedImage]) -> str:
    """Hash the names of images and their sizes in bytes, whatever they are stored in.

    Neither their order matters nor how many languages share an image. Another image of exactly the
    same size is not noticed.

    Args:
        records: records that all have their image.

    Returns:
        SHA-256 in hexadecimal digits.

    Raises:
        OSError: the file of an image no longer exists.
    """
    digest = hashlib.sha256()
    for size in sorted({(record.name, count_bytes(record.image)) for record in records}):
        digest.update(f"{json.dumps(size)}\n".encode())
    return digest.hexdigest()


def describe_images(records: Sequence[CaptionedImage]) -> dict[str, str]:
    """Describe the images that a run reads, to compare them with those of another run.

    Args:
        records: records that all have their image.

    Returns:
        `first`, the path of the first image, and `sizes`, from `hash_image_sizes`.

    Raises:
        OSError: the file of an image no longer exists.
    """
    first = Path(str(records[0].image)).absolute()
    return {"first": str(first), "sizes": hash_image_sizes(records)}


def count_bytes(image: ImageSource | None) -> int:
    """Return the size of an encoded image in bytes.

    Args:
        image: address of the image; not None, which a record may have.

    Raises:
        OSError: its file no longer exists.
    """
    assert image is not None
    if isinstance(image, TarImage):
        return image.size
    if isinstance(image, ParquetImage):
        changed_ns = image.file.stat().st_mtime_ns
        return int(_row_sizes(image.file, image.column, changed_ns)[image.row] or 0)
    return image.stat().st_size


@lru_cache(maxsize=_TABLES_HELD)
def _row_sizes(file: Path, column: str, changed_ns: int) -> list[int | None]:  # noqa: ARG001
    """Return the sizes of the images of a Parquet file, from their offsets."""
    # Comes with `datasets`, which reads the file.
    from pyarrow import compute, types  # type: ignore[import-untyped]

    rows: Any = open_table(file).data.column(column)
    if types.is_struct(rows.type):
        rows = compute.struct_field(rows, "bytes")
    return compute.binary_length(rows).to_pylist()  # type: ignore[no-any-return]
