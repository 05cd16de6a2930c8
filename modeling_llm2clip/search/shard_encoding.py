"""Final embeddings of the texts or images of a shard, batch by batch.

Which inputs share a batch depends on the shard alone, so an output that was continued has the same
bytes as one that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..configs.embed_config import EmbedConfig
from ..data.images.image_sources import ImageSource, decode_image, find_unreadable_images
from ..encoding.batches import iterate_batches, prepare_images, split_evenly
from ..encoding.encode import (
    default_batch_size,
    default_token_budget,
    iterate_token_batches,
    project_captions,
    raise_malloc_thresholds,
)
from ..encoding.eval_mode import require_eval_mode
from ..encoding.tokenized_texts import TokenizedTexts
from ..model_folders.training_images import ImageTally
from ..modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..packing_llm2clip import plan_token_batches
from ..processing_llm2clip import LLM2CLIPProcessor
from ..scheduling.shard_computation import PreparedShard
from .embedding_rows import ImageRows, TextRows

Array: TypeAlias = np.ndarray[Any, Any]
_SHOWN = 8


class ShardEncoder(Protocol):
    """A loaded tower, and the rows that it encodes."""

    dim: int
    """Dimensions of an embedding."""
    plan: dict[str, str]
    """What of the encoding decides the bytes."""

    def prepare(self, rows: range) -> PreparedShard:
        """Read the inputs of a shard.

        Args:
            rows: All rows of the shard.
        """

    def encode_sample(self, size: int) -> Array:
        """Encode some inputs, evenly spaced over the rows.

        Args:
            size: How many, or all where there are fewer.

        Returns:
            (size, P) float32 of unit length.
        """


def load_shard_encoder(
    folder: Path, rows: TextRows | ImageRows, config: EmbedConfig, device: torch.device
) -> ShardEncoder:
    """Load the tower that is needed.

    Args:
        folder: Model folder.
        rows: What is encoded.
        config: Options of the encoding.
        device: Where the tower runs.
    """
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    if isinstance(rows, TextRows):
        text_model = LLM2CLIPTextModel.from_pretrained(folder).to(device)
        budget = config.token_budget or default_token_budget(device)
        return TextShardEncoder(text_model, processor, rows, token_budget=budget)
    vision_model = LLM2CLIPVisionModel.from_pretrained(folder).to(device)
    batch_size = config.batch_size or default_batch_size(device)
    return ImageShardEncoder(
        vision_model,
        processor,
        rows,
        batch_size=batch_size,
        num_workers=config.num_workers,
        skip_invalid=config.skip_invalid,
    )


class TextShardEncoder:
    """Encodes the texts of shards; equal texts of a shard once.

    Args:
        model: The text tower.
        processor: The model's processor.
        rows: The texts.
        token_budget: Maximum tokens per batch, padding included.
    """

    def __init__(
        self,
        model: LLM2CLIPTextModel,
        processor: LLM2CLIPProcessor,
        rows: TextRows,
        *,
        token_budget: int,
    ) -> None:
        self._model = model
        self._processor = processor
        self._rows = rows
        self._token_budget = token_budget
        self.dim = model.config.projection_dim
        self.plan = {"token_budget": str(token_budget)}

    def prepare(self, rows: range) -> PreparedShard:
        """Read and tokenize the texts of a shard.

        Args:
            rows: All rows of the shard.
        """
        return self._prepare(self._rows.read_texts(rows))

    def encode_sample(self, size: int) -> Array:
        """Encode some texts, evenly spaced over the records.

        Args:
            size: How many, or all where there are fewer.

        Returns:
            (size, P) float32 of unit length.
        """
        return _encode_all(self._prepare(self._rows.sample(size)), self.dim)

    def _prepare(self, texts: list[str]) -> PreparedShard:
        distinct = list(dict.fromkeys(texts))
        numbers = {text: number for number, text in enumerate(distinct)}
        number_of = np.array([numbers[text] for text in texts])
        tokens = TokenizedTexts(self._processor, distinct)
        plan = plan_token_batches(tokens.lengths.tolist(), token_budget=self._token_budget)
        return PreparedShard(
            batches=_find_places(number_of, plan, len(distinct)),
            encode=partial(self._encode, tokens, number_of),
            num_truncated=int(tokens.is_truncated[number_of].sum()),
        )

    def _encode(
        self, texts: TokenizedTexts, number_of: Array, batches: Sequence[Array]
    ) -> Iterator[Tensor]:
        # Places of equal texts are next to each other; each text is encoded at the first of them.
        plan = [list(dict.fromkeys(number_of[places].tolist())) for places in batches]
        encoded = self._embed(texts, plan)
        for places, numbers, embeds in zip(batches, plan, encoded, strict=True):
            rows = {number: row for row, number in enumerate(numbers)}
            yield embeds[[rows[number] for number in number_of[places].tolist()]]

    def _embed(self, texts: TokenizedTexts, plan: list[list[int]]) -> Iterator[Tensor]:
        """Yield the final embeddings of batches of distinct texts."""
        for embeds in iterate_token_batches(self._model, self._processor, texts, plan):
            yield project_captions(self._model, embeds)


class ImageShardEncoder:
    """Encodes the images of shards; threads decode them.

    Args:
        model: The vision tower.
        processor: The model's processor.
        rows: The images.
        batch_size: Images per batch.
        num_workers: Threads that decode images; None for the default.
        skip_invalid: Give zeros for an image that cannot be decoded, instead of an error.

    Attributes:
        tally: The images that were encoded so far.
    """

    def __init__(
        self,
        model: LLM2CLIPVisionModel,
        processor: LLM2CLIPProcessor,
        rows: ImageRows,
        *,
        batch_size: int,
        num_workers: int | None,
        skip_invalid: bool,
    ) -> None:
        self._model = model
        self._processor = processor
        self._rows = rows
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._skip_invalid = skip_invalid
        self.tally = ImageTally()
        self.dim = model.config.projection_dim
        self.plan = {"batch_size": str(batch_size)}

    def prepare(self, rows: range) -> PreparedShard:
        """List the images of a shard.

        Args:
            rows: All rows of the shard.
        """
        return self._prepare(self._rows.read_images(rows))

    def encode_sample(self, size: int) -> Array:
        """Encode some images, evenly spaced over the rows.

        Args:
            size: How many, or all where there are fewer.

        Returns:
            (size, P) float32 of unit length, without images that cannot be decoded.
        """
        embeds = _encode_all(self._prepare(self._rows.sample(size)), self.dim)
        self.tally = ImageTally()  # they will be encoded once more
        return embeds[embeds.any(axis=1)]

    def _prepare(self, images: list[ImageSource]) -> PreparedShard:
        batches = split_evenly(len(images), size=self._batch_size)
        return PreparedShard(
            batches=[np.array(places) for places in batches], encode=partial(self._encode, images)
        )

    def _encode(self, images: list[ImageSource], batches: Sequence[Array]) -> Iterator[Tensor]:
        if self._model.device.type == "cpu":
            raise_malloc_thresholds()
        for _, embeds in iterate_batches(
            images,
            [places.tolist() for places in batches],
            prepare=partial(self._decode, images),
            encode=self._embed,
            device=self._model.device,
            num_workers=self._num_workers,
        ):
            yield embeds

    def _decode(self, images: list[ImageSource], part: list[ImageSource]) -> DecodedBatch:
        """Decode a batch; of several that cannot be, all of the shard are named."""
        places: list[int] = []

        def open_all() -> Iterator[Any]:
            for place, image in enumerate(part):
                try:
                    opened = decode_image(image)
                except ValueError:
                    if not self._skip_invalid:
                        raise ValueError(_describe_unreadable(images)) from None
                else:
                    places.append(place)
                    yield opened

        return DecodedBatch(prepare_images(self._processor, open_all()), places, len(part))

    def _embed(self, batch: DecodedBatch) -> Tensor:
        embeds = torch.zeros(batch.size, self.dim, dtype=torch.float32)
        if batch.places:
            on_device: dict[str, Any] = {
                name: value.to(self._model.device) for name, value in batch.inputs.items()
            }
            with require_eval_mode(self._model):
                vision_embeds = self._model.get_vision_embeds(**on_device)
                self.tally.add(vision_embeds)
                embeds[batch.places] = self._model.to_image_embeds(vision_embeds).cpu()
        return embeds


class DecodedBatch(NamedTuple):
    """The images of a batch that could be decoded.

    Attributes:
        inputs: What the model takes.
        places: Of these images in the batch.
        size: Of the batch.
    """

    inputs: dict[str, Tensor]
    places: list[int]
    size: int


def _describe_unreadable(images: list[ImageSource]) -> str:
    errors = list(find_unreadable_images(images).values())
    shown = "\n".join(errors[:_SHOWN]) + ("\n…" if len(errors) > _SHOWN else "")
    return (
        f"{len(errors)} of {len(images)} images cannot be decoded:\n{shown}\nRepair or remove "
        "them, or skip them (--skip-invalid)."
    )


def _find_places(number_of: Array, plan: Sequence[Sequence[int]], count: int) -> list[Array]:
    """Find for each batch of distinct texts the places of all texts that are equal to them."""
    order = np.argsort(number_of, kind="stable")
    ends = np.searchsorted(number_of[order], np.arange(count + 1))
    return [
        np.concatenate([order[ends[number] : ends[number + 1]] for number in numbers])
        for numbers in plan
    ]


def _encode_all(prepared: PreparedShard, dim: int) -> Array:
    embeds = np.zeros((sum(map(len, prepared.batches)), dim), np.float32)
    for places, encoded in zip(prepared.batches, prepared.encode(prepared.batches), strict=True):
        embeds[places] = encoded.numpy()
    return embeds
