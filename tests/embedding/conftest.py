"""Fixtures for the tests of `embed` and of stores; no test may modify them."""

from __future__ import annotations

from pathlib import Path

import pytest
from embedding_runs import embed_texts, make_few_texts
from interruptions import read_bytes
from stores import make_embeddings, write_store
from tiny_folders import export_tiny_model, save_captioned_images

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.data.records.records import CaptionedImage


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def whole(model: Path) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """The model, loaded with its processor."""
    return LLM2CLIPModel.from_pretrained(model), LLM2CLIPProcessor.from_pretrained(model)


@pytest.fixture(scope="session")
def records() -> list[CaptionedImage]:
    return make_few_texts(14)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioned_images(tmp_path_factory.mktemp("images"), count=10)


@pytest.fixture(scope="session")
def embedded(
    model: Path, records: list[CaptionedImage], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The embeddings of all records, in float32."""
    return embed_texts(model, records, tmp_path_factory.mktemp("embedded") / "texts")


@pytest.fixture(scope="session")
def undisturbed(embedded: Path) -> dict[str, bytes]:
    return read_bytes(embedded)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", make_embeddings())
