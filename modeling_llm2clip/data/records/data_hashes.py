"""Hashes that identify a dataset: its texts, and its images by name, size and sampled content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..images.image_sources import ParquetImage, TarImage, count_bytes, explain_reading_failure
from ..key_arrays import iterate_ranges
from ..remote.remote_access import find_reading_failure
from ..remote.remote_files import is_remote
from ..remote.shard_urls import drop_signature
from .record_columns import IMAGE_COLUMNS, IMAGE_FILE, make_image
from .record_table import Array, RecordTable
from .records import CaptionedImage

# 0x9E3779B97F4A7C15 from splitmix64: its powers differ in many bits
_ODD = np.int64(-7046029254386353131)
_IMAGES_READ = 1000


def hash_records(records: Iterable[CaptionedImage]) -> str:
    """Hash the names, group ids, languages and texts of a dataset, in order."""
    table = RecordTable.from_records(records)
    return _join((hash_texts(table), *_hash_columns(table, ["group_key"])))


def hash_texts(records: Iterable[CaptionedImage]) -> str:
    """Hash the names, languages and texts of a dataset, in order, but not its groups."""
    table = RecordTable.from_records(records)
    return _join(_hash_columns(table, ["key", "captions", "long_captions", "text_keys"]))


def hash_own_texts(text_keys: pa.ListArray, num_short: Array) -> Array:
    """Hash each record's text keys, their order, and the number of short captions; returns (n,)."""
    ends = np.asarray(text_keys.offsets)
    ends = ends - ends[0]  # flattening a slice drops the keys before it
    counts = np.diff(ends)
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
    powers = np.cumprod(np.full(counts.max(initial=0), _ODD))  # may wrap around, like the sums
    sums = np.append(0, np.cumsum(np.asarray(text_keys.flatten()) * powers[positions]))
    return np.asarray(np.diff(sums[ends]) + num_short)


def hash_columns(records: Iterable[CaptionedImage], columns: Sequence[str]) -> str:
    """Hash the values of columns of a dataset, in order."""
    digests = [hashlib.sha256() for _ in columns]
    for batch in RecordTable.from_records(records).iterate_columns(columns):
        for digest, column in zip(digests, batch.columns, strict=True):
            for value in column.to_pylist():  # one by one, so the batch size does not matter
                digest.update(json.dumps(value).encode() + b"\n")
    return _join(digest.hexdigest() for digest in digests)


def hash_images(records: Iterable[CaptionedImage]) -> str:
    """Hash the names and sizes of images, and the bytes of up to 1,000 local images.

    The hash does not depend on the order of images or the number of languages per image. Among more
    than 1,000 images, a replaced image of the same size may go unnoticed. Sizes are read from the
    index if available there. If the same images are stored remotely and on a local disk, the remote
    images' hash is a prefix of the local one.
    """
    table = RecordTable.from_records(records)
    measured = [_measure(batch) for batch in table.iterate_columns(IMAGE_COLUMNS)]

    def mix() -> Iterator[Array]:
        columns = table.iterate_columns(("name_key", "image_size"))
        for batch, sizes in zip(columns, measured, strict=True):
            known = np.asarray(batch.column(1)) if sizes is None else sizes
            # The key is already a hash. The factor is odd, so another size gives another number.
            yield np.asarray(batch.column(0)) + known * _ODD

    digest, sample = hashlib.sha256(), np.empty(0, np.int64)
    for numbers, rows in iterate_ranges(mix, len(table)):
        # Unsigned, the numbers ascend from range to range, however many ranges there are.
        distinct, first = np.unique(numbers.view(np.uint64), return_index=True)
        digest.update(distinct.tobytes())
        sample = np.append(sample, rows[first[: _IMAGES_READ - len(sample)]])
    return digest.hexdigest() + _hash_content(table.select(sample))


def are_of_same_images(content: str, other: str) -> bool:
    """Compare hashes from `hash_images`; remote images are compared only by name and size."""
    return content.startswith(other) or other.startswith(content)


def describe_images(records: Iterable[CaptionedImage]) -> dict[str, str]:
    """Describe the images that a run reads, for comparison with the images of another run."""
    table = RecordTable.from_records(records)
    image = table[0].image
    first = str(image)
    shard = image.shard if isinstance(image, TarImage) else None
    shard = image.file if isinstance(image, ParquetImage) else shard
    if isinstance(shard, str):
        first = first.replace(shard, drop_signature(shard), 1)
    first = first if is_remote(first) else str(Path(first).absolute())
    return {"first": first, "content": hash_images(table)}


def _hash_content(records: RecordTable) -> str:
    digests = []
    for image in records.iterate_images():
        if image is not None and not is_remote(str(image)):
            try:
                content = image.read_bytes()
            except (OSError, ValueError) as error:
                if failure := find_reading_failure(error):
                    raise explain_reading_failure(image, failure) from error
                content = b""  # decoding reports the image, or skips it
            digests.append(hashlib.sha256(content).hexdigest())
    return _join(digests) if digests else ""


def _measure(batch: pa.RecordBatch) -> Array | None:
    """Return the sizes of a batch's images, or None if the index has all sizes."""
    if not batch.column("image_size").null_count:
        return None
    sizes = np.array(batch.column("image_size").fill_null(-1))
    unknown = np.flatnonzero(sizes < 0)
    columns = batch.take(pa.array(unknown)).to_pydict()
    for row, *image in zip(unknown.tolist(), *columns.values(), strict=True):
        kind, file, *_ = image
        # os.stat, because creating a Path takes longer than the call.
        is_file = kind == IMAGE_FILE
        sizes[row] = os.stat(file).st_size if is_file else count_bytes(make_image(*image))  # noqa: PTH116
    return sizes


def _hash_columns(table: RecordTable, names: list[str]) -> list[str]:
    """Hash columns of numbers, and the lengths of lists in columns, whatever the batch sizes."""
    digests = [hashlib.sha256() for _ in names]
    for batch in table.iterate_columns(names):
        for digest, name, column in zip(digests, names, batch.columns, strict=True):
            if name.endswith("captions"):
                values = np.diff(np.asarray(column.offsets))
            else:
                values = np.asarray(column.flatten() if name == "text_keys" else column)
            digest.update(np.ascontiguousarray(values).tobytes())
    return [digest.hexdigest() for digest in digests]


def _join(digests: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(digests)).encode()).hexdigest()
