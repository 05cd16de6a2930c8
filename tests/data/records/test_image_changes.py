"""An image that changes under a cached index is detected, and the source is read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2clip.data.records import record_index
from modeling_llm2clip.data.records.data_hashes import hash_images
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.validation_errors import DataValidationError

NUM_IMAGES = 40
CHANGED = "images/1/39.png"  # which every evenly spread sample has


@pytest.fixture(autouse=True)
def _kept_index(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:  # noqa: ARG001
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    monkeypatch.setattr(record_index, "_IMAGES_SAMPLED", 5)


@pytest.fixture(params=["every image", "some"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a source with two folders of images, few enough to check all or not."""
    if request.param == "some":
        monkeypatch.setattr(record_index, "_MOST_IMAGES", NUM_IMAGES - 1)
    names = [f"images/{number % 2}/{number}.png" for number in range(NUM_IMAGES)]
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"an image")
    lines = [json.dumps({"image": name, "captions": ["a"]}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    built: list[Any] = []
    build = record_index._build
    monkeypatch.setattr(record_index, "_build", lambda *a: built.append(a) or build(*a))  # type: ignore[func-returns-value]
    return built


def test_an_image_of_another_size_is_detected(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = count_builds(monkeypatch)
    before = hash_images(load_records(source))
    assert hash_images(load_records(source)) == before and len(built) == 1
    other = source / "other"
    other.write_bytes(b"another image")
    other.replace(source / CHANGED)
    after = load_records(source)
    assert len(built) == 2 and hash_images(after) != before
    assert load_records(source) == after and len(built) == 2


def test_a_missing_image_is_an_error_again(source: Path) -> None:
    load_records(source)
    (source / CHANGED).unlink()
    with pytest.raises(DataValidationError, match=r"image missing: 1 \(captions.jsonl line 40\)"):
        load_records(source)
