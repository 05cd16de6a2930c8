"""Where an image is: a file of its own, a row of a Parquet file, or a member of a tar shard.

A packed image is an address without an open file, so it can be pickled and sent to the worker
processes of a data loader. Its bytes are read when the image is opened; its neighbors' are not.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from tqdm import tqdm

from .._extras import PARQUET, require
from ..image_loading_llm2clip import load_images, read_image_header

# Suffixes of image files, in lower case and without the dot.
IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"))
# Image files that Pillow reads only with a plugin, in a recent version, or not at all.
OPTIONAL_IMAGE_SUFFIXES = frozenset(
    ("heic", "heif", "hif", "avif", "jxl", "jp2", "jfif",
     "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2")
)  # fmt: skip
_OPEN_TABLES = 256
_MOST_THREADS = 8
_CHECKED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class TarImage:
    """A member of an uncompressed tar shard.

    Attributes:
        shard: the tar file.
        member: name of the member.
        offset: of the member's first byte in the shard.
        size: of the member, in bytes.
    """

    shard: Path
    member: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.member}"

    def read_bytes(self) -> bytes:
        """Read the encoded image."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """A row of a Parquet file whose column holds encoded images.

    Attributes:
        file: the Parquet file.
        column: name of the column.
        row: number of the row, from 0.
    """

    file: Path
    column: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}"

    def read_bytes(self) -> bytes:
        """Read the encoded image."""
        value = open_table(self.file).data.column(self.column)[self.row].as_py()
        return bytes(value["bytes"] if isinstance(value, dict) else value)


PackedImage: TypeAlias = TarImage | ParquetImage
ImageSource: TypeAlias = Path | PackedImage


def open_image(image: Any) -> Any:
    """Turn an address into what `LLM2CLIPProcessor` takes.

    Args:
        image: an `ImageSource`, or anything that the processor takes itself.

    Returns:
        For a packed image a PIL image, opened and not yet decoded, whose `filename` names file and
        member for the processor's errors. Anything else is returned unchanged.

    Raises:
        ValueError: a packed image cannot be read, or is not an image; file and member are named.
    """
    if not isinstance(image, TarImage | ParquetImage):
        return image
    try:
        encoded = io.BytesIO(image.read_bytes())
    except OSError as error:
        raise ValueError(f"{image}: cannot be read ({error}).") from error
    opened: Any = read_image_header(encoded, name=str(image))
    opened.filename = str(image)
    return opened


def find_unreadable_images(
    images: Iterable[ImageSource], *, show_progress: bool = False
) -> dict[ImageSource, str]:
    """Decode every image once, as the processor will, in threads.

    Args:
        images: the images; one that is given several times is decoded once.
        show_progress: show a progress bar.

    Returns:
        Each image that cannot be decoded, in their order, with an error that names it.
    """
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
        load_images(open_image(image))
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


def open_table(file: Path) -> Any:
    """Open a Parquet file as a memory-mapped `datasets.Dataset`.

    A Parquet file can only be read by whole row groups, which may hold hundreds of images.
    `datasets` therefore copies the file once into its cache (`HF_DATASETS_CACHE`), in a format
    from which single rows can be read.

    Args:
        file: Parquet file; one that has changed since it was opened is read again.

    Returns:
        The `datasets.Dataset`.

    Raises:
        MissingExtraError: `datasets` is not installed.
        Exception: what `datasets` raises for a broken file.
    """
    # The time of the last change is part of the key, so that a changed file is read again.
    return _open_table(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=_OPEN_TABLES)
def _open_table(file: Path, changed_ns: int) -> Any:  # noqa: ARG001
    return import_datasets().Dataset.from_parquet(str(file))


def import_datasets() -> Any:
    """Import `datasets`, which only readers of Parquet need.

    Returns:
        The module.

    Raises:
        MissingExtraError: it is not installed; the message says how to install it.
    """
    require(PARQUET)
    import datasets

    return datasets
