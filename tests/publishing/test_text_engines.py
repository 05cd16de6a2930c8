"""Engines that know nothing of this package give the model's text embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aligning import write_color_data
from onnx_folders import write_small_data
from shared_models import ROUNDING, mostly_slow
from tei import TextEmbeddingsInference
from tiny import tiny_vision
from tiny_embedders import tiny_embedder
from tiny_folders import export_tiny_model

from modeling_llm2clip import ExportConfig, export_model, load_onnx_encoder
from modeling_llm2clip.building.build_model import build_model
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.training.alignment.align import align

# Of several lengths, the last one beyond the maximum.
TEXTS = [
    "a dog", "Two red apples on a wooden table, 1862", "(1) It's", "東京の夜景",
    " ".join(["a dog on a mat"] * 40),
]  # fmt: skip


@pytest.mark.parametrize(
    "family", ["MiniLM", pytest.param("EmbeddingGemma", marks=pytest.mark.slow)]
)
def test_the_locked_texts_of_a_trained_model_are_the_released_embedders(
    family: str, tmp_path: Path
) -> None:
    """So any engine that serves the embedder serves the text side of the model."""
    library = pytest.importorskip("sentence_transformers")
    source = tiny_embedder(tmp_path, family)
    built = BuildConfig(prompt="own", keep_embeddings=True)
    joined = build_model(tiny_vision(), source, tmp_path / "joined", built)
    data = load_records(write_color_data(tmp_path / "data", count=12))
    config = AlignConfig(
        lock_text=True, text_training="frozen-online", projection_init="model", device="cpu",
        max_steps=1, global_batch_size=8, held_out_ratio=0.0, warmup_steps=0,
    )  # fmt: skip
    trained = align(joined, data, tmp_path / "trained", config)
    model: Any
    model, processor = load_model(trained, device="cpu")
    found = encode_texts(model, processor, TEXTS)
    embedder = library.SentenceTransformer(str(source), device="cpu")
    wanted = F.normalize(embedder.encode(TEXTS, convert_to_tensor=True), dim=-1)
    assert torch.allclose(found, wanted, atol=ROUNDING)


def save_trained(kind: str, folder: Path) -> Path:
    """Save a model whose prompt is not pooled, one that pools its last token, or an embedder."""
    if kind == "prompt":
        return export_tiny_model(folder / "model")
    if kind == "last token":
        return export_tiny_model(
            folder / "model", llm="qwen3", bidirectional=False, text_pooling="last_token"
        )
    source = tiny_embedder(folder, kind)
    config = BuildConfig(prompt="own", keep_embeddings=True)
    return build_model(tiny_vision(), source, folder / "model", config)


@pytest.mark.filterwarnings("error:.*has no fields")
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(
    "kind", mostly_slow(["prompt", "last token", "MiniLM", "Qwen3-Embedding"], {"prompt"})
)
def test_text_embeddings_inference_serves_a_text_only_export(
    kind: str, padding_side: str, tmp_path: Path
) -> None:
    source = save_trained(kind, tmp_path)
    config = ExportConfig(
        onnx=True, components="text", onnx_data=write_small_data(tmp_path / "data")
    )
    folder = export_model(source, tmp_path / "graphs", config)
    file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**settings, "padding_side": padding_side}), "utf-8")
    assert "Text Embeddings Inference" in (folder / "README.md").read_text("utf-8")
    engine = TextEmbeddingsInference(folder)
    model: Any
    model, processor = load_model(source, device="cpu")
    ids = [processor(text=[text])["input_ids"][0].tolist() for text in TEXTS]
    assert [engine.tokenize(text) for text in TEXTS] == ids
    wanted = encode_texts(model, processor, TEXTS)
    together = torch.from_numpy(engine.embed(TEXTS))
    alone = torch.cat([torch.from_numpy(engine.embed([text])) for text in TEXTS])
    assert torch.allclose(together, wanted, atol=ROUNDING)
    assert torch.allclose(alone, wanted, atol=ROUNDING)
    encoder = load_onnx_encoder(folder)
    assert torch.allclose(encoder.encode_texts(TEXTS), wanted, atol=ROUNDING)
