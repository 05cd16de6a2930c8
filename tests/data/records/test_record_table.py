"""A record table equals the sequence of its records, however it was made or selected."""

from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llm2clip.data.images.image_sources import EncodedImage, ParquetImage, TarImage
from modeling_llm2clip.data.records import record_columns, record_table
from modeling_llm2clip.data.records.record_columns import SCHEMA, hash_identity, hash_text
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
TEXTS = st.lists(WORDS, max_size=3).map(tuple)
IMAGES = st.one_of(
    st.none(),
    st.builds(Path, st.sampled_from(["a.png", "b/c.png"])),
    st.builds(TarImage, st.just(Path("s.tar")), WORDS, st.integers(0, 2**40), st.integers(0, 9)),
    st.builds(ParquetImage, st.just(Path("s.parquet")), WORDS, st.integers(0, 2**40)),
)
RECORDS = st.lists(
    st.builds(
        CaptionedImage,
        image=IMAGES, name=WORDS, group_id=WORDS, captions=TEXTS, long_captions=TEXTS,
        keywords=TEXTS, lang=WORDS, place=WORDS,
    ),
    max_size=9,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three records, so that tables have several."""
    for module in (record_columns, record_table):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", 3)


def describe(records: Any) -> list[Any]:
    """List every field, including `place`, which comparisons ignore."""
    return [[getattr(r, name) for name in CaptionedImage.__dataclass_fields__] for r in records]


@settings(max_examples=60)
@given(records=RECORDS, data=st.data())
def test_a_table_is_the_sequence_of_its_records(records: list[CaptionedImage], data: Any) -> None:
    table = RecordTable.from_records(records)
    assert table == records
    assert describe(table) == describe(records)
    assert describe(table[i] for i in range(-len(records), 0)) == describe(records)
    rows = data.draw(st.lists(st.integers(0, len(records) - 1), max_size=9)) if records else []
    selected = table.select(rows)
    assert describe(selected) == describe(records[row] for row in rows)
    assert describe(selected[::-1]) == describe(records[row] for row in reversed(rows))
    assert describe(pickle.loads(pickle.dumps(selected))) == describe(selected)
    assert list(selected.iterate_images()) == [records[row].image for row in rows]
    assert selected.take(range(len(rows)), ["name", "captions"]) == [
        (records[row].name, list(records[row].captions)) for row in rows
    ]


@settings(max_examples=60)
@given(records=RECORDS, data=st.data())
def test_columns_belong_to_the_selected_records(records: list[CaptionedImage], data: Any) -> None:
    rows = data.draw(st.lists(st.integers(0, len(records) - 1), max_size=9)) if records else []
    selected = RecordTable.from_records(records).select(rows)
    chosen = [records[row] for row in rows]
    assert selected.keys.tolist() == [hash_identity(r.name, r.lang) for r in chosen]
    assert selected.group_keys.tolist() == [hash_text(r.group_id) for r in chosen]
    assert [column.tolist() for column in selected.count_texts()] == [
        [len(r.captions) for r in chosen], [len(r.long_captions) for r in chosen],
    ]  # fmt: skip
    texts = [batch.column(0).to_pylist() for batch in selected.iterate_columns(["text_keys"])]
    assert list(chain(*texts)) == [
        [hash_text(text) for text in (*r.captions, *r.long_captions)] for r in chosen
    ]
    some = list(range(0, len(rows), 2))[::-1]
    assert selected.read_numbers("key", np.array(some, int)).tolist() == [
        hash_identity(chosen[i].name, chosen[i].lang) for i in some
    ]


def test_a_record_that_is_not_there_is_an_error() -> None:
    table = RecordTable.from_records([CaptionedImage(None, "a", "a", ("x",))])
    for item in (1, -2):
        with pytest.raises(IndexError, match=r"There is no record (1|-2): the dataset has 1"):
            table[item]
    with pytest.raises(IndexError):
        RecordTable([])[0]


def test_a_mask_selects_what_it_marks_and_other_rows_are_refused() -> None:
    names = "abcde"
    table = RecordTable.from_records([CaptionedImage(None, n, n, ("x",)) for n in names])
    mask = np.array([False, True, False, True, True])
    for rows in (mask, mask.tolist(), np.flatnonzero(mask)):
        assert [record.name for record in table.select(rows)] == ["b", "d", "e"]
    assert [record.name for record in table.select(mask).select([True, False, True])] == ["b", "e"]
    wrong: list[Any] = [mask[:4], [5], [-1], [0.0, 1.0], [[0, 1]]]
    for rows in wrong:
        with pytest.raises(IndexError, match="record numbers from 0 to 4, or a mask of 5"):
            table.select(rows)


def test_swapping_name_and_language_changes_the_key() -> None:
    pairs = [("de", "en"), ("en", "de"), ("de", "de")]
    keys = RecordTable.from_records([CaptionedImage(None, n, n, (), lang=la) for n, la in pairs])
    assert len(set(keys.keys.tolist())) == 3
    assert keys.keys.tolist() == [hash_identity(*pair) for pair in pairs]


def test_every_column_is_documented() -> None:
    assert record_columns.__doc__ is not None
    assert [name for name in SCHEMA.names if f"`{name}`" not in record_columns.__doc__] == []


def test_what_no_index_can_hold_is_an_error() -> None:
    with pytest.raises(UnicodeEncodeError):  # half a character
        RecordTable.from_records([CaptionedImage(None, "a", "a", ("\ud83d",))])
    record = CaptionedImage(EncodedImage("a.tar: 1.png", b"x"), "a", "a", ("a text",))
    with pytest.raises(TypeError, match=r"a\.tar: 1\.png is in memory"):
        RecordTable.from_records([record])
