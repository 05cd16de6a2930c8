"""Models of sentence-transformers, and what is read of them without their weights."""

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
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.evaluation.encoders.sentence_transformers_models import _read_files


def test_a_sentence_transformer_without_images_says_so(models: Any) -> None:
    assert load_encoder(models("sentence-transformers")).description.images is None


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


@pytest.mark.parametrize("model_type", ["sentence-transformers", "llm2clip"])
def test_files_say_of_a_sentence_transformer_what_it_says_itself(
    model_type: str, models: Any
) -> None:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(models(model_type)), device="cpu")
    found = _read_files(models(model_type))
    assert found.modules == tuple(type(module).__name__ for module in loaded)
    assert (found.images is not None) == ("image" in loaded.modalities)
    assert found.longest_text == loaded.max_seq_length
    assert found.default_prompt == loaded.prompts.get(loaded.default_prompt_name)


@pytest.mark.parametrize(
    ("written", "max_tokens"),
    [
        ({"max_seq_length": 12, "do_lower_case": True}, 12),  # as old releases wrote it
        ({"max_seq_length": None, "do_lower_case": False}, 24),
        ({}, 24),
    ],
)
def test_older_files_of_a_sentence_transformer_are_read_as_it_reads_them(
    written: dict[str, Any], max_tokens: int, models: Any, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "old"
    shutil.copytree(models("sentence-transformers"), folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps(written), encoding="utf-8")
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "find: "}, "default_prompt_name": "query"}', encoding="utf-8"
    )
    found = _read_files(folder)
    loaded = SentenceTransformer(str(folder), device="cpu")
    assert found.longest_text == loaded.max_seq_length == max_tokens
    assert tuple(loaded.modalities) == ("text",) and found.images is None
    assert found.default_prompt == "find: "
    assert found.lower_case is bool(written.get("do_lower_case"))


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
    folder = tmp_path / "blind"
    shutil.copytree(models("sentence-transformers"), folder)
    (folder / "sentence_bert_config.json").write_text('{"modality_config": {"audio": {}}}', "utf-8")
    with pytest.raises(ValueError, match=r"\('audio',\) and no texts"):
        assert load_encoder(folder).description


def test_a_damaged_list_of_modules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"modules\.json is missing or damaged"):
        load_encoder(tmp_path)
