"""Laws of the split that the demo trains on and that the evaluation tests on."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_llm2clip.data.records import CaptionedImage
from modeling_llm2clip.data.splits import choose_test_rows, split_records


def draw(group_id: str, style: str, caption: str | None = None) -> CaptionedImage:
    return CaptionedImage(
        Path(f"{group_id}-{style}.png"), f"{group_id}-{style}", group_id, (caption or group_id,)
    )


RECORDS = [draw(str(number), style) for number in range(40) for style in ("a", "b")]


def test_a_fifth_of_the_groups_is_held_out_whatever_the_order_of_the_records() -> None:
    held_out = split_records(RECORDS, seed=0)
    assert len(held_out) == 8
    assert split_records(RECORDS[::-1], seed=0) == held_out
    assert split_records(RECORDS, seed=1) != held_out


def test_at_most_300_keys_are_held_out() -> None:
    assert len(split_records([draw(str(n), "a") for n in range(2000)], seed=0)) == 300


def test_each_held_out_group_is_tested_once_by_its_last_record() -> None:
    rows = choose_test_rows(RECORDS, {"7", "3"})
    assert [RECORDS[row].name for row in rows] == ["3-b", "7-b"]


def test_a_caption_on_both_sides_of_the_split_is_refused() -> None:
    same = [draw(str(number), "a", "the same") for number in range(40)]
    with pytest.raises(ValueError, match=r"1 held-out captions are training captions too"):
        split_records(same, seed=0)
    with pytest.raises(ValueError, match="9 different things are too few"):
        split_records(RECORDS[:18], seed=0)
