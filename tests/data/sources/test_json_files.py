"""JSON: lists are read object by object, and what is not JSON is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2clip.data.sources import json_files


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


def test_what_is_not_json_or_not_a_list_of_it_is_named(tmp_path: Path) -> None:
    file = tmp_path / "torn.json"
    for text in ("", "{}", "[", '[{"a": 1}', '[{"a": 1} {"b": 2}]', '[{"a": 1}, '):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"torn\.json: not a JSON list, or truncated"):
            list(json_files.iterate_json_list(file))
    for content in (b"{", b"", b'{"a": "\xff"}'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"torn\.json: not JSON"):
            json_files.read_json(file)


def test_a_byte_order_mark_is_not_part_of_the_content(tmp_path: Path) -> None:
    file = tmp_path / "marked.json"
    file.write_bytes(b"\xef\xbb\xbf[1]\n\n[2]")
    assert [line for _, line in json_files.iterate_lines(file)] == [b"[1]\n", b"[2]"]
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert json_files.read_json(file) == [1] == list(json_files.iterate_json_list(file))
