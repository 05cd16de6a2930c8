"""Embeddings of the texts or images of a shard, batch by batch.

Which inputs share a batch depends on the shard alone, so an output that was continued has the same
bytes as one that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..configs.embed_config import EmbedConfig
from ..data.images.image_sources import ImageSource, decode_image, find_unreadable_images
from ..data.records.records import Modality
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
from .shard_computation import PreparedShard
from .sharded_writer import Array

EmbedTokens: TypeAlias = Callable[[TokenizedTexts, list[list[int]]], Iterator[Tensor]]
"""Yields the embeddings of batches of texts, given the rows of each."""
_SHOWN = 8


@dataclass
class ShardEncoder:
    """A loaded tower that computes final embeddings.

    Attributes:
        dim: Dimensions of an embedding, P.
        plan: What of the encoding decides the bytes.
        prepare: Divides texts or addresses of images into batches.
        tally: Images that were encoded so far.
    """

    dim: int
    plan: dict[str, str]
    prepare: Callable[[list[Any]], PreparedShard]
    tally: ImageTally = field(default_factory=ImageTally)

    def encode_sample(self, inputs: list[Any]) -> Array:
        """Encode some inputs, (N, P) float32; images that cannot be decoded are left out."""
        prepared = self.prepare(inputs)
        embeds = np.zeros((len(inputs), self.dim), np.float32)
        encoded = prepared.encode(prepared.batches)
        for places, of_batch in zip(prepared.batches, encoded, strict=True):
            embeds[places] = of_batch.numpy()
        self.tally = ImageTally()  # they will be encoded once more
        return embeds[embeds.any(axis=1)]


def load_shard_encoder(
    folder: Path, modality: Modality, config: EmbedConfig, device: torch.device
) -> ShardEncoder:
    """Load the tower that is needed."""
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    if modality == "text":
        text_model = LLM2CLIPTextModel.from_pretrained(folder).to(device)

        def embed_tokens(texts: TokenizedTexts, plan: list[list[int]]) -> Iterator[Tensor]:
            for embeds in iterate_token_batches(text_model, processor, texts, plan):
                yield project_captions(text_model, embeds)

        budget = config.token_budget or default_token_budget(device)
        dim = text_model.config.projection_dim
        return make_text_encoder(processor, embed_tokens, dim, budget)
    model = LLM2CLIPVisionModel.from_pretrained(folder).to(device)

    def embed_pixels(inputs: Mapping[str, Tensor]) -> Tensor:
        on_device: dict[str, Any] = {name: value.to(device) for name, value in inputs.items()}
        with require_eval_mode(model):
            vision_embeds = model.get_vision_embeds(**on_device)
            encoder.tally.add(vision_embeds)
            embeds: Tensor = model.to_image_embeds(vision_embeds)
            return embeds

    batch_size = config.batch_size or default_batch_size(device)
    dim = model.config.projection_dim
    encoder = make_image_encoder(processor, embed_pixels, dim, batch_size, config, device)
    return encoder


def make_text_encoder(
    processor: LLM2CLIPProcessor,
    embed: EmbedTokens,
    dim: int,
    token_budget: int,
    **plan: str,
) -> ShardEncoder:
    """Make an encoder of texts; `plan` has what else of the encoding decides the bytes."""
    prepare = partial(prepare_texts, processor, embed, token_budget)
    return ShardEncoder(dim, {"token_budget": str(token_budget), **plan}, prepare)


def make_image_encoder(
    processor: LLM2CLIPProcessor,
    embed: Callable[[Mapping[str, Tensor]], Tensor],
    dim: int,
    batch_size: int,
    config: EmbedConfig,
    device: torch.device,
    **plan: str,
) -> ShardEncoder:
    """Make an encoder of images, which threads decode."""

    def prepare(images: list[ImageSource]) -> PreparedShard:
        places = [np.array(rows) for rows in split_evenly(len(images), size=batch_size)]
        return PreparedShard(places, partial(encode, images))

    def encode(images: list[ImageSource], batches: Sequence[Array]) -> Iterator[Tensor]:
        if device.type == "cpu":
            raise_malloc_thresholds()
        for _, embeds in iterate_batches(
            images,
            [places.tolist() for places in batches],
            prepare=partial(_decode, processor, images, config.skip_invalid),
            encode=embed_decoded,
            device=device,
            num_workers=config.num_workers,
        ):
            yield embeds

    def embed_decoded(batch: _DecodedBatch) -> Tensor:
        embeds = torch.zeros(batch.size, dim, dtype=torch.float32)
        if batch.places:
            embeds[batch.places] = embed(batch.inputs).cpu()
        return embeds

    return ShardEncoder(dim, {"batch_size": str(batch_size), **plan}, prepare)


def prepare_texts(
    processor: LLM2CLIPProcessor, embed: EmbedTokens, token_budget: int, texts: list[str]
) -> PreparedShard:
    """Tokenize the texts of a shard and divide them into batches; `embed` gets each text once."""
    numbers: dict[str, int] = {}
    number_of = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
    tokens = TokenizedTexts(processor, list(numbers))
    plan = plan_token_batches(tokens.lengths.tolist(), token_budget=token_budget)

    def encode(batches: Sequence[Array]) -> Iterator[Tensor]:
        # Places of equal texts are next to each other; each text is encoded at the first of them.
        plan = [list(dict.fromkeys(number_of[places].tolist())) for places in batches]
        for places, distinct, embeds in zip(batches, plan, embed(tokens, plan), strict=True):
            rows = {number: row for row, number in enumerate(distinct)}
            yield embeds[[rows[number] for number in number_of[places].tolist()]]

    return PreparedShard(
        batches=_find_places(number_of, plan, len(numbers)),
        encode=encode,
        num_truncated=int(tokens.is_truncated[number_of].sum()),
    )


class _DecodedBatch(NamedTuple):
    """The images of a batch that could be decoded, their places in it, and its size."""

    inputs: dict[str, Tensor]
    places: list[int]
    size: int


def _decode(
    processor: LLM2CLIPProcessor,
    images: list[ImageSource],
    skip_invalid: bool,
    part: list[ImageSource],
) -> _DecodedBatch:
    """Decode a batch; of several that cannot be, all of the shard are named."""
    places: list[int] = []

    def open_all() -> Iterator[Any]:
        for place, image in enumerate(part):
            try:
                opened = decode_image(image)
            except ValueError:
                if not skip_invalid:
                    raise ValueError(_describe_unreadable(images)) from None
            else:
                places.append(place)
                yield opened

    return _DecodedBatch(prepare_images(processor, open_all()), places, len(part))


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
