"""Records into Arrow columns: the schema of an index of records, and the keys in it.

| column | content |
| --- | --- |
| `name`, `group_id`, `lang`, `captions`, `long_captions`, `keywords`, `place` | of the record |
| `image_kind` | 0 for no image, 1 a file, 2 a member of a tar shard, 3 a row of a Parquet file |
| `image_file` | the image's file, or the one that holds it |
| `image_member` | name of the member, or of the Parquet column |
| `image_offset` | first byte of the member, or number of the row |
| `image_size` | bytes of the member, or of the Parquet column in the row's group |
| `key` | hash of name and language, which together identify a record |
| `group_key` | hash of the group id |
| `text_keys` | hashes of the captions, then of the long captions |

Keys have 64 bits. They stand for their texts where all records are compared, sorted or hashed, so
that no stage holds the texts of a dataset in memory. Whoever builds a table checks that different
names and group ids have different keys.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from .image_sources import ImageSource, ParquetImage, TarImage
from .records import CaptionedImage

# Batches of a table have this many rows, but for the last one, so that a row's batch is known.
ROWS_PER_BATCH = 2**16
_TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("group_id", pa.string()),
        ("lang", pa.string()),
        ("captions", _TEXTS),
        ("long_captions", _TEXTS),
        ("keywords", _TEXTS),
        ("place", pa.string()),
        ("image_kind", pa.int8()),
        ("image_file", pa.string()),
        ("image_member", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("key", pa.int64()),
        ("group_key", pa.int64()),
        ("text_keys", pa.list_(pa.int64())),
    ]
)
NO_IMAGE, IMAGE_FILE, TAR_IMAGE, PARQUET_IMAGE = range(4)


class RecordColumns:
    """Collects records into the columns of one batch."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._append = [self._columns[name].append for name in SCHEMA.names]

    def __len__(self) -> int:
        return len(self._columns["name"])

    def add(self, record: CaptionedImage) -> None:
        """Add a record.

        Args:
            record: any record.
        """
        texts = (*record.captions, *record.long_captions)
        row = (
            record.name,
            record.group_id,
            record.lang,
            record.captions,
            record.long_captions,
            record.keywords,
            record.place,
            *_locate(record.image),
            hash_text(f"{record.lang}\n{record.name}"),
            hash_text(record.group_id),
            [hash_text(text) for text in texts],
        )
        for append, value in zip(self._append, row, strict=True):
            append(value)

    def take_batch(self) -> pa.RecordBatch:
        """Return what was added as a batch, and begin a new one."""
        arrays = [pa.array(self._columns[field.name], field.type) for field in SCHEMA]
        for column in self._columns.values():
            column.clear()
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def hash_text(text: str) -> int:
    """Hash a text into a signed integer of 64 bits, the same on every machine.

    Args:
        text: any text.
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def make_image(
    kind: int, file: str | None, member: str | None, offset: int | None, size: int | None
) -> ImageSource | None:
    """Make the address of an image from its columns.

    Args:
        kind: `image_kind`.
        file: `image_file`.
        member: `image_member`.
        offset: `image_offset`.
        size: `image_size`.
    """
    if kind == NO_IMAGE:
        return None
    assert file is not None
    if kind == IMAGE_FILE:
        return Path(file)
    assert member is not None and offset is not None and size is not None
    if kind == TAR_IMAGE:
        return TarImage(Path(file), member, offset, size)
    return ParquetImage(Path(file), member, offset)


def _locate(
    image: ImageSource | None,
) -> tuple[int, str | None, str | None, int | None, int | None]:
    """Return the columns of an image's address."""
    if image is None:
        return NO_IMAGE, None, None, None, None
    if isinstance(image, TarImage):
        return TAR_IMAGE, str(image.shard), image.member, image.offset, image.size
    if isinstance(image, ParquetImage):
        return PARQUET_IMAGE, str(image.file), image.column, image.row, None
    return IMAGE_FILE, str(image), None, None, None
