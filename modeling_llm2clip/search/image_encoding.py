"""Encode image files in one pass: each file is read once, and broken files do not stop the rest."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.remote.remote_access import raise_disk_failure
from ..encoding.batches import split_evenly
from ..encoding.encoder_interface import Encoder
from ..image_loading_llm2clip import DECODER_ERRORS, load_images, read_image_header
from ..model_folders.training_images import ImageTally

_EXIF, _TAKEN, _ORIENTATION = 0x8769, 36867, 0x0112  # EXIF tags
_TIME_FORMAT = "%Y:%m:%d %H:%M:%S"
_UNNAMED = "image number 1: "  # how an error of `load_images` begins if the image has no name


@dataclass(frozen=True)
class ReadImages:
    """Image files and their embeddings.

    Attributes:
        paths: The N encoded files, in the order they were passed.
        embeds: (N, P) float32 on the CPU, of unit length.
        facts: Upright width and height in pixels and the capture time of each file in `paths`.
        errors: Error message for each unreadable file.
        digests: SHA-256 of every file that was read, including broken files and files with a known
            digest. Missing files and files without an image header are not read.
    """

    paths: list[Path]
    embeds: Tensor
    facts: list[dict[str, Any]]
    errors: dict[Path, str]
    digests: dict[Path, str]


def encode_readable_images(
    encoder: Encoder,
    paths: Sequence[Path],
    *,
    batch_size: int | None = None,
    progress: tqdm[Any] | None = None,
    tally: ImageTally | None = None,
    known: Container[str] | None = None,
) -> ReadImages:
    """Encode the readable images among distinct paths, decoding in threads.

    With `known`, files with one of these SHA-256 digests are only hashed, and duplicate files are
    encoded once. The vision tower's embeddings of the images are added to `tally`.
    """
    reader = _Reader(known, encoder.min_jpeg_side)
    encoded: list[Path] = []
    parts = [torch.empty(0, encoder.embedding_dim, dtype=torch.float32)]
    plan = split_evenly(len(paths), size=batch_size or encoder.batch_size)
    batches = encoder.iterate_images(
        paths, plan, open_image=reader.open, on_error=reader.name_error
    )
    errors: dict[Path, str] = {}
    for rows, batch in zip(plan, batches, strict=True):
        encoded += [paths[row] for row in batch.rows]
        parts.append(batch.embeds)
        errors |= {paths[row]: error for row, error in batch.errors.items()}
        if tally is not None and batch.tower_embeds is not None:
            tally.add(batch.tower_embeds)
        if progress is not None:
            progress.update(len(rows))
    facts = [reader.facts[path] for path in encoded]
    return ReadImages(encoded, torch.cat(parts), facts, errors, reader.digests)


@dataclass
class _Reader:
    """Decodes files in threads, and records each file's size in pixels, capture time and digest."""

    known: Container[str] | None
    min_jpeg_side: int | None
    facts: dict[Path, dict[str, Any]] = field(default_factory=dict)
    digests: dict[Path, str] = field(default_factory=dict)
    first_of: dict[str, Path] = field(default_factory=dict)  # file to encode per digest

    def open(self, path: Path) -> Image.Image | None:
        """Decode an image from its hashed bytes; None if the image is known or a duplicate.

        The file name is not passed to Pillow, which would reopen some formats to memory-map them.
        """
        with read_image_header(path, name=str(path)):
            pass  # so a large file that Pillow cannot open is never read into memory
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error}).") from error
        digest = self.digests[path] = hashlib.sha256(content).hexdigest()
        if self.known is not None and (
            digest in self.known or self.first_of.setdefault(digest, path) != path
        ):
            return None
        with read_image_header(io.BytesIO(content), name=str(path)) as opened:
            taken, header = find_time_taken(opened), opened.size
            image: Image.Image = load_images(opened, min_jpeg_side=self.min_jpeg_side)
            size = image.size
            if self.min_jpeg_side is not None and opened.size != header:  # decoded at reduced size
                is_turned = opened.getexif().get(_ORIENTATION) in (5, 6, 7, 8)  # by 90 degrees
                size = (header[1], header[0]) if is_turned else header
        self.facts[path] = {"width": size[0], "height": size[1], "taken": taken}
        return image

    def name_error(self, path: Path, error: ValueError) -> str:
        raise_disk_failure(error, path)
        text = str(error).removeprefix(_UNNAMED)
        return text if str(path) in text else f"{path}: {text}"


def find_time_taken(image: Image.Image) -> datetime | None:
    """Read the capture time from EXIF, in the camera's local time; None if EXIF has no time."""
    try:
        text = image.getexif().get_ifd(_EXIF).get(_TAKEN)
        return datetime.strptime(str(text).strip("\0 "), _TIME_FORMAT) if text else None
    except (*DECODER_ERRORS, AttributeError):
        return None
