"""Embeddings of the texts or images of a shard, batch by batch.

Which inputs share a batch depends on the shard alone, so an output that was continued has the same
bytes as one that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._suggestions import counted
from ..configs.encoding_config import EmbedConfig, ExtractConfig
from ..data.images.image_sources import ImageSource, decode_image, find_unreadable_images
from ..data.records.records import Modality
from ..encoding.batches import split_evenly
from ..encoding.dual_encoder import DualEncoder, DualEncoderProcessor
from ..encoding.encode import TorchEncoder
from ..encoding.encoder_interface import Encoder
from ..encoding.tokenized_texts import TokenizedTexts
from ..model_folders.model_folder import is_dual_encoder
from ..model_folders.onnx_folder import load_onnx_encoder
from ..model_folders.training_images import ImageTally
from ..modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..packing_llm2clip import plan_token_batches
from ..processing_llm2clip import LLM2CLIPProcessor
from .shard_computation import PreparedShard
from .sharded_writer import Array

_SHOWN = 8


@dataclass
class ShardEncoder:
    """A loaded tower, which computes final embeddings for `embed`, and its own for `extract`.

    Attributes:
        dim: Dimensions of an embedding.
        plan: What of the encoding decides the bytes.
        prepare: Divides texts or addresses of images into batches.
        tally: Images that were encoded so far; empty where a graph encodes them.
    """

    dim: int
    plan: dict[str, str]
    prepare: Callable[[list[Any]], PreparedShard]
    tally: ImageTally = field(default_factory=ImageTally)

    def encode_sample(self, inputs: list[Any]) -> Array:
        """Encode some inputs, (N, dim) float32; images that cannot be decoded are left out."""
        prepared = self.prepare(inputs)
        embeds = np.zeros((len(inputs), self.dim), np.float32)
        encoded = prepared.encode(prepared.batches)
        for places, of_batch in zip(prepared.batches, encoded, strict=True):
            embeds[places] = of_batch.numpy()
        self.tally = ImageTally()  # they will be encoded once more
        return embeds[embeds.any(axis=1)]


def load_shard_encoder(
    folder: Path, modality: Modality, config: EmbedConfig | ExtractConfig, device: torch.device
) -> ShardEncoder:
    """Load the tower that is needed, or open its graph."""
    plan: dict[str, str] = {}
    is_teacher = is_teaching(folder, modality, config)
    project = isinstance(config, EmbedConfig) or is_teacher
    if isinstance(config, EmbedConfig) and config.backend == "onnx":
        weights, plan = config.text_weights, {"backend": "onnx"}
        encoder: Encoder = load_onnx_encoder(folder, weights=weights, modalities=(modality,))
    elif is_teacher:
        encoder = DualEncoder(folder, DualEncoderProcessor(folder), device)
    else:
        kind = LLM2CLIPTextModel if modality == "text" else LLM2CLIPVisionModel
        processor = LLM2CLIPProcessor.from_pretrained(folder)  # before what takes long
        model = kind.from_pretrained(folder).to(device)
        encoder = TorchEncoder(model, processor)
        head = model.text_projection if modality == "text" else model.visual_projection
    dim = encoder.embedding_dim if project else head.in_features
    if modality == "text":
        budget = config.token_budget or encoder.token_budget
        plan = {"token_budget": str(budget), **plan}
        prepare_texts = partial(_prepare_texts, encoder, budget, project, is_teacher)
        return ShardEncoder(dim, plan, prepare_texts)

    batch_size = config.batch_size or encoder.batch_size

    def prepare(images: list[ImageSource]) -> PreparedShard:
        places = [np.array(rows) for rows in split_evenly(len(images), size=batch_size)]
        encode = partial(_encode_images, encoder, shards.tally, images, config)
        return PreparedShard(places, encode)

    shards = ShardEncoder(dim, {"batch_size": str(batch_size), **plan}, prepare)
    return shards


def is_teaching(folder: Path, modality: Modality, config: EmbedConfig | ExtractConfig) -> bool:
    """Tell whether texts are extracted by the text encoder of a dual encoder, as a teacher's."""
    return modality == "text" and isinstance(config, ExtractConfig) and is_dual_encoder(folder)


def _prepare_texts(
    encoder: Encoder, token_budget: int, project: bool, is_teacher: bool, texts: list[str]
) -> PreparedShard:
    """Tokenize the texts of a shard and divide them into batches; each text is encoded once.

    A teacher gives zeros for a text that it does not read to the end.
    """
    numbers: dict[str, int] = {}
    number_of = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    tokens = TokenizedTexts(encoder.processor, list(numbers))
    plan = plan_token_batches(tokens.lengths.tolist(), token_budget=token_budget)

    def encode(batches: Sequence[Array]) -> Iterator[Tensor]:
        # Places of equal texts are next to each other; each text is encoded at the first of them.
        plan = [list(dict.fromkeys(number_of[places].tolist())) for places in batches]
        encoded = encoder.iterate_texts(tokens, plan, project=project)
        for places, distinct, embeds in zip(batches, plan, encoded, strict=True):
            if is_teacher:
                embeds[tokens.is_truncated[distinct]] = 0
            rows = {number: row for row, number in enumerate(distinct)}
            yield embeds[[rows[number] for number in number_of[places].tolist()]]

    return PreparedShard(
        batches=_find_places(number_of, plan, len(numbers)),
        encode=encode,
        num_truncated=int(tokens.is_truncated[number_of].sum()),
    )


def _encode_images(
    encoder: Encoder,
    tally: ImageTally,
    images: list[ImageSource],
    config: EmbedConfig | ExtractConfig,
    batches: Sequence[Array],
) -> Iterator[Tensor]:
    """Encode images, which threads decode; with `skip_invalid`, broken ones become zeros."""
    plan, num_workers = [places.tolist() for places in batches], config.num_workers
    if isinstance(config, ExtractConfig):  # which leaves no image out
        found = encoder.iterate_images(images, plan, project=False, num_workers=num_workers)
        yield from (batch.embeds for batch in found)
        return
    encoded = encoder.iterate_images(
        images,
        plan,
        num_workers=num_workers,
        open_image=decode_image,
        on_error=lambda _, error: str(error),
    )
    for places, batch in zip(plan, encoded, strict=True):
        if batch.errors and not config.skip_invalid:
            raise ValueError(_describe_unreadable(images) or "\n".join(batch.errors.values()))
        if batch.tower_embeds is not None:
            tally.add(batch.tower_embeds)
        place_of = {row: place for place, row in enumerate(places)}
        embeds = torch.zeros(len(places), encoder.embedding_dim, dtype=torch.float32)
        embeds[[place_of[row] for row in batch.rows]] = batch.embeds
        yield embeds


def _describe_unreadable(images: list[ImageSource]) -> str:
    errors = list(find_unreadable_images(images).values())
    if not errors:
        return ""
    shown = "\n".join(errors[:_SHOWN]) + ("\n…" if len(errors) > _SHOWN else "")
    return (
        f"{len(errors)} of {counted(len(images), 'image')} cannot be decoded:\n{shown}\nRepair or "
        "remove what is named, or skip it (--skip-invalid)."
    )


def _find_places(number_of: Array, plan: Sequence[Sequence[int]], count: int) -> list[Array]:
    """Find for each batch of distinct texts the places of all texts that are equal to them."""
    order = np.argsort(number_of, kind="stable")
    ends = np.searchsorted(number_of[order], np.arange(count + 1))
    return [
        np.concatenate([order[ends[number] : ends[number + 1]] for number in numbers])
        for numbers in plan
    ]
