"""Splits keep groups whole, share no caption and depend only on the seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.records.splits import choose_test_rows, split_records


def make_record(group_id: str, style: str, *captions: str, long: str = "") -> CaptionedImage:
    name = f"{group_id}-{style}"
    texts = captions or (group_id,)
    return CaptionedImage(Path(f"{name}.png"), name, group_id, texts, (long,) if long else ())


RECORDS = [make_record(str(number), style) for number in range(40) for style in "ab"]


def test_a_split_keeps_every_record_in_order_and_every_group_whole() -> None:
    train, test = split_records(RECORDS, test_size=0.2, seed=0)
    groups = {record.group_id for record in test}
    assert len(groups) == 8
    assert test == [record for record in RECORDS if record.group_id in groups]
    assert train == [record for record in RECORDS if record.group_id not in groups]


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_the_records() -> None:
    def choose(records: list[CaptionedImage], seed: int) -> set[str]:
        return {r.group_id for r in split_records(records, test_size=8, seed=seed)[1]}

    assert choose(RECORDS, 0) == choose(RECORDS[::-1], 0) != choose(RECORDS, 1)


def test_a_test_size_below_1_is_a_share_and_otherwise_a_number_of_groups() -> None:
    by_share = split_records(RECORDS, test_size=0.25, seed=0)
    assert by_share == split_records(RECORDS, test_size=10, seed=0)
    for test_size in (0, 1, 0.02, 39, 0.99, -3):
        with pytest.raises(ValueError, match=r"of 40 groups of images on the test side"):
            split_records(RECORDS, test_size=test_size, seed=0)


def test_a_caption_on_both_sides_of_the_split_is_refused() -> None:
    same = [make_record(str(number), "a", "the same") for number in range(40)]
    with pytest.raises(ValueError, match=r"1 caption on both sides .*'the same'"):
        split_records(same, test_size=0.2, seed=0)
    train, test = split_records(same, test_size=0.2, seed=0, allow_shared_captions=True)
    assert (len(train), len(test)) == (32, 8)
    # A long caption of one image also leaks if it is a short one of another.
    crossed = [
        make_record(str(n), "a", *(("shared",) if n % 2 else ()), long="" if n % 2 else "shared")
        for n in range(40)
    ]
    with pytest.raises(ValueError, match="on both sides"):
        split_records(crossed, test_size=0.2, seed=0)


def test_each_held_out_group_is_tested_once_by_its_last_record() -> None:
    rows = choose_test_rows(RECORDS, {"7", "3"})
    assert [RECORDS[row].name for row in rows] == ["3-b", "7-b"]
