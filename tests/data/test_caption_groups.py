"""Groups of captions, the pairs made of them, and text pairs from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from modeling_llm2clip.data.caption_groups import (
    CaptionGroup,
    group_captions,
    read_text_pairs,
    sample_pairs,
    skip_single_captions,
)
from modeling_llm2clip.data.records import CaptionedImage


def test_pairs_use_each_caption_once_and_an_odd_one_twice_at_most() -> None:
    pairs = sample_pairs([CaptionGroup("k", ("a", "b", "c"))], seed=0)
    used = [text for pair in pairs for text in (pair.anchor, pair.positive)]
    assert sorted(set(used)) == ["a", "b", "c"] and len(used) == 4
    assert all(pair.anchor != pair.positive for pair in pairs)


def make_records(captions: Sequence[tuple[str, ...]]) -> list[CaptionedImage]:
    return [
        CaptionedImage(
            image=None, name=f"{n}.jpg", group_id=f"{n}.jpg", captions=texts,
            place=f"captions.jsonl line {n + 1}",
        )
        for n, texts in enumerate(captions)
    ]  # fmt: skip


def test_images_with_one_caption_are_counted_and_named_with_the_ways_around_them() -> None:
    with pytest.raises(
        ValueError, match=r"2 of 2 .* one caption only.*0\.jpg \(captions\.jsonl line 1\)"
    ) as refused:
        group_captions(make_records([("one",), ("one", "one")]))
    ways = ("--skip-single-captions", "build --lora", "llm2clip extract")
    assert all(way in str(refused.value) for way in ways)


def test_images_with_one_caption_are_skipped_by_group_and_counted() -> None:
    records = make_records([("a",), ("b", "c"), ("d", "d")])
    # Another record of the first group gives it a second caption.
    records.append(replace(records[0], captions=("e",), lang="de"))
    kept, num_skipped = skip_single_captions(records)
    assert num_skipped == 1
    assert [group.captions for group in group_captions(kept)] == [("a", "e"), ("b", "c")]
    with pytest.raises(ValueError, match=r"All 1 images have one caption.*--lora"):
        skip_single_captions(records[2:3])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "not JSON"),
        ('{"query": "a", "positive": " "}', "non-blank"),
        ('{"query": "a", "positive": "b", "negatives": ["b"]}', "among its negatives"),
        ('{"query": "a", "positive": "b", "negatives": [" a "]}', "the query is among its neg"),
        ('{"query": "a", "positive": "b", "positive": "c"}', "field 'positive' twice"),
        ('{"query": "a", "positive": "b", "score": 1}', "unknown field 'score'"),
        ('{"query": "a", "positive": "b", "negatives": ["c"]}', "between 0 and 1 negatives"),
    ],
)
def test_broken_text_pairs_are_named_by_line(tmp_path: Path, line: str, error: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "a", "positive": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=error):
        read_text_pairs(file)


def test_text_pairs_are_read_as_captions_are(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes('\ufeff{"query": " a\u2028dog ", "positive": "on a mat\\n"}\n'.encode())
    (pair,) = read_text_pairs(file)
    assert (pair.anchor, pair.positive) == ("a dog", "on a mat")
