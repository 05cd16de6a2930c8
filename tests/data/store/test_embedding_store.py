"""Embedding store: reading returns what was written, by row and by item, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from stores import FINGERPRINT, LONG, NUM_ROWS, SHORT, make_embeddings, make_plan, write_store

from modeling_llm2clip.data.records import record_columns
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store import store_index
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_index import make_batch
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.store_writer import begin_store


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reading_returns_what_was_written_rounded_to_its_dtype(tmp_path: Path, dtype: str) -> None:
    embeddings = make_embeddings()
    opened = EmbeddingStore.open(
        write_store(tmp_path / "store", embeddings, dtype=dtype), check="full"
    )
    read = opened.read(range(NUM_ROWS))
    assert read.dtype == torch.float32
    stored = embeddings.to(getattr(torch, dtype))
    assert torch.equal(read, stored.float())
    as_stored = opened.read(range(NUM_ROWS), dtype=None)
    assert as_stored.dtype == stored.dtype and torch.equal(as_stored, stored)
    assert opened.manifest.num_truncated == 0 + 1 + 2


def test_a_shard_is_a_safetensors_file_that_other_programs_can_read(store: Path) -> None:
    found = load_file(store / "shard-00001.safetensors")
    assert np.array_equal(found["embeddings"], make_embeddings()[8:16].numpy())
    assert list(found) == ["embeddings"]


@given(st.lists(st.integers(0, NUM_ROWS - 1), max_size=40))
@settings(deadline=None, max_examples=50)
def test_rows_come_in_the_requested_order_with_repeats(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-store"
    if not folder.exists():
        write_store(folder, make_embeddings())
    opened = EmbeddingStore.open(folder)
    expected = make_embeddings()[rows]
    for kind in (rows, np.array(rows, dtype=np.int32), torch.tensor(rows, dtype=torch.long)):
        assert torch.equal(opened.read(kind), expected)


def test_an_item_has_its_own_rows(store: Path) -> None:
    opened = EmbeddingStore.open(store)
    assert len(opened) == 3
    for item in range(3):
        assert opened.rows_of(item).tolist() == SHORT[item]
        assert opened.rows_of(item, long=True).tolist() == LONG[item]
        assert torch.equal(opened.read(opened.rows_of(item)), make_embeddings()[SHORT[item]])
    assert list(opened.names) == ["a.png", "ä/b.png", "c.png"]
    assert list(opened.group_ids) == ["dog", "", "猫"]
    assert opened.group_ids[-1] == "猫" and opened.names[1:] == ["ä/b.png", "c.png"]


def test_missing_rows_and_items_are_refused(store: Path) -> None:
    opened = EmbeddingStore.open(store)
    wrong: list[list[Any]] = [[-1], [0, NUM_ROWS], [0.0], [[1, 2]], [True]]
    for rows in wrong:
        with pytest.raises(ValueError, match=r"(?i)row"):
            opened.read(rows)
    for item in (3, -4):
        for ask in (opened.rows_of, opened.names.__getitem__):
            with pytest.raises(IndexError, match=f"no item {item}"):
                ask(item)


def test_a_fingerprint_of_another_model_is_refused_with_both_values(store: Path) -> None:
    opened = EmbeddingStore.open(store)
    opened.require_fingerprint(FINGERPRINT)
    with pytest.raises(
        ValueError, match=r"pooling: 'mean' in the store, 'last_token' now"
    ) as caught:
        opened.require_fingerprint({**FINGERPRINT, "pooling": "last_token", "weights": "cc"})
    assert "weights: 'aa' in the store, 'cc' now" in str(caught.value)
    assert "prompt:" not in str(caught.value)


def test_many_items_are_found_at_once_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (record_columns, store_index):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", 7)
    monkeypatch.setattr("modeling_llm2clip.data.records.record_table.ROWS_PER_BATCH", 7)
    table = RecordTable.from_records(
        CaptionedImage(None, f"{n}", f"{n // 2}", ("x",) * (1 + n % 3), ("y",) * (n % 2))
        for n in range(40)
    )
    short, long = table.count_texts()
    starts = np.cumsum(short + long) - short - long

    def index_many() -> Iterator[Any]:
        first = 0
        for batch in table.iterate_columns(record_columns.SCHEMA.names):
            places = slice(first, first + batch.num_rows)
            ends = np.concatenate([[0], np.cumsum((short + long)[places])])
            rows = (np.arange(ends[-1]) + starts[first])[::-1] * 10
            yield make_batch(batch, short[places], ends, rows, batch.column("text_keys"))
            first += batch.num_rows

    begin_store(tmp_path, make_plan(), index_many())
    index = store_index.StoreIndex(tmp_path, StoreManifest.read(tmp_path))
    assert sum(1 for _ in index.iterate_batches()) == 6
    counts = zip(*index.iterate_counts(), strict=True)
    assert [np.concatenate(c).tolist() for c in counts] == [short.tolist(), long.tolist()]
    assert np.array_equal(np.concatenate([*index.iterate_numbers("key")]), table.keys)
    assert np.array_equal(np.concatenate([*index.iterate_numbers("group_key")]), table.group_keys)
    generator = np.random.default_rng(0)
    items = generator.integers(0, 40, 200)
    numbers = generator.integers(0, (short + long)[items])
    expected = [
        [*index.rows_of(item, long=False), *index.rows_of(item, long=True)][number]
        for item, number in zip(items.tolist(), numbers.tolist(), strict=True)
    ]
    assert index.rows_at(items, numbers).tolist() == expected
    assert np.array_equal(index.text_keys_at(items, numbers), table.read_text_keys(items, numbers))
    assert len(set(expected)) > 50
    for item, number in ((3, int(short[3] + long[3])), (39, -1), (40, 0), (-1, 0)):
        with pytest.raises(IndexError, match=f"{item}"):
            index.rows_at(np.array([0, item]), np.array([0, number]))
