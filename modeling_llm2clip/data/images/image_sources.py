"""Where an image is: a file of its own, or packed into a tar shard or a Parquet file.

A packed image is an address without an open file, so it can be pickled and sent to the worker
processes of a data loader. Its bytes are read when the image is opened; its neighbors' are not.
An `EncodedImage` is the exception: an image of a stream, whose bytes have come already.
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

# Suffixes of image files, in lower case and without the dot.
IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"))
# Image files that Pillow reads only with a plugin, in a recent version, or not at all.
OPTIONAL_IMAGE_SUFFIXES = frozenset(
    ("heic", "heif", "hif", "avif", "jxl", "jp2", "jfif",
     "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2")
)  # fmt: skip
_MOST_THREADS = 8
_CHECKED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class TarImage:
    """A member of an uncompressed tar shard; `offset` is its first byte in the shard."""

    shard: FileLocation
    member: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.member}"

    def read_bytes(self) -> bytes:
        """Read the encoded image."""
        return read_range(self.shard, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """A row of a Parquet file whose column holds encoded images.

    `group_size` are the stored bytes of the column in the row's group; None for not yet known.
    """

    file: FileLocation
    column: str
    row: int
    group_size: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}"

    def read_bytes(self) -> bytes:
        """Read the encoded image."""
        from .parquet_images import read_image_bytes

        return read_image_bytes(self.file, self.column, self.row)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An encoded image in memory; the name says in errors where it came from."""

    name: str
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """Return the encoded image."""
        return self.content


class UnreadableImagesError(ValueError):
    """Images of a batch cannot be decoded or prepared."""


PackedImage: TypeAlias = TarImage | ParquetImage | EncodedImage
ImageSource: TypeAlias = Path | PackedImage


def count_bytes(image: ImageSource | None) -> int:
    """Return the bytes of an encoded image without reading it.

    For a row of Parquet these are the stored bytes of its column in its row group."""
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
    """Turn an address into what `LLM2CLIPProcessor` takes; `min_jpeg_side` is of `load_images`."""
    if isinstance(image, PackedImage):
        name = str(image)
        try:
            encoded = io.BytesIO(image.read_bytes())
        except OSError as error:
            raise ValueError(f"{name}: cannot be read ({error}).") from error
        image = read_image_header(encoded, name=name)
        image.filename = name
    elif isinstance(image, Image.Image):
        return image  # the caller's: `min_jpeg_side` would leave it smaller
    return image if min_jpeg_side is None else load_images(image, min_jpeg_side=min_jpeg_side)


def decode_image(image: ImageSource, *, min_jpeg_side: int | None = None) -> Image.Image:
    """Decode an image; an invalid image and an unreadable file raise different errors."""
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
        f"{image}: cannot be read ({describe(failure)}), so that nothing is known of the image, "
        "and it is not taken for an invalid one. Run the same command again when its disk or "
        "server works."
    )


def find_unreadable_images(
    images: Iterable[ImageSource], *, show_progress: bool = False
) -> dict[ImageSource, str]:
    """Decode every image once, as the processor will, in threads."""
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
        # A pool queues all work that it is given, so it gets a part at a time.
        for start in range(0, len(distinct), _CHECKED_AT_ONCE):
            part = distinct[start : start + _CHECKED_AT_ONCE]
            for image, error in zip(part, pool.map(_find_error, part), strict=True):
                if error:
                    unreadable[image] = error
            progress.update(len(part))
    return unreadable


def _find_error(image: ImageSource) -> str:
    """Decode one image; return the error, or nothing."""
    try:
        decode_image(image)
    except ValueError as error:
        return str(error)
    return ""


def list_readable_suffixes() -> frozenset[str]:
    """List the suffixes of image files that Pillow can decode here, without the dot."""
    register_heif_reader()
    formats = Image.registered_extensions()
    readable = {suffix for suffix in OPTIONAL_IMAGE_SUFFIXES if f".{suffix}" in formats}
    return IMAGE_SUFFIXES | readable


def register_heif_reader() -> None:
    """Let Pillow read HEIC if pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return  # then these files are counted as skipped
    register_heif_opener()
