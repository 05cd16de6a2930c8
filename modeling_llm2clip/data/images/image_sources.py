"""Locations of images: a file, a member of a tar shard or a row of a Parquet file.

A packed image is a location without an open file, so it can be pickled and sent to the workers of a
data loader. When the image is opened, only the image's own bytes are read. The exception is an
`EncodedImage`, from a stream, which already holds its bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from tqdm import tqdm

from ...image_loading_llm2clip import load_images, read_image_header
from ..remote.file_locations import FileLocation, read_range
from ..remote.remote_access import INVALID_OFFSETS, describe, find_reading_failure

# Suffixes of image files, lowercase and without the dot.
IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"))
# Suffixes of images that Pillow reads only with a plugin, only in recent versions, or not at all.
OPTIONAL_IMAGE_SUFFIXES = frozenset(
    ("heic", "heif", "hif", "avif", "jxl", "jp2", "jfif",
     "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2")
)  # fmt: skip
_MOST_THREADS = 8
_CHECKED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class TarImage:
    """A member of an uncompressed tar shard; `offset` is the member's first byte in the shard."""

    shard: FileLocation
    member: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.member}"

    def read_bytes(self) -> bytes:
        return read_range(self.shard, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """A row of a Parquet file whose column holds encoded images.

    `group_size` is the column's stored size in bytes in the row's group; None if not yet known.
    """

    file: FileLocation
    column: str
    row: int
    group_size: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}"

    def read_bytes(self) -> bytes:
        from .parquet_images import read_image_bytes

        return read_image_bytes(self.file, self.column, self.row)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An encoded image in memory; in error messages, its name says where the image came from."""

    name: str
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        return self.content


class UnreadableImagesError(ValueError):
    """Some images of a batch cannot be decoded or preprocessed."""


PackedImage: TypeAlias = TarImage | ParquetImage | EncodedImage
ImageSource: TypeAlias = Path | PackedImage


def count_bytes(image: ImageSource | None) -> int:
    """Return the size of an encoded image in bytes without reading it.

    For a Parquet row, the size is the stored size of the image column in the row group.
    """
    assert image is not None
    if isinstance(image, TarImage):
        return image.size
    if isinstance(image, EncodedImage):
        return len(image.content)
    if isinstance(image, ParquetImage):
        if image.group_size is not None:
            return image.group_size
        from .parquet_images import count_group_bytes

        return count_group_bytes(image.file, image.column, image.row)
    return image.stat().st_size


def open_image(image: Any, *, min_jpeg_side: int | None = None) -> Any:
    """Turn an image location into an input of `LLM2CLIPProcessor`.

    `load_images` describes `min_jpeg_side`.
    """
    if isinstance(image, PackedImage):
        name = str(image)
        try:
            encoded = io.BytesIO(image.read_bytes())
        except OSError as error:
            raise ValueError(f"{name}: cannot be read ({error}).") from error
        image = read_image_header(encoded, name=name)
        image.filename = name
    elif isinstance(image, Image.Image):
        return image  # the caller's own image, which `min_jpeg_side` would shrink
    return image if min_jpeg_side is None else load_images(image, min_jpeg_side=min_jpeg_side)


def decode_image(image: ImageSource, *, min_jpeg_side: int | None = None) -> Image.Image:
    """Decode an image; raise ValueError if it is invalid, OSError if it cannot be read."""
    try:
        decoded: Image.Image = load_images(open_image(image, min_jpeg_side=min_jpeg_side))
    except ValueError as error:
        failure = find_reading_failure(error)
        if isinstance(image, Path) and (failure is None or failure.errno in INVALID_OFFSETS):
            try:
                image.stat()
                failure = None
            except OSError as missing:
                failure = missing
        if failure is None:
            raise
        raise explain_reading_failure(image, failure) from error
    return decoded


def explain_reading_failure(image: ImageSource, failure: OSError) -> OSError:
    return OSError(
        f"{image}: cannot be read ({describe(failure)}). This is an I/O failure, not a corrupt "
        "image. Run the same command again when its disk or server works."
    )


def find_unreadable_images(
    images: Iterable[ImageSource], *, show_progress: bool = False
) -> dict[ImageSource, str]:
    """Decode every distinct image in threads, the way the processor does; return the errors."""
    distinct = list(dict.fromkeys(images))
    unreadable = {}
    with (
        ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool,
        tqdm(
            desc="decode",
            total=len(distinct),
            unit=" images",
            disable=not (show_progress and distinct),
        ) as progress,
    ):
        # A pool queues all work that is submitted, so submit a limited part at a time.
        for start in range(0, len(distinct), _CHECKED_AT_ONCE):
            part = distinct[start : start + _CHECKED_AT_ONCE]
            for image, error in zip(part, pool.map(_find_error, part), strict=True):
                if error:
                    unreadable[image] = error
            progress.update(len(part))
    return unreadable


def _find_error(image: ImageSource) -> str:
    try:
        decode_image(image)
    except ValueError as error:
        return str(error)
    return ""


def list_readable_suffixes() -> frozenset[str]:
    """List the suffixes of images that Pillow can decode on this machine, without the dot."""
    register_heif_reader()
    formats = Image.registered_extensions()
    readable = {suffix for suffix in OPTIONAL_IMAGE_SUFFIXES if f".{suffix}" in formats}
    return IMAGE_SUFFIXES | readable


def register_heif_reader() -> None:
    """Let Pillow read HEIC if pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return  # HEIC files are then counted as skipped
    register_heif_opener()
