"""Converts records to Arrow columns: the schema of a record index, and the keys in it.

| column | content |
| --- | --- |
| `name`, `group_id`, `lang`, `captions`, `long_captions`, `keywords` | the record's fields |
| `place`, `url` | the record's location and URL |
| `image_kind` | 0: no image, 1: a file, 2: a tar member, 3: a row of Parquet |
| `image_file` | the image's file, or the file that holds it |
| `image_member` | name of the tar member, or of the Parquet column |
| `image_offset` | first byte of the tar member, or number of the row |
| `image_size` | bytes of the image, or of the Parquet column in the row's group; null: unknown |
| `name_key`, `group_key` | hashes of name and group id |
| `key` | hash of name and language, which together identify a record |
| `text_keys` | hashes of the captions, then of the long captions |

Keys are 64-bit hashes. Keys replace the texts whenever all records are compared, sorted or hashed,
so no stage holds a dataset's texts in memory. Among 30 million texts, the odds that two different
texts share a key are 1 in 40,000. If two names share a key, one of the names is reported as
repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..images.image_sources import EncodedImage, ImageSource, ParquetImage, TarImage
from ..key_arrays import Array
from ..remote.file_locations import parse_location
from .records import CaptionedImage, FoundFile

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
# Every batch of a table except the last has this many rows, so a row number gives its batch.
ROWS_PER_BATCH = 2**16
TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("group_id", pa.string()),
        ("lang", pa.string()),
        ("captions", TEXTS),
        ("long_captions", TEXTS),
        ("keywords", TEXTS),
        ("place", pa.string()),
        ("url", pa.string()),
        ("image_kind", pa.int8()),
        ("image_file", pa.string()),
        ("image_member", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("name_key", pa.int64()),
        ("key", pa.int64()),
        ("group_key", pa.int64()),
        ("text_keys", pa.list_(pa.int64())),
    ]
)
CAPTION_COLUMNS = ("captions", "long_captions")
PLAIN_COLUMNS = tuple(SCHEMA.names[: SCHEMA.names.index("image_kind")])
# In the order of the parameters of `make_image`.
IMAGE_COLUMNS = ("image_kind", "image_file", "image_member", "image_offset", "image_size")
NO_IMAGE, IMAGE_FILE, TAR_IMAGE, PARQUET_IMAGE = range(4)


def make_batches(records: Iterable[CaptionedImage]) -> Iterator[pa.RecordBatch]:
    """Yield batches of `ROWS_PER_BATCH` records; the last one may be smaller."""
    remaining = iter(records)
    while part := list(islice(remaining, ROWS_PER_BATCH)):
        columns: dict[str, Any] = {
            name: [getattr(record, name) for record in part] for name in PLAIN_COLUMNS
        }
        images = zip(*(_locate(record.image) for record in part), strict=True)
        columns |= zip(IMAGE_COLUMNS, images, strict=True)
        columns["name_key"] = _hash_texts(columns["name"])
        columns["key"] = _join_keys(columns["name_key"], _hash_texts(columns["lang"]))
        columns["group_key"] = _hash_texts(columns["group_id"])
        columns["text_keys"] = make_text_keys(
            [(*record.captions, *record.long_captions) for record in part]
        )
        arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
        yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def make_text_keys(texts: Sequence[Sequence[str]]) -> pa.ListArray:
    """Make the column `text_keys` from the texts of each record."""
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, _hash_texts(chain.from_iterable(texts)))


def _hash_texts(texts: Iterable[str]) -> Integers:
    return np.frombuffer(b"".join(map(_digest, texts)), dtype="<i8")


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def hash_text(text: str) -> int:
    """Hash a text to a signed 64-bit integer that is the same on every machine."""
    return int.from_bytes(_digest(text), "little", signed=True)


def hash_identity(name: str, lang: str) -> int:
    """Return the `key` of a name and language."""
    return int(_join_keys(_hash_texts([name]), _hash_texts([lang]))[0])


def _join_keys(name_keys: Integers, lang_keys: Integers) -> Integers:
    """Combine pairs of hashes, depending on their order. Sums may wrap around."""
    return name_keys * 31 + lang_keys


def make_image(
    kind: int, file: str | None, member: str | None, offset: int | None, size: int | None
) -> ImageSource | None:
    """Make an image's location from the columns that store it."""
    if kind == NO_IMAGE:
        return None
    assert file is not None
    if kind == IMAGE_FILE:
        return Path(file)
    assert member is not None and offset is not None
    if kind == PARQUET_IMAGE:
        return ParquetImage(parse_location(file), member, offset, size)
    assert size is not None
    return TarImage(parse_location(file), member, offset, size)


