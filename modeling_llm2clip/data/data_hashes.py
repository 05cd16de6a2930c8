"""Hashes that identify a dataset: its texts, and its images by name and size; no image is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .image_sources import count_bytes
from .record_table import RecordTable
from .records import CaptionedImage


def hash_records(records: Iterable[CaptionedImage]) -> str:
    """Hash the names, group ids, languages and texts of a dataset, in its order.

    Args:
        records: records of the dataset.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    table = RecordTable.from_records(records)
    return _join((hash_texts(table), *_hash_columns(table, ["group_key"])))


def hash_texts(records: Iterable[CaptionedImage]) -> str:
    """Hash the names, languages and texts of a dataset, in its order, whatever its groups are.

    Args:
        records: records of the dataset.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    table = RecordTable.from_records(records)
    return _join(_hash_columns(table, ["key", "captions", "long_captions", "text_keys"]))


def hash_image_sizes(records: Iterable[CaptionedImage]) -> str:
    """Hash the names of images and their sizes in bytes, as `count_bytes` has them.

    Neither their order matters nor how many languages share an image. Another image of exactly the
    same size is not noticed.

    Args:
        records: records that all have their image.

    Returns:
        SHA-256 in hexadecimal digits.

    Raises:
        OSError: the file of an image no longer exists.
    """
    table = RecordTable.from_records(records)
    sizes = np.fromiter((count_bytes(image) for image in table.iterate_images()), np.int64)
    named = np.stack([table.read_numbers("name_key"), sizes], axis=1)
    return hashlib.sha256(np.unique(named, axis=0).tobytes()).hexdigest()


def describe_images(records: Iterable[CaptionedImage]) -> dict[str, str]:
    """Describe the images that a run reads, to compare them with those of another run.

    Args:
        records: at least one; all have their image.

    Returns:
        `first`, the path of the first image, and `sizes`, from `hash_image_sizes`.

    Raises:
        OSError: the file of an image no longer exists.
    """
    table = RecordTable.from_records(records)
    first = Path(str(table[0].image)).absolute()
    return {"first": str(first), "sizes": hash_image_sizes(table)}


def _hash_columns(table: RecordTable, names: list[str]) -> list[str]:
    """Hash columns of numbers, and the lengths of columns of texts; batches make no difference."""
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
