"""What all tests of extraction share, and none may change."""

from __future__ import annotations

from pathlib import Path

import pytest
from extracting import extract_captions
from interruptions import read_bytes
from made_up_records import make_records
from tiny_folders import export_tiny_model, save_captioned_images

from modeling_llm2clip.data.records.records import CaptionedImage


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def records() -> list[CaptionedImage]:
    return make_records(30)


@pytest.fixture(scope="session")
def undisturbed(
    model: Path, records: list[CaptionedImage], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    return read_bytes(extract_captions(model, records, folder))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioned_images(tmp_path_factory.mktemp("images"), count=9)
