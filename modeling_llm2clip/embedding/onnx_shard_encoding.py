"""Final embeddings of the texts or images of a shard, by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch

from ..configs.embed_config import EmbedConfig
from ..data.atomic_files import hash_file, hash_json
from ..data.records.records import Modality
from ..encoding.onnx_encoding import DEFAULT_BATCH_SIZE, DEFAULT_TOKEN_BUDGET, IMAGE_INPUT
from ..model_folders.fingerprint import hash_model_files
from ..model_folders.onnx_folder import (
    choose_graph,
    data_file,
    load_onnx_encoder,
    read_onnx_record,
)
from .shard_encoding import ShardEncoder, make_image_encoder, make_text_encoder


def load_onnx_shard_encoder(folder: Path, modality: Modality, config: EmbedConfig) -> ShardEncoder:
    """Open the graph that is needed."""
    encoder = load_onnx_encoder(folder, weights=config.text_weights, modalities=(modality,))
    processor, dim = encoder.processor, encoder.embedding_dim
    if modality == "text":
        budget = config.token_budget or DEFAULT_TOKEN_BUDGET
        embed = encoder.iterate_token_batches
        return make_text_encoder(processor, embed, dim, budget, backend="onnx")
    return make_image_encoder(
        processor,
        lambda inputs: encoder.encode_pixels(inputs[IMAGE_INPUT]),
        dim,
        config.batch_size or DEFAULT_BATCH_SIZE,
        config,
        torch.device("cpu"),
        backend="onnx",
    )


def fingerprint_graph(folder: Path, modality: str, config: EmbedConfig) -> dict[str, str]:
    """Describe what determines the embeddings of a graph."""
    graph = choose_graph(folder, modality, config.text_weights)
    files = [file for file in (graph, data_file(graph)) if file.is_file()]
    return {
        **read_onnx_record(folder)["source"][modality],
        "graph": hash_json([hash_file(file) for file in files]),
        "tokenizer and settings": hash_model_files(folder, ["*.json"]),
    }
