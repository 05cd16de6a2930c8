"""Text pairs of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_llm2clip.data.captions.text_pairs import read_text_pairs

ERRORS = {
    "{": "not JSON",
    '{"query": "a", "positive": " "}': "non-blank",
    '{"query": "a", "positive": "b", "negatives": ["b"]}': "among its negatives",
    '{"query": "a", "positive": "b", "negatives": [" a "]}': "the query is among its neg",
    '{"query": "a", "positive": "b", "positive": "c"}': "field 'positive' occurs twice",
    '{"query": "a", "positive": "b", "score": 1}': "unknown field 'score'",
    '{"query": "a", "positive": "b", "negatives": ["c"]}': "between 0 and 1 negatives",
    "\n".join("{" * 7): r"(?s)7 errors.*not JSON: 7 \(line 2, .*line 6, …\)",
}


def test_broken_text_pairs_are_counted_and_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    for lines, error in ERRORS.items():
        file.write_text('{"query": "a", "positive": "b"}\n' + lines + "\n")
        with pytest.raises(ValueError, match=error):
            list(read_text_pairs(file))
    file.write_text("\n")
    with pytest.raises(ValueError, match="no pairs"):
        list(read_text_pairs(file))


def test_text_pairs_are_read_as_captions_are(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes('\ufeff{"query": " a\u2028dog ", "positive": "on a mat\\n"}\n'.encode())
    (pair,) = read_text_pairs(file)
    assert (pair.anchor, pair.positive) == ("a dog", "on a mat")
