"""Sentence views: complete sentences of a caption in order, without the first one."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_llm2clip.data.captions.sentence_views import (
    RULE,
    add_views,
    list_views,
    read_num_views,
    require_views,
    split_sentences,
    with_views,
)
from modeling_llm2clip.data.records.record_columns import make_batches
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage

TEXTS = [
    ["A dog runs. ", "It is brown! ", "Is it fast?"],
    ["Dr. Smith holds 3.5 kg, e.g. in bags. ", "The U.S. flag waves near St. Paul..."],
    ['She said "Stop." ', "“Why?” he asked. ", "(Nobody knows.) ", "Then they left."],
    ["Ein Hund läuft z.B. am 3. Mai. ", "Er bellt bzw. jault laut. ", "„Wau!“ sagt er."],
    ["犬が走る。", "「速い！」と言った。", "茶色？", "はい。"],
    ["“你好。”他说。", "狗跑了！"],
    ["कुत्ता दौड़ता है। ", "वह भूरा है।"],
    ["هل هذا كلب؟ ", "نعم هو كلب."],
    ["개가 달린다. ", "갈색이다."],
    ["... and 1. a list, 2. of things"],
    ["no stop"],
]
PINNED = [
    "The bed is red. A cat sleeps.",
    "It has a bed. The bed is red.",
    "The bed is red. A cat sleeps. The light is off.",
]
LONG = "A room. It has a bed. The bed is red. A cat sleeps. The light is off."


@pytest.mark.parametrize("sentences", TEXTS, ids=range(len(TEXTS)))
def test_a_text_is_split_where_its_sentences_end(sentences: list[str]) -> None:
    assert split_sentences("".join(sentences)) == sentences


@given(st.text(alphabet="aB1 .!?。！」\"'\n…", max_size=40), st.integers(0, 6))
def test_views_are_whole_sentences_in_order_without_the_first(text: str, count: int) -> None:
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    others = sentences[1:]
    possible = {
        "".join(chosen).strip()
        for size in range(1, len(others) + 1)
        for chosen in combinations(others, size)
    }
    views = list_views(text, count)
    assert set(views) <= possible and len(set(views)) == len(views) <= count
    assert bool(views) == bool(others and count) and all(views)
    assert views == list_views(text, 9)[: len(views)]  # more views are further ones


def test_lengths_of_views_are_uniform() -> None:
    sizes = [len(split_sentences(list_views(f"{LONG} It is {n}!", 1)[0])) for n in range(2000)]
    # 6 standard deviations of 400 ± 18.
    assert all(abs(sizes.count(size) - 400) < 108 for size in range(1, 6))


def test_views_change_only_with_the_rule() -> None:
    """A change of views must raise `RULE`, because stores record it."""
    assert (RULE, list_views(LONG, 3)) == ("1", PINNED)
    with pytest.raises(ValueError, match=r"follow rule '0', but this version .* by rule '1'"):
        read_num_views({"sentence_views": "3", "sentence_rule": "0"})
    assert read_num_views({}) == 0


def test_records_get_their_views_and_keys() -> None:
    records = [
        CaptionedImage(None, "a", "a", ("short",), (LONG, "One sentence.")),
        CaptionedImage(None, "b", "b", ("short. And more.",)),
    ]
    table = RecordTable.from_records(records)
    [batch] = table.iterate_columns(("name", "captions", "long_captions", "text_keys"))
    views = list_views(LONG, 2)
    viewed = CaptionedImage(None, "a", "a", ("short",), (LONG, "One sentence.", *views))
    [wanted] = make_batches([viewed, records[1]])
    assert add_views(batch, 2).equals(wanted.select(batch.schema.names))
    assert with_views(records[0].long_captions, 2) == viewed.long_captions
    assert add_views(batch, 0) is batch
    with pytest.raises(ValueError, match="sentence_views=2: no long caption has two"):
        require_views(table[1:], 2)
