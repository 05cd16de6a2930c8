"""Hashes that identify a dataset: its texts, and its images by name and size; no image is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .image_sources import count_bytes
from .records import CaptionedImage


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
