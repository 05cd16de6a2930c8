"""Images wherever they lie: a file of its own, a row of a Parquet file, a member of a tar shard.

A packed image is an address and holds no open file, so that it can be pickled and sent to the
worker processes of a loader. Its bytes are read when it is loaded, and its neighbors' are not.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from .._extras import PARQUET, require
from ..image_loading_llm2clip import read_header

# Endings of the files that are taken for images, in lower case and without the dot.
IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"))
# Image files that Pillow reads only with a plugin, in a recent version, or not at all.
OPTIONAL_IMAGE_SUFFIXES = frozenset(
    ("heic", "heif", "hif", "avif", "jxl", "jp2", "jfif",
     "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2")
)  # fmt: skip
_OPEN_TABLES = 256


def list_readable_suffixes() -> frozenset[str]:
    """List the suffixes of image files that Pillow can decode here, without the dot."""
    register_heif_reader()
    formats = Image.registered_extensions()
    readable = {suffix for suffix in OPTIONAL_IMAGE_SUFFIXES if f".{suffix}" in formats}
    return IMAGE_SUFFIXES | readable


def register_heif_reader() -> None:
    """Let Pillow read HEIC where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return  # then these files are counted as skipped
    register_heif_opener()


@dataclass(frozen=True, slots=True)
class TarImage:
    """A member of a tar shard that is not compressed: `size` bytes from `offset` on."""

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
    """A row of a Parquet file whose column holds encoded images, counted from 0."""

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


def open_table(file: Path) -> Any:
    """Open a Parquet file as a memory-mapped `datasets.Dataset`.

    A Parquet file can only be read by whole row groups, which may hold hundreds of images.
    `datasets` therefore copies the file once into its cache (`HF_DATASETS_CACHE`), in a format of
    which single rows can be read.

    Raises: ValueError when `datasets` is not installed; what `datasets` raises for a broken file.
    """
    # The time of the last change is part of the question, so that a new file is read anew.
    return _open_table(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=_OPEN_TABLES)
def _open_table(file: Path, changed_ns: int) -> Any:  # noqa: ARG001
    return import_datasets().Dataset.from_parquet(str(file))


def import_datasets() -> Any:
    """Import `datasets`, which only readers of Parquet need.

    Raises: MissingExtraError saying how to install it.
    """
    require(PARQUET)
    import datasets

    return datasets


def open_image(image: Any) -> Any:
    """Turn an address into what `LLM2CLIPProcessor` takes; all but packed images pass unchanged.

    Args:
        image: a `ImageSource`, or anything that the processor takes itself.
    Returns: for a packed image a PIL image that is opened and not yet decoded, whose `filename`
        names shard and member for the processor's errors; otherwise `image`.
    Raises: ValueError naming shard and member: not readable, or not an image.
    """
    if not isinstance(image, TarImage | ParquetImage):
        return image
    try:
        encoded = io.BytesIO(image.read_bytes())
    except OSError as error:
        raise ValueError(f"{image}: cannot be read ({error}).") from error
    opened: Any = read_header(encoded, name=str(image))
    opened.filename = str(image)
    return opened
