"""Image files into embeddings in one pass: each is decoded once; a broken one stops no other."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.remote.remote_access import raise_disk_failure
from ..encoding.batches import iterate_batches, join_prepared, prepare_images, split_evenly
from ..encoding.encode import default_batch_size, raise_malloc_thresholds
from ..encoding.eval_mode import require_eval_mode
from ..image_loading_llm2clip import DECODER_ERRORS, load_images, read_image_header
from ..model_folders.training_images import ImageTally
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .index_database import ImageFacts

_EXIF, _TAKEN, _CHANGED = 0x8769, 36867, 306  # of the EXIF standard
_TIME_FORMAT = "%Y:%m:%d %H:%M:%S"
_UNNAMED = "image number 1: "  # what `load_images` calls an image without a name


@dataclass(frozen=True)
class EncodedImages:
    """Image files and their embeddings.

    Attributes:
        paths: N files that can be read, in the order that was given.
        embeds: (N, P) float32 on the CPU, of unit length.
        facts: Of each file.
        errors: What is wrong with each of the other files.
        digests: SHA-256 of the bytes that were decoded, or that cannot be; without files of which
            no byte can be read.
    """

    paths: list[Path]
    embeds: Tensor
    facts: list[ImageFacts]
    errors: dict[Path, str]
    digests: dict[Path, str]


def encode_readable_images(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    processor: LLM2CLIPProcessor,
    paths: Sequence[Path],
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    progress: tqdm[Any] | None = None,
    tally: ImageTally | None = None,
) -> EncodedImages:
    """Encode those of the files that are images; threads decode them.

    Args:
        model: A model with a vision tower.
        processor: Its processor.
        paths: Different image files.
        batch_size: Images per batch. Default: by device.
        num_workers: Threads that decode images. Default: one per core, at most 8.
        progress: Bar that counts the files.
        tally: Gets the files that can be read.

    Returns:
        Embeddings of the files that can be read, and the errors of the others.

    Raises:
        ValueError: The model is in training mode, or gives NaN or infinity for an image.
    """
    if model.device.type == "cpu":
        raise_malloc_thresholds()
    reader, encode = _Reader(processor), _BatchEncoder(model)
    plan = split_evenly(len(paths), size=batch_size or default_batch_size(model.device))
    kept: list[tuple[Path, ImageFacts]] = []
    parts: list[Tensor] = []
    for rows, embeds in iterate_batches(
        paths,
        plan,
        prepare=reader.read,
        encode=encode,
        device=model.device,
        num_workers=num_workers,
    ):
        read = [reader.facts.pop(paths[row], None) for row in rows]
        places = [place for place, facts in enumerate(read) if facts is not None]
        parts.append(embeds[places])
        if tally is not None:
            tally.add(encode.vision_embeds[places])
        kept += [(paths[rows[place]], facts) for place in places if (facts := read[place])]
        if progress is not None:
            progress.update(len(rows))
    return EncodedImages(
        paths=[path for path, _ in kept],
        embeds=torch.cat(parts)
        if parts
        else torch.empty(0, model.config.projection_dim, dtype=torch.float32),
        facts=[facts for _, facts in kept],
        errors={path: reader.errors[path] for path in paths if path in reader.errors},
        digests=reader.digests,
    )


class _Reader:
    """Decodes batches in threads. A file that is broken becomes a gray image and an error."""

    def __init__(self, processor: LLM2CLIPProcessor) -> None:
        self._processor = processor
        self.facts: dict[Path, ImageFacts] = {}
        self.errors: dict[Path, str] = {}
        self.digests: dict[Path, str] = {}

    def read(self, paths: Sequence[Path]) -> dict[str, Tensor]:
        try:
            return prepare_images(self._processor, map(self._load, paths))
        except ValueError:  # an image of a size that this processor does not take
            return join_prepared([self._prepare_or_refuse(path) for path in paths])

    def _load(self, path: Path) -> Image.Image:
        try:
            with self._open(path) as opened:
                taken = find_time_taken(opened)
                image: Image.Image = load_images(opened)
        except ValueError as error:
            raise_disk_failure(error, path)
            return self._refuse(path, str(error).removeprefix(_UNNAMED))
        self.facts[path] = ImageFacts(image.width, image.height, taken)
        return image

    def _open(self, path: Path) -> Image.Image:
        """Open an image of bytes that are read once, so that they are those of the digest.

        It has no `filename`: from one, Pillow would map some formats again when it decodes them.
        """
        with read_image_header(path, name=str(path)):
            pass  # a large file that Pillow cannot open is not read into memory
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error}).") from error
        self.digests[path] = hashlib.sha256(content).hexdigest()
        return read_image_header(io.BytesIO(content), name=str(path))

    def _prepare_or_refuse(self, path: Path) -> dict[str, Tensor]:
        try:
            return dict(self._processor(images=[self._load(path)]))
        except ValueError as error:
            return dict(self._processor(images=[self._refuse(path, str(error))]))

    def _refuse(self, path: Path, error: str) -> Image.Image:
        self.facts.pop(path, None)
        self.errors[path] = error if str(path) in error else f"{path}: {error}"
        return Image.new("RGB", (64, 64), "gray")


class _BatchEncoder:
    """Encodes batches, and holds the embeddings of the last one before the projection."""

    vision_embeds: Tensor

    def __init__(self, model: LLM2CLIPModel | LLM2CLIPVisionModel) -> None:
        self._model = model

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        model = self._model
        on_device: dict[str, Any] = {name: value.to(model.device) for name, value in inputs.items()}
        with require_eval_mode(model):
            self.vision_embeds = model.get_vision_embeds(**on_device)
            return model.to_image_embeds(self.vision_embeds)


def find_time_taken(image: Image.Image) -> datetime | None:
    """Read from EXIF when an image was taken, by the clock of its camera.

    Args:
        image: An opened image.

    Returns:
        The time, without a time zone; None where EXIF is missing, damaged or does not say.
    """
    try:
        exif = image.getexif()
        text = exif.get_ifd(_EXIF).get(_TAKEN) or exif.get(_CHANGED)
        return datetime.strptime(str(text).strip("\0 "), _TIME_FORMAT) if text else None
    except (*DECODER_ERRORS, AttributeError):
        return None
