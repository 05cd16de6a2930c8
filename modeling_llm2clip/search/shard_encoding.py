"""Final embeddings of the texts or images of a shard, batch by batch.

Which inputs share a batch depends on the shard alone, so an output that was continued has the same
bytes as one that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..configs.embed_config import EmbedConfig
from ..data.images.image_sources import ImageSource, decode_image, find_unreadable_images
from ..encoding.batches import split_evenly
from ..encoding.encode import TorchEncoder
from ..encoding.encoder_interface import Encoder
from ..encoding.tokenized_texts import TokenizedTexts
from ..model_folders.onnx_folder import load_onnx_encoder
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
    """Load the tower that is needed, or open its graph.

    Args:
        folder: Model folder, or with `config.backend` onnx a folder of ONNX graphs.
        rows: What is encoded.
        config: Options of the encoding.
        device: Where the tower runs.
    """
    is_text = isinstance(rows, TextRows)
    encoder: Encoder
    if config.backend == "onnx":
        modality = "text" if is_text else "image"
        encoder = load_onnx_encoder(folder, weights=config.text_weights, modalities=(modality,))
    else:
        kind = LLM2CLIPTextModel if is_text else LLM2CLIPVisionModel
        model = kind.from_pretrained(folder).to(device)
        encoder = TorchEncoder(model, LLM2CLIPProcessor.from_pretrained(folder))
    shards = TextShardEncoder if isinstance(rows, TextRows) else ImageShardEncoder
    return shards(encoder, rows, config)  # type: ignore[arg-type]


class TextShardEncoder:
    """Encodes the texts of shards; equal texts of a shard once.

    Args:
        encoder: The text tower.
        rows: The texts.
        config: Options of the encoding.
    """

    def __init__(self, encoder: Encoder, rows: TextRows, config: EmbedConfig) -> None:
        self._encoder = encoder
        self._rows = rows
        self._token_budget = config.token_budget or encoder.token_budget
        self.dim = encoder.embedding_dim
        self.plan = {"token_budget": str(self._token_budget), **_name_backend(config)}

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
        tokens = TokenizedTexts(self._encoder.processor, distinct)
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
        encoded = self._encoder.iterate_texts(texts, plan)
        for places, numbers, embeds in zip(batches, plan, encoded, strict=True):
            rows = {number: row for row, number in enumerate(numbers)}
            yield embeds[[rows[number] for number in number_of[places].tolist()]]


class ImageShardEncoder:
    """Encodes the images of shards; threads decode them.

    Args:
        encoder: The vision tower.
        rows: The images.
        config: Options of the encoding; `skip_invalid` gives zeros for an image that cannot be
            decoded, instead of an error.

    Attributes:
        tally: The images that were encoded so far; empty where a graph encodes them.
    """

    def __init__(self, encoder: Encoder, rows: ImageRows, config: EmbedConfig) -> None:
        self._encoder = encoder
        self._rows = rows
        self._config = config
        self._batch_size = config.batch_size or encoder.batch_size
        self.tally = ImageTally()
        self.dim = encoder.embedding_dim
        self.plan = {"batch_size": str(self._batch_size), **_name_backend(config)}

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
        plan = [places.tolist() for places in batches]
        encoded = self._encoder.iterate_images(
            images,
            plan,
            num_workers=self._config.num_workers,
            open_image=decode_image,
            on_error=lambda _, error: str(error),
        )
        for places, batch in zip(plan, encoded, strict=True):
            if batch.errors and not self._config.skip_invalid:
                raise ValueError(_describe_unreadable(images) or "\n".join(batch.errors.values()))
            if batch.tower_embeds is not None:
                self.tally.add(batch.tower_embeds)
            place_of = {row: place for place, row in enumerate(places)}
            embeds = torch.zeros(len(places), self.dim, dtype=torch.float32)
            embeds[[place_of[row] for row in batch.rows]] = batch.embeds
            yield embeds


def _name_backend(config: EmbedConfig) -> dict[str, str]:
    return {"backend": "onnx"} if config.backend == "onnx" else {}


def _describe_unreadable(images: list[ImageSource]) -> str:
    errors = list(find_unreadable_images(images).values())
    if not errors:
        return ""
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
