"""Final embeddings of the texts or images of a shard, batch by batch.

Which inputs share a batch depends on the shard alone, so an output that was continued has the same
bytes as one that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

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
from .embedding_rows import ImageRows, TextRows
from .shard_computation import PreparedShard
from .shard_writer import Array

EmbedTokens: TypeAlias = Callable[[TokenizedTexts, list[list[int]]], Iterator[Tensor]]
"""Yields the final embeddings of batches of texts, given the rows of each."""
EmbedPixels: TypeAlias = Callable[[Mapping[str, Tensor], ImageTally], Tensor]
"""Computes the final embeddings of images that the processor prepared, and tallies them."""
_SHOWN = 8


class ShardEncoder(ABC):
    """A loaded tower, and the rows that it encodes.

    Attributes:
        dim: Dimensions of an embedding, P.
        plan: What of the encoding decides the bytes.
        tally: Images that were encoded so far.
    """

    def __init__(
        self,
        processor: LLM2CLIPProcessor,
        rows: TextRows | ImageRows,
        dim: int,
        plan: dict[str, str],
    ) -> None:
        self._processor = processor
        self._rows = rows
        self.dim = dim
        self.plan = plan
        self.tally = ImageTally()

    def prepare(self, rows: range) -> PreparedShard:
        """Read the inputs of a shard, all of whose rows are given."""
        return self.prepare_inputs(self._rows.read_inputs(rows))

    @abstractmethod
    def prepare_inputs(self, inputs: list[Any]) -> PreparedShard:
        """Divide texts or addresses of images into batches."""

    def encode_sample(self, size: int) -> Array:
        """Encode some inputs, evenly spaced over the rows: (size, P) float32 of unit length.

        There are fewer where the rows are, and where images cannot be decoded.
        """
        prepared = self.prepare_inputs(self._rows.sample(size))
        embeds = np.zeros((sum(map(len, prepared.batches)), self.dim), np.float32)
        encoded = prepared.encode(prepared.batches)
        for places, of_batch in zip(prepared.batches, encoded, strict=True):
            embeds[places] = of_batch.numpy()
        self.tally = ImageTally()  # they will be encoded once more
        return embeds[embeds.any(axis=1)]


class TextShardEncoder(ShardEncoder):
    """Encodes the texts of shards; equal texts of a shard once.

    Args:
        processor: The model's processor.
        rows: The texts.
        embed: Encodes batches of them.
        dim: Dimensions of an embedding.
        token_budget: Maximum tokens per batch, padding included.
        backend: What else of the encoding decides the bytes.
    """

    def __init__(
        self,
        processor: LLM2CLIPProcessor,
        rows: TextRows,
        embed: EmbedTokens,
        *,
        dim: int,
        token_budget: int,
        **backend: str,
    ) -> None:
        super().__init__(processor, rows, dim, {"token_budget": str(token_budget), **backend})
        self._embed = embed
        self._token_budget = token_budget

    def prepare_inputs(self, inputs: list[str]) -> PreparedShard:
        """Tokenize texts."""
        numbers: dict[str, int] = {}
        number_of = np.array([numbers.setdefault(text, len(numbers)) for text in inputs])
        tokens = TokenizedTexts(self._processor, list(numbers))
        plan = plan_token_batches(tokens.lengths.tolist(), token_budget=self._token_budget)
        return PreparedShard(
            batches=_find_places(number_of, plan, len(numbers)),
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


class ImageShardEncoder(ShardEncoder):
    """Encodes the images of shards; threads decode them.

    Args:
        processor: The model's processor.
        rows: The images.
        embed: Encodes a batch of them.
        dim: Dimensions of an embedding.
        device: Where `embed` computes.
        batch_size: Images per batch.
        config: Number of threads, and whether an image that cannot be decoded gets zeros.
        backend: What else of the encoding decides the bytes.
    """

    def __init__(
        self,
        processor: LLM2CLIPProcessor,
        rows: ImageRows,
        embed: EmbedPixels,
        *,
        dim: int,
        device: torch.device,
        batch_size: int,
        config: EmbedConfig,
        **backend: str,
    ) -> None:
        super().__init__(processor, rows, dim, {"batch_size": str(batch_size), **backend})
        self._embed = embed
        self._device = device
        self._batch_size = batch_size
        self._config = config

    def prepare_inputs(self, inputs: list[ImageSource]) -> PreparedShard:
        """Divide images into batches of the same size."""
        batches = split_evenly(len(inputs), size=self._batch_size)
        return PreparedShard(
            batches=[np.array(places) for places in batches], encode=partial(self._encode, inputs)
        )

    def _encode(self, images: list[ImageSource], batches: Sequence[Array]) -> Iterator[Tensor]:
        if self._device.type == "cpu":
            raise_malloc_thresholds()
        for _, embeds in iterate_batches(
            images,
            [places.tolist() for places in batches],
            prepare=partial(self._decode, images),
            encode=self._embed_decoded,
            device=self._device,
            num_workers=self._config.num_workers,
        ):
            yield embeds

    def _decode(self, images: list[ImageSource], part: list[ImageSource]) -> _DecodedBatch:
        """Decode a batch; of several that cannot be, all of the shard are named."""
        places: list[int] = []

        def open_all() -> Iterator[Any]:
            for place, image in enumerate(part):
                try:
                    opened = decode_image(image)
                except ValueError:
                    if not self._config.skip_invalid:
                        raise ValueError(_describe_unreadable(images)) from None
                else:
                    places.append(place)
                    yield opened

        return _DecodedBatch(prepare_images(self._processor, open_all()), places, len(part))

    def _embed_decoded(self, batch: _DecodedBatch) -> Tensor:
        embeds = torch.zeros(batch.size, self.dim, dtype=torch.float32)
        if batch.places:
            embeds[batch.places] = self._embed(batch.inputs, self.tally)
        return embeds


class _DecodedBatch(NamedTuple):
    """The images of a batch that could be decoded, their places in it, and its size."""

    inputs: dict[str, Tensor]
    places: list[int]
    size: int


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

        def embed_tokens(texts: TokenizedTexts, plan: list[list[int]]) -> Iterator[Tensor]:
            for embeds in iterate_token_batches(text_model, processor, texts, plan):
                yield project_captions(text_model, embeds)

        return TextShardEncoder(
            processor,
            rows,
            embed_tokens,
            dim=text_model.config.projection_dim,
            token_budget=config.token_budget or default_token_budget(device),
        )
    model = LLM2CLIPVisionModel.from_pretrained(folder).to(device)

    def embed_pixels(inputs: Mapping[str, Tensor], tally: ImageTally) -> Tensor:
        on_device: dict[str, Any] = {name: value.to(device) for name, value in inputs.items()}
        with require_eval_mode(model):
            vision_embeds = model.get_vision_embeds(**on_device)
            tally.add(vision_embeds)
            return model.to_image_embeds(vision_embeds).cpu()

    return ImageShardEncoder(
        processor,
        rows,
        embed_pixels,
        dim=model.config.projection_dim,
        device=device,
        batch_size=config.batch_size or default_batch_size(device),
        config=config,
    )


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
