"""Fixtures for the tests of extraction; no test may modify them."""

from __future__ import annotations

from pathlib import Path

import pytest
from extracting import extract_captions
from interruptions import read_bytes
from made_up_records import make_records

from modeling_llm2clip.data.records.records import CaptionedImage


@pytest.fixture(scope="session")
def records() -> list[CaptionedImage]:
    return make_records(30)


@pytest.fixture(scope="session")
def extracted(
    model: Path, records: list[CaptionedImage], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The store of all records."""
    return extract_captions(model, records, tmp_path_factory.mktemp("extracted") / "store")


@pytest.fixture(scope="session")
def undisturbed(extracted: Path) -> dict[str, bytes]:
    return read_bytes(extracted)
