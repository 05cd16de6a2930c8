"""Encode the texts or images of a shard batch by batch.

Batches depend only on the shard, so on the same kind of machine a resumed output has the same bytes
as an uninterrupted one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._suggestions import list_first
from ..configs.encoding_config import EmbedConfig, ExtractConfig
from ..data.images.image_sources import ImageSource, UnreadableImagesError, decode_image
from ..data.key_arrays import Array
from ..data.records.records import Modality
from ..encoding.batches import describe_decoding, find_min_jpeg_side, require_finite, split_evenly
from ..encoding.dual_encoder import DualEncoder, DualEncoderProcessor
from ..encoding.encode import TorchEncoder
from ..encoding.encoder_interface import EncodedImages, Encoder
from ..encoding.layer_compilation import compile_layers
from ..encoding.precision import describe_precision
from ..encoding.tokenized_texts import TokenizedTexts
from ..model_folders.guarded_loading import find_stored_dtype, load_in_precision
from ..model_folders.model_folder import is_dual_encoder
from ..model_folders.onnx_folder import load_onnx_encoder
from ..model_folders.training_images import ImageTally
from ..modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..packing_llm2clip import plan_token_batches
from ..processing_llm2clip import LLM2CLIPProcessor


@dataclass(frozen=True)
class PreparedShard:
    """A shard that is ready to be encoded.

    Attributes:
        inputs: The shard's distinct inputs: tokenized texts, or sources of images.
        batches: Indices of the inputs in each batch.
        rows: For each row of the shard, the index of its input in `inputs`.
        num_truncated: Number of rows whose text exceeds the model's maximum length.
    """

    inputs: Sequence[Any]
    batches: Sequence[Sequence[int]]
    rows: Sequence[int]
    num_truncated: int = 0


@dataclass
class ShardEncoder(ABC):
    """A loaded tower that computes final embeddings for `embed`, or unprojected ones for `extract`.

    Attributes:
        encoder: The model.
        dim: Dimensions of an embedding.
        project: Whether embeddings are final, that is, projected and of unit length.
        plan: Encoding options that determine the bytes of the output.
        tally: Summary of the images encoded so far; empty with ONNX.
    """

    encoder: Encoder
    dim: int
    project: bool
    plan: dict[str, str]
    tally: ImageTally = field(default_factory=ImageTally, kw_only=True)

    @abstractmethod
    def prepare(self, inputs: list[Any]) -> PreparedShard:
        """Divide texts or sources of images into batches."""

    @abstractmethod
    def encode(self, prepared: PreparedShard) -> Iterator[Tensor]:
        """Yield the embeddings of each batch, float32 on the encoder's device.

        Inputs without an embedding get zeros. On a GPU, `arrange` checks that values are finite.
        """

    def arrange(self, prepared: PreparedShard, embeds: Tensor) -> Tensor:
        """Put the embeddings of all batches, on the CPU, in the order of the rows."""
        if self.encoder.runs_ahead:
            parts = embeds.split([len(numbers) for numbers in prepared.batches])
            for numbers, part in zip(prepared.batches, parts, strict=True):
                require_finite(part, numbers, prepared.inputs)
        places = np.empty(len(embeds), np.int64)
        places[np.concatenate(prepared.batches)] = np.arange(len(embeds))
        return embeds[places[np.asarray(prepared.rows)]]

    def encode_sample(self, inputs: list[Any]) -> Array:
        """Encode inputs as (N, dim) float32, without images that cannot be decoded."""
        prepared = self.prepare(inputs)
        embeds = self.arrange(prepared, torch.cat(list(self.encode(prepared))).cpu()).numpy()
        self.tally = ImageTally()  # the sample will be encoded again
        return embeds[embeds.any(axis=1)]


@dataclass
class TextShardEncoder(ShardEncoder):
    """Encodes each distinct text of a shard once.

    Attributes:
        token_budget: Maximum number of tokens per batch.
        is_teacher: Whether the model is a teacher, so truncated texts get zeros.
    """

    token_budget: int
    is_teacher: bool

    def prepare(self, inputs: list[str]) -> PreparedShard:
        """Tokenize the texts and batch the distinct ones."""
        numbers: dict[str, int] = {}
        rows = [numbers.setdefault(text, len(numbers)) for text in inputs]
        tokens = TokenizedTexts(self.encoder.processor, list(numbers))
        batches = plan_token_batches(tokens.lengths.tolist(), token_budget=self.token_budget)
        return PreparedShard(tokens, batches, rows, int(tokens.is_truncated[rows].sum()))

    def encode(self, prepared: PreparedShard) -> Iterator[Tensor]:
        tokens, batches = prepared.inputs, prepared.batches
        assert isinstance(tokens, TokenizedTexts)
        encoded = self.encoder.iterate_texts(tokens, batches, project=self.project)
        for numbers, embeds in zip(batches, encoded, strict=True):
            if self.is_teacher:
                embeds[tokens.is_truncated[numbers]] = 0
            yield embeds


@dataclass
class ImageShardEncoder(ShardEncoder):
    """Encodes images; threads decode them.

    Attributes:
        batch_size: Images per batch.
        config: Options of the command; with `skip_invalid`, undecodable images get zeros.
    """

    batch_size: int
    config: EmbedConfig | ExtractConfig

    def prepare(self, inputs: list[ImageSource]) -> PreparedShard:
        batches = split_evenly(len(inputs), size=self.batch_size)
        return PreparedShard(inputs, [list(batch) for batch in batches], range(len(inputs)))

    def encode(self, prepared: PreparedShard) -> Iterator[Tensor]:
        images = self.encoder.iterate_images(
            prepared.inputs,
            prepared.batches,
            project=self.project,
            open_image=partial(decode_image, min_jpeg_side=self.encoder.min_jpeg_side),
            on_error=lambda _, error: str(error),
            to_cpu=not self.encoder.runs_ahead,
        )
        with closing(images) as encoded:
            for numbers, batch in zip(prepared.batches, encoded, strict=True):
                if batch.errors and not getattr(self.config, "skip_invalid", False):
                    raise UnreadableImagesError(list_first(batch.errors.values(), "\n"))
                yield self._place(batch, numbers)

    def _place(self, batch: EncodedImages, numbers: Sequence[int]) -> Tensor:
        if self.project and batch.tower_embeds is not None:
            self.tally.add(batch.tower_embeds)
        if len(batch.rows) == len(numbers):
            return batch.embeds
        embeds = batch.embeds.new_zeros(len(numbers), self.dim)
        embeds[np.searchsorted(numbers, batch.rows)] = batch.embeds
        return embeds


def load_shard_encoder(
    folder: Path, modality: Modality, config: EmbedConfig | ExtractConfig, device: torch.device
) -> ShardEncoder:
    """Load the tower that encodes the modality, or open the tower's ONNX graph."""
    plan: dict[str, str] = {}
    is_teacher = is_teaching(folder, modality, config)
    project = isinstance(config, EmbedConfig) or is_teacher
    if is_teacher and config.compile:
        raise ValueError(
            f"compile=True is only for LLM2CLIP models, but {folder} is a teacher. Leave it out."
        )
    if isinstance(config, EmbedConfig) and config.backend == "onnx":
        weights, plan = config.text_weights, {"backend": "onnx"}
        encoder: Encoder = load_onnx_encoder(folder, weights=weights, modalities=(modality,))
    elif is_teacher:
        dtype = config.precision
        encoder = DualEncoder(folder, DualEncoderProcessor(folder), device, dtype=dtype)
        plan = {} if dtype == "auto" else {"precision": dtype}
    else:
        kind = LLM2CLIPTextModel if modality == "text" else LLM2CLIPVisionModel
        processor = LLM2CLIPProcessor.from_pretrained(folder)  # fails before the slow part
        if modality == "image":
            find_min_jpeg_side(processor.image_processor, config.jpeg_decoding)
        model = load_in_precision(kind, folder, device, config.precision)
        plan = describe_precision(model, find_stored_dtype(folder))
        if config.compile:
            compile_layers(model)
            plan["compiled"] = "layers"
        encoder = TorchEncoder(model, processor)
        head = model.text_projection if modality == "text" else model.visual_projection
    dim = encoder.embedding_dim if project else head.in_features
    if modality == "text":
        budget = encoder.token_budget
        if config.batch_size is not None:
            budget = config.batch_size * encoder.processor.longest_text
        plan = {"tokens per batch (batch_size)": str(budget), **plan}
        return TextShardEncoder(encoder, dim, project, plan, budget, is_teacher)
    size = config.batch_size or encoder.batch_size
    image_processor = encoder.processor.image_processor
    encoder.min_jpeg_side = find_min_jpeg_side(image_processor, config.jpeg_decoding)
    plan = {"batch_size": str(size), **plan, **describe_decoding(encoder.min_jpeg_side)}
    return ImageShardEncoder(encoder, dim, project, plan, size, config)


def is_teaching(folder: Path, modality: Modality, config: EmbedConfig | ExtractConfig) -> bool:
    """Return whether the folder is a dual encoder whose texts are extracted, as a teacher."""
    return modality == "text" and isinstance(config, ExtractConfig) and is_dual_encoder(folder)
