"""Which pictures a data set has, told by their names and sizes; no picture is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data.captioned_images import CaptionedImage
from ..data.pictures import ParquetPicture, Picture, TarPicture, open_table

_TABLES_HELD = 256


def describe_pictures(records: Sequence[CaptionedImage]) -> dict[str, str]:
    """Say which pictures a run reads, to compare with those of another day.

    Args:
        records: all with their pictures.
    Returns: `first`, where the first one lies, and `sizes`, see `hash_picture_sizes`.
    """
    first = Path(str(records[0].picture)).absolute()
    return {"first": str(first), "sizes": hash_picture_sizes(records)}


def hash_picture_sizes(records: Iterable[CaptionedImage]) -> str:
    """SHA-256 of the names and sizes in bytes of pictures, whatever they lie in.

    Their order does not matter, nor how many languages share one. Another picture of exactly as
    many bytes is not noticed.

    Args:
        records: all with their pictures.
    Raises: OSError when a picture's file is gone.
    """
    digest = hashlib.sha256()
    for size in sorted({(record.name, count_bytes(record.picture)) for record in records}):
        digest.update(f"{json.dumps(size)}\n".encode())
    return digest.hexdigest()


def count_bytes(picture: Picture | None) -> int:
    """Size of an encoded picture."""
    assert picture is not None
    if isinstance(picture, TarPicture):
        return picture.size
    if isinstance(picture, ParquetPicture):
        changed_ns = picture.file.stat().st_mtime_ns
        return int(_row_sizes(picture.file, picture.column, changed_ns)[picture.row] or 0)
    return picture.stat().st_size


@lru_cache(maxsize=_TABLES_HELD)
def _row_sizes(file: Path, column: str, changed_ns: int) -> list[int | None]:  # noqa: ARG001
    """Sizes of the pictures of a Parquet file, from their offsets."""
    # Comes with `datasets`, which reads the file.
    from pyarrow import compute, types  # type: ignore[import-untyped]

    rows: Any = open_table(file).data.column(column)
    if types.is_struct(rows.type):
        rows = compute.struct_field(rows, "bytes")
    return compute.binary_length(rows).to_pylist()  # type: ignore[no-any-return]
