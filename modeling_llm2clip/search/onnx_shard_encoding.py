"""Final embeddings of the texts or images of a shard, by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..configs.embed_config import EmbedConfig
from ..data.atomic_files import hash_file, hash_json
from ..data.images.image_sources import ImageSource
from ..encoding.batches import iterate_batches
from ..encoding.encode import raise_malloc_thresholds
from ..encoding.onnx_encoding import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_TOKEN_BUDGET,
    IMAGE_INPUT,
    OnnxEncoder,
)
from ..encoding.tokenized_texts import TokenizedTexts
from ..model_folders.fingerprint import hash_model_files
from ..model_folders.onnx_folder import (
    choose_graph,
    data_file,
    load_onnx_encoder,
    read_onnx_record,
)
from ..model_folders.training_images import ImageTally
from .embedding_rows import ImageRows, TextRows
from .shard_encoding import Array, DecodedBatch, ImageShardEncoder, TextShardEncoder


def load_onnx_shard_encoder(
    folder: Path, rows: TextRows | ImageRows, config: EmbedConfig
) -> OnnxTextShardEncoder | OnnxImageShardEncoder:
    """Open the graph that is needed.

    Args:
        folder: Folder of ONNX graphs.
        rows: What is encoded.
        config: Options of the encoding.
    """
    modality = "text" if isinstance(rows, TextRows) else "image"
    encoder = load_onnx_encoder(folder, weights=config.text_weights, modalities=(modality,))
    if isinstance(rows, TextRows):
        budget = config.token_budget or DEFAULT_TOKEN_BUDGET
        return OnnxTextShardEncoder(encoder, rows, token_budget=budget)
    return OnnxImageShardEncoder(
        encoder,
        rows,
        batch_size=config.batch_size or DEFAULT_BATCH_SIZE,
        num_workers=config.num_workers,
        skip_invalid=config.skip_invalid,
    )


def fingerprint_graph(folder: Path, modality: str, config: EmbedConfig) -> dict[str, str]:
    """Describe what determines the embeddings of a graph.

    Args:
        folder: Folder of ONNX graphs.
        modality: `"text"` or `"image"`.
        config: Options of the encoding.

    Returns:
        Those of the model that was exported, and of the folder `graph` and `tokenizer and settings`
        (SHA-256), which may have been changed since.

    Raises:
        ValueError: It is another folder, or has no such graph.
    """
    graph = choose_graph(folder, modality, config.text_weights)
    files = [file for file in (graph, data_file(graph)) if file.is_file()]
    return {
        **read_onnx_record(folder)["source"][modality],
        "graph": hash_json([hash_file(file) for file in files]),
        "tokenizer and settings": hash_model_files(folder, ["*.json"]),
    }


class OnnxTextShardEncoder(TextShardEncoder):
    """Encodes the texts of shards; equal texts of a shard once.

    Args:
        encoder: The text graph.
        rows: The texts.
        token_budget: Maximum tokens per batch, padding included.
    """

    def __init__(self, encoder: OnnxEncoder, rows: TextRows, *, token_budget: int) -> None:
        self._encoder = encoder
        self._processor = encoder.processor
        self._rows = rows
        self._token_budget = token_budget
        self.dim = encoder.embedding_dim
        self.plan = {"token_budget": str(token_budget), "backend": "onnx"}

    def _embed(self, texts: TokenizedTexts, plan: list[list[int]]) -> Iterator[Tensor]:
        return self._encoder.iterate_token_batches(texts, plan)


class OnnxImageShardEncoder(ImageShardEncoder):
    """Encodes the images of shards; threads decode them.

    Args:
        encoder: The vision graph.
        rows: The images.
        batch_size: Images per batch.
        num_workers: Threads that decode images; None for the default.
        skip_invalid: Give zeros for an image that cannot be decoded, instead of an error.
    """

    def __init__(
        self,
        encoder: OnnxEncoder,
        rows: ImageRows,
        *,
        batch_size: int,
        num_workers: int | None,
        skip_invalid: bool,
    ) -> None:
        self._encoder = encoder
        self._processor = encoder.processor
        self._rows = rows
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._skip_invalid = skip_invalid
        self.dim = encoder.embedding_dim
        self.plan = {"batch_size": str(batch_size), "backend": "onnx"}
        self.tally = ImageTally()  # stays empty: a graph gives no outputs of the tower

    def _encode(self, images: list[ImageSource], batches: Sequence[Array]) -> Iterator[Tensor]:
        raise_malloc_thresholds()
        for _, embeds in iterate_batches(
            images,
            [np.asarray(places).tolist() for places in batches],
            prepare=partial(self._decode, images),
            encode=self._embed,
            device=torch.device("cpu"),
            num_workers=self._num_workers,
        ):
            yield embeds

    def _embed(self, batch: DecodedBatch) -> Tensor:
        embeds = torch.zeros(batch.size, self.dim, dtype=torch.float32)
        if batch.places:
            embeds[batch.places] = self._encoder.encode_pixels(batch.inputs[IMAGE_INPUT])
        return embeds
