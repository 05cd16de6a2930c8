"""Which images a data set has, told by their names and sizes; no image is read."""

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


def describe_images(records: Sequence[CaptionedImage]) -> dict[str, str]:
    """Say which images a run reads, to compare with those of another day.

    Args:
        records: all with their images.
    Returns: `first`, where the first one lies, and `sizes`, see `hash_image_sizes`.
    """
    first = Path(str(records[0].image)).absolute()
    return {"first": str(first), "sizes": hash_image_sizes(records)}


def hash_image_sizes(records: Iterable[CaptionedImage]) -> str:
    """SHA-256 of the names and sizes in bytes of images, whatever they lie in.

    Their order does not matter, nor how many languages share one. Another image of exactly as
    many bytes is not noticed.

    Args:
        records: all with their images.
    Raises: OSError when an image's file is gone.
    """
    digest = hashlib.sha256()
    for size in sorted({(record.name, count_bytes(record.image)) for record in records}):
        digest.update(f"{json.dumps(size)}\n".encode())
    return digest.hexdigest()


def count_bytes(image: ImageSource | None) -> int:
    """Size of an encoded image."""
    assert image is not None
    if isinstance(image, TarImage):
        return image.size
    if isinstance(image, ParquetImage):
        changed_ns = image.file.stat().st_mtime_ns
        return int(_row_sizes(image.file, image.column, changed_ns)[image.row] or 0)
    return image.stat().st_size


@lru_cache(maxsize=_TABLES_HELD)
def _row_sizes(file: Path, column: str, changed_ns: int) -> list[int | None]:  # noqa: ARG001
    """Sizes of the images of a Parquet file, from their offsets."""
    # Comes with `datasets`, which reads the file.
    from pyarrow import compute, types  # type: ignore[import-untyped]

    rows: Any = open_table(file).data.column(column)
    if types.is_struct(rows.type):
        rows = compute.struct_field(rows, "bytes")
    return compute.binary_length(rows).to_pylist()  # type: ignore[no-any-return]
