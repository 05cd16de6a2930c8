"""JSON: lists are read object by object, and what is not JSON is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2clip.data.labels import read_labels
from modeling_llm2clip.data.sources import json_files
from modeling_llm2clip.data.validation_errors import ErrorCollector
from modeling_llm2clip.model_folders.model_folder import read_json_object


@pytest.mark.parametrize("read_at_once", [1, 2, 7, 1000])
def test_a_json_list_is_read_object_by_object_whatever_the_pieces(
    read_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "_READ_AT_ONCE", read_at_once)
    items: list[Any] = [{"a": "]},{\u2028é"}, {"b": [1, {"c": None}]}, {}]
    file = tmp_path / "list.json"
    for indent in (None, 2):
        file.write_text(json.dumps(items, indent=indent), encoding="utf-8")
        assert list(json_files.iterate_json_list(file)) == items
    file.write_text("[]", encoding="utf-8")
    assert list(json_files.iterate_json_list(file)) == []


def test_invalid_json_and_lists_are_named(tmp_path: Path) -> None:
    file = tmp_path / "torn.json"
    for text in ("", "{}", "[", '[{"a": 1}', '[{"a": 1} {"b": 2}]', '[{"a": 1}, '):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"torn\.json: not a JSON list, or truncated"):
            list(json_files.iterate_json_list(file))
    for content in (b"{", b"", b'{"a": "\xff"}'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"torn\.json: not JSON"):
            json_files.read_json(file)


UNREADABLE = "JSON nested too deeply, or an integer of thousands of digits"


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_json_that_python_cannot_hold_is_named(value: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.json"
    file.write_text(f'{{"a": {value}}}', encoding="utf-8")
    errors = ErrorCollector()
    assert list(json_files.read_json_lines(file, errors)) == []
    assert errors.places == {UNREADABLE: ["bomb.json line 1"]}
    with pytest.raises(
        ValueError, match=r"bomb\.json: not JSON, or nested too deeply \((max|Exceeds)"
    ):
        json_files.read_json(file)
    assert read_json_object(file) is None
    file.write_text(f"[{value}]", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"bomb\.json: {UNREADABLE}"):
        list(json_files.iterate_json_list(file))
    with pytest.raises(ValueError, match=r"bomb\.json: "):
        read_labels(file)


def test_a_byte_order_mark_is_not_part_of_the_content(tmp_path: Path) -> None:
    file = tmp_path / "marked.json"
    file.write_bytes(b"\xef\xbb\xbf[1]\n\n[2]")
    assert [line for _, line in json_files.iterate_lines(file)] == [b"[1]\n", b"[2]"]
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert json_files.read_json(file) == [1] == list(json_files.iterate_json_list(file))
