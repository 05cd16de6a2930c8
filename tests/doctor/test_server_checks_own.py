"""The package's own server passes the checks of endpoints, in every schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_apps import run_app
from tiny import tiny_model

from modeling_llm2clip.configs.serve_config import ServeConfig, ServerCheckConfig
from modeling_llm2clip.doctor import server_checks
from modeling_llm2clip.doctor.server_checks import check_server
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.serving.app import create_app
from modeling_llm2clip.serving.service import EmbeddingService

IMAGE_CHECKS = {plan.name for plan in server_checks._PLANNED if plan.about not in (None, "option")}
SKIPPED = {
    "openai": IMAGE_CHECKS,
    "chat": {"batched images", "mixed inputs"},
    "cohere": {"base64", "dimensions", "mixed inputs"},
    "jina": set(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_model()
    folder = tmp_path_factory.mktemp("own") / "tiny_1"
    instructions = {"query": "Find: ", "document": "Image: ", "topic": "Topic: "}
    return save_model(model, processor, folder, instructions=instructions)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    service = EmbeddingService.open(folder, ServeConfig(device="cpu"))
    with run_app(create_app(service)) as address:
        yield address


@pytest.mark.parametrize("schema", ["openai", "chat", "cohere", "jina"])
def test_the_own_server_gives_the_embeddings_of_the_folder(
    schema: Any, folder: Path, url: str
) -> None:
    config = ServerCheckConfig(server=url, schema=schema, device="cpu")
    report = check_server(folder, config)
    assert report.healthy, str(report)
    skipped = {check.name for check in report.checks if check.skipped}
    assert skipped == SKIPPED[schema]
    assert not any(check.concern for check in report.checks), str(report)
