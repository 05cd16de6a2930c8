"""Models of sentence-transformers, described as the library runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import ROUNDING
from tiny_encoders import encode, unit
from transformers import AutoProcessor

from modeling_llm2clip.configs.evaluation_config import EvaluatedModel
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.publishing.export_model import export_model


def test_our_folder_is_a_sentence_transformer_if_that_is_requested(
    models: Any, images: list[Path]
) -> None:
    folder = models("llm2clip")
    as_ours, as_theirs = (
        load_encoder(folder),
        load_encoder(EvaluatedModel(source=str(folder), model_type="sentence-transformers")),
    )
    ours, theirs = encode(as_ours, images), encode(as_theirs, images)
    described = [encoder.description.images or {} for encoder in (as_ours, as_theirs)]
    assert described[0]["resize"] == described[1]["resize"] == {"height": 32, "width": 32}
    for found, wanted in zip(theirs, ours, strict=True):
        torch.testing.assert_close(unit(found), unit(wanted), rtol=0, atol=ROUNDING)


def test_a_sentence_transformer_is_described_as_it_reads_its_files(
    models: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(models("sentence-transformers"), tmp_path / "old")
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "find: "}, "default_prompt_name": "query"}', encoding="utf-8"
    )
    for written, max_tokens in (
        ({"max_seq_length": 12, "do_lower_case": True}, 12),  # as old releases wrote it
        ({"max_seq_length": None, "do_lower_case": False}, 24),
        ({}, 24),
    ):
        (folder / "sentence_bert_config.json").write_text(json.dumps(written), encoding="utf-8")
        encoder = load_encoder(folder)
        described = encoder.description
        assert described.images is None and described.text is not None
        assert (described.text["prompt"], described.text["max_tokens"]) == ("find: ", max_tokens)
        assert described.text["lower_case"] is bool(written.get("do_lower_case"))
        assert described.text["modules"][0] == "Transformer"
        long = encoder.encode_texts(["a dog", "a dog and a cat " * 60])
        assert long.is_truncated is not None and long.is_truncated.tolist() == [False, True]


def test_a_sentence_transformer_of_static_embeddings_has_no_limit_and_truncates_nothing(
    models: Any, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = AutoProcessor.from_pretrained(models("sentence-transformers")).backend_tokenizer
    module = StaticEmbedding(tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path))
    encoder = load_encoder(tmp_path)
    described = encoder.description.text
    assert described and described["modules"] == ["StaticEmbedding"]
    assert described["max_tokens"] is None
    assert encoder.encode_texts(["a dog and a cat " * 60]).is_truncated is None


def test_a_sentence_transformer_without_texts_is_refused(models: Any, tmp_path: Path) -> None:
    config = ExportConfig(components="vision")
    folder = export_model(models("llm2clip"), tmp_path / "vision", config)
    model = EvaluatedModel(source=str(folder), model_type="sentence-transformers")
    with pytest.raises(ValueError, match=r"encodes only \['image'\], but every task"):
        assert load_encoder(model).description
