"""Groups of captions as columns: equal to groups in a dictionary, in any record order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llm2clip.data import key_arrays
from modeling_llm2clip.data.captions import caption_groups
from modeling_llm2clip.data.captions.caption_groups import group_captions, skip_single_captions
from modeling_llm2clip.data.records import record_columns, record_table
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage


def make_records(captions: Sequence[tuple[str, ...]]) -> list[CaptionedImage]:
    return [
        CaptionedImage(
            image=None, name=f"{n}.jpg", group_id=f"{n}.jpg", captions=texts,
            place=f"captions.jsonl line {n + 1}",
        )
        for n, texts in enumerate(captions)
    ]  # fmt: skip


TEXTS = st.lists(st.sampled_from("abcdefghij"), max_size=3).map(tuple)
RECORDS = st.lists(st.tuples(st.sampled_from("xyzuvw"), TEXTS, TEXTS), min_size=1, max_size=30)


def collect_by_dictionary(records: Sequence[CaptionedImage]) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for record in records:
        texts = found.setdefault(record.group_id, {})
        texts.update(dict.fromkeys((*record.captions, *record.long_captions)))
    return {group_id: tuple(texts) for group_id, texts in found.items()}


@given(RECORDS)
@settings(max_examples=60)
def test_groups_equal_those_of_a_dictionary_for_any_batch_size(
    rows: list[tuple[str, tuple[str, ...], tuple[str, ...]]],
) -> None:
    records = [
        CaptionedImage(None, str(n), group_id, short, long)
        for n, (group_id, short, long) in enumerate(rows)
    ]
    expected = {g: t for g, t in collect_by_dictionary(records).items() if len(t) > 1}
    with pytest.MonkeyPatch.context() as patch:
        for module in (record_columns, record_table):
            patch.setattr(module, "ROWS_PER_BATCH", 4)
        patch.setattr(key_arrays, "_FEW_KEYS", 4)
        groups, num_single, _ = caption_groups.count_groups(RecordTable.from_records(records))
        assert {group.group_id: group.captions for group in groups} == expected
        assert [group.group_id for group in groups] == list(expected)
    assert len(groups) == len(expected)
    assert groups.num_pairs == sum(-(-len(texts) // 2) for texts in expected.values())
    assert num_single == len(collect_by_dictionary(records)) - len(expected)


def test_images_with_one_caption_are_counted_and_named_with_remedies() -> None:
    with pytest.raises(
        ValueError, match=r"2 of 2 .* only one caption.*0\.jpg \(captions\.jsonl line 1\)"
    ) as refused:
        group_captions(make_records([("one",), ("one", "one")]))
    ways = ("--skip-single-captions", "build --lora", "llm2clip extract")
    assert all(way in str(refused.value) for way in ways)
    with pytest.raises(ValueError, match="There are no captions"):
        group_captions([])


def test_images_with_one_caption_are_skipped_by_group_and_counted() -> None:
    records = make_records([("a",), ("b", "c"), ("d", "d")])
    # Another record of the first group gives it a second caption.
    records.append(replace(records[0], captions=("e",), lang="de"))
    kept, num_skipped = skip_single_captions(records)
    assert num_skipped == 1
    assert [group.captions for group in kept] == [("a", "e"), ("b", "c")]
    with pytest.raises(ValueError, match=r"Each of 1 image has only one caption.*--lora"):
        skip_single_captions(records[2:3])


def test_held_out_captions_are_never_trained_on() -> None:
    records = [
        CaptionedImage(None, str(n), str(n), ("shared", f"{n} one", f"{n} two")) for n in range(10)
    ]
    # These have one caption left, or none, and are no longer trained on.
    records += [
        CaptionedImage(None, f"x{n}", f"x{n}", ("shared", f"x{n} alone")) for n in range(10)
    ]
    trained, held_out, num_lost = group_captions(records).hold_out(9, seed=0)
    seen = {caption for group in held_out for caption in group.captions}
    assert len(held_out) == 9 and len(list(trained)) == len(trained)
    assert not any(seen & set(group.captions) for group in trained)
    out = {group.group_id for group in held_out}
    left = [n for n in map(str, range(10)) if n not in out]
    assert [group.group_id for group in trained] == left
    assert num_lost == len(left) + 2 * (11 - len(left))


@pytest.mark.parametrize("count", [0, 1, 23, 24])
def test_a_side_with_fewer_than_two_groups_is_refused(count: int) -> None:
    groups = group_captions(make_records([(f"{n} a", f"{n} b") for n in range(24)]))
    with pytest.raises(ValueError, match=rf"Cannot hold out {count} of 24 images.*--num-held-out"):
        groups.hold_out(count, seed=0)
    same = group_captions(make_records([("a", "b")] * 24))
    with pytest.raises(ValueError, match="Almost every training caption also"):
        same.hold_out(4, seed=0)


def test_held_out_groups_follow_the_shuffle_of_python() -> None:
    """Recorded accuracies were measured on these groups."""
    groups = group_captions(make_records([(f"{n} a", f"{n} b") for n in range(50)]))
    order = list(range(50))
    random.Random(3).shuffle(order)
    held_out = groups.hold_out(7, seed=3)[1]
    assert [group.group_id for group in held_out] == [f"{n}.jpg" for n in sorted(order[:7])]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60), st.integers(1, 9))
@settings(max_examples=60)
def test_keys_in_chunks_compare_like_all_keys_at_once(numbers: list[int], size: int) -> None:
    keys = np.array([*numbers, *numbers[::3]], np.int64)
    chunks = lambda: (keys[n : n + size] for n in range(0, len(keys), size))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_arrays, "_FEW_KEYS", size)
        assert key_arrays.count_distinct(chunks, len(keys)) == len(set(keys.tolist()))
        first = key_arrays.find_first_rows(chunks, len(keys))
    assert first.tolist() == [keys.tolist().index(key) for key in keys.tolist()]
    assert key_arrays.sort_rows(first).tolist() == np.argsort(first, kind="stable").tolist()
    some = np.unique(keys[::2])
    assert key_arrays.contains_keys(some, keys).tolist() == np.isin(keys, some).tolist()