def _locate(
    image: ImageSource | FoundFile | None,
) -> tuple[int, str | None, str | None, int | None, int | None]:
    if image is None:
        return NO_IMAGE, None, None, None, None
    if isinstance(image, FoundFile):
        return IMAGE_FILE, image.path, None, None, image.size
    if isinstance(image, TarImage):
        return TAR_IMAGE, str(image.shard), image.member, image.offset, image.size
    if isinstance(image, ParquetImage):
        return PARQUET_IMAGE, str(image.file), image.column, image.row, image.group_size
    if isinstance(image, EncodedImage):
        raise TypeError(
            f"{image} is in memory, but an index holds only paths and URLs. Write it to a file."
        )
    return IMAGE_FILE, str(image), None, None, None


class FlatCaptions(NamedTuple):
    """The captions of n records in one column.

    Attributes:
        texts: The short captions of each record, followed by its long captions.
        num_short: (n,) number of short captions of each record.
        ends: (n + 1,) position of each record's first caption, followed by the total number of
            captions.
    """

    texts: pa.Array
    num_short: Array
    ends: Array


def flatten_captions(batch: pa.RecordBatch) -> FlatCaptions:
    """Put the captions of a batch into one column."""
    short, long = (batch.column(name).flatten() for name in CAPTION_COLUMNS)
    num_short, num_long = count_captions(batch)
    ends = np.concatenate([[0], np.cumsum(num_short + num_long, dtype=np.int64)])
    if not len(long):
        return FlatCaptions(short, num_short, ends)
    texts = pa.concat_arrays([short, long]).take(pa.array(locate_captions(batch)[1]))
    return FlatCaptions(texts, num_short, ends)


def locate_captions(batch: pa.RecordBatch) -> tuple[Array, Array]:
    """Locate the captions of each record in a batch, short captions before long ones.

    Returns, record by record, the row of each caption's record and the caption's position in the
    list of all short captions of the batch followed by all long captions; (T,) int64 each.
    """
    num_short, num_long = (counts.astype(np.int64) for counts in count_captions(batch))
    counts = num_short + num_long
    row = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    first_short = np.cumsum(num_short) - num_short
    first_long = num_short.sum() + np.cumsum(num_long) - num_long - num_short
    return row, within + np.where(within < num_short[row], first_short[row], first_long[row])


def count_captions(batch: pa.RecordBatch) -> tuple[Array, Array]:
    """Count the short and the long captions of each record in a batch, (n,) int32 each."""
    short, long = (count_items(batch.column(name)) for name in CAPTION_COLUMNS)
    return short, long


def count_items(lists: pa.Array) -> Array:
    """Count the items of each list of a column, (n,) int32."""
    return np.diff(np.asarray(lists.offsets))


def rebatch(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Regroup batches into `ROWS_PER_BATCH` rows each; the last one may be smaller."""
    waiting = SCHEMA.empty_table()
    for batch in batches:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        while len(waiting) >= ROWS_PER_BATCH:
            [whole] = waiting.slice(0, ROWS_PER_BATCH).combine_chunks().to_batches()
            yield whole
            waiting = waiting.slice(ROWS_PER_BATCH)
    yield from waiting.combine_chunks().to_batches()
