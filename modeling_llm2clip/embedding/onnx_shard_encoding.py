"""Final embeddings of the texts or images of a shard, by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch

from ..configs.embed_config import EmbedConfig
from ..data.atomic_files import hash_file, hash_json
from ..encoding.onnx_encoding import DEFAULT_BATCH_SIZE, DEFAULT_TOKEN_BUDGET, IMAGE_INPUT
from ..model_folders.fingerprint import hash_model_files
from ..model_folders.onnx_folder import (
    choose_graph,
    data_file,
    load_onnx_encoder,
    read_onnx_record,
)
from .embedding_rows import ImageRows, TextRows
from .shard_encoding import ImageShardEncoder, ShardEncoder, TextShardEncoder


def load_onnx_shard_encoder(
    folder: Path, rows: TextRows | ImageRows, config: EmbedConfig
) -> ShardEncoder:
    """Open the graph that is needed.

    Args:
        folder: Folder of ONNX graphs.
        rows: What is encoded.
        config: Options of the encoding.
    """
    modality = "text" if isinstance(rows, TextRows) else "image"
    encoder = load_onnx_encoder(folder, weights=config.text_weights, modalities=(modality,))
    if isinstance(rows, TextRows):
        return TextShardEncoder(
            encoder.processor,
            rows,
            encoder.iterate_token_batches,
            dim=encoder.embedding_dim,
            token_budget=config.token_budget or DEFAULT_TOKEN_BUDGET,
            backend="onnx",
        )
    return ImageShardEncoder(
        encoder.processor,
        rows,
        lambda inputs, _: encoder.encode_pixels(inputs[IMAGE_INPUT]),
        dim=encoder.embedding_dim,
        device=torch.device("cpu"),
        batch_size=config.batch_size or DEFAULT_BATCH_SIZE,
        config=config,
        backend="onnx",
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
