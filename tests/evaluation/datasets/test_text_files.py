"""JSON lists are read piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2clip.evaluation.datasets.readers import text_files


@pytest.mark.parametrize("read_at_once", [1, 2, 7, 1000])
def test_a_json_list_is_read_object_by_object_whatever_the_pieces(
    read_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_READ_AT_ONCE", read_at_once)
    items: list[Any] = [{"a": "]},{\u2028é"}, {"b": [1, {"c": None}]}, {}]
    file = tmp_path / "list.json"
    for indent in (None, 2):
        file.write_text(json.dumps(items, indent=indent), encoding="utf-8")
        assert list(text_files.iterate_json_list(file)) == items
    file.write_text("[]", encoding="utf-8")
    assert list(text_files.iterate_json_list(file)) == []


@pytest.mark.parametrize("text", ["", "{}", "[", '[{"a": 1}', '[{"a": 1} {"b": 2}]', '[{"a": 1}, '])
def test_a_file_that_is_not_a_json_list_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.json: no JSON list, or cut off"):
        list(text_files.iterate_json_list(file))
