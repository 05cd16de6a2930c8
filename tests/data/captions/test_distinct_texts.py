"""Distinct texts: numbered as a dict would, whatever their hashes are, and found again by row."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llm2clip.data.captions import distinct_texts
from modeling_llm2clip.data.captions.caption_columns import (
    FirstOccurrences,
    flatten_captions,
    iterate_first_captions,
)
from modeling_llm2clip.data.captions.distinct_texts import TextNumbers
from modeling_llm2clip.data.records import record_columns, record_table
from modeling_llm2clip.data.records.record_columns import hash_text
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store import store_index
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.embedding_store_writer import EmbeddingStoreWriter
from modeling_llm2clip.embedding.extract import list_caption_items

_WORDS = st.sampled_from(["a", "b", "ä", "a ", "猫", "a dog", "A dog", "x" * 70])


def number_with_a_dict(batches: list[list[str]]) -> list[list[int]]:
    numbers: dict[str, int] = {}
    return [[numbers.setdefault(text, len(numbers)) for text in batch] for batch in batches]


def number(batches: list[list[str]], *, bits: int, num_texts: int) -> tuple[list[list[int]], int]:
    with TemporaryDirectory() as folder:
        texts = TextNumbers(Path(folder), num_texts)
        for batch in batches:
            keys = np.array([hash_text(text) for text in batch], np.int64)
            keys = keys >> 24 & (2**bits - 1)
            distinct = texts.add(pa.array(batch, pa.string()), keys << 24)
            assert distinct.to_pylist() == list(dict.fromkeys(batch))
        texts.number()
        assert texts.num_texts == sum(map(len, batches))
        return [rows.tolist() for rows in texts], texts.num_distinct


@given(st.lists(st.lists(_WORDS, max_size=12), max_size=6), st.sampled_from([0, 1, 8, 40]))
@settings(deadline=None, max_examples=60)
def test_the_numbers_are_those_of_a_dict_however_few_bits_the_hashes_have(
    batches: list[list[str]], bits: int
) -> None:
    expected = number_with_a_dict(batches)
    num_texts = 40 * distinct_texts._TEXTS_PER_PARTITION  # many partitions
    found, num_distinct = number(batches, bits=bits, num_texts=num_texts)
    assert found == expected
    assert num_distinct == len({text for batch in batches for text in batch})


@pytest.mark.parametrize("bits", [8, 40])
def test_ten_thousand_texts_of_which_many_share_a_hash_of_8_bits(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distinct_texts, "_NUMBERED_AT_ONCE", 1000)
    generator = random.Random(0)
    batches = [[f"text {generator.randrange(4000)}" for _ in range(1500)] for _ in range(7)]
    found, _ = number(batches, bits=bits, num_texts=10 * distinct_texts._TEXTS_PER_PARTITION)
    assert found == number_with_a_dict(batches)


def make_table(count: int) -> RecordTable:
    generator = random.Random(1)

    def draw(count: int) -> tuple[str, ...]:
        return tuple(f"caption {generator.randrange(60)}" for _ in range(count))

    return RecordTable.from_records(
        CaptionedImage(None, f"{n}", f"{n}", draw(generator.randrange(4)), draw(n % 3 // 2))
        for n in range(count)
    )


def test_captions_of_a_record_are_its_short_ones_and_then_its_long_ones() -> None:
    table = make_table(30)
    [batch] = table.iterate_columns(("captions", "long_captions"))
    flat = flatten_captions(batch)
    assert flat.texts.to_pylist() == [t for r in table for t in (*r.captions, *r.long_captions)]
    assert flat.num_short.tolist() == [len(r.captions) for r in table]
    assert np.diff(flat.ends).tolist() == [len(r.captions) + len(r.long_captions) for r in table]


@pytest.mark.parametrize(
    ("rows_per_shard", "batch_rows", "chosen"),
    [(1, 5, True), (7, 5, False), (7, 1000, True), (60, 5, True), (60, 1000, False)],
)
def test_the_rows_of_a_shard_are_its_captions_by_first_occurrence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    rows_per_shard: int, batch_rows: int, chosen: bool,
) -> None:  # fmt: skip
    for module in (record_columns, record_table, store_index):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", batch_rows)
    table = make_table(53)
    if chosen:
        table = table.select(np.random.default_rng(0).permutation(53)[:40])
    planned = StoreManifest(
        content="caption_embeds", fingerprint={}, dtype="float32", dim=2,
        rows_per_shard=rows_per_shard, plan={},
    )  # fmt: skip
    writer = EmbeddingStoreWriter.open(
        tmp_path / "store", planned, lambda scratch: list_caption_items(table, scratch)
    )
    manifest = writer.manifest
    index = store_index.StoreIndex(writer.folder, manifest)
    expected = list(dict.fromkeys(t for r in table for t in (*r.captions, *r.long_captions)))
    assert manifest.num_rows == manifest.counts["distinct"] == len(expected)
    occurrences = FirstOccurrences(index, rows_per_shard)
    for shard in reversed(range(manifest.num_shards)):
        rows = manifest.rows_of_shard(shard)
        found = list(iterate_first_captions(table, occurrences, rows))
        assert found == expected[rows.start : rows.stop]
    for item, record in enumerate(table):
        for is_long, texts in ((False, record.captions), (True, record.long_captions)):
            rows_of = index.rows_of(item, long=is_long).tolist()
            assert [expected[row] for row in rows_of] == list(texts)


def test_blank_captions_are_refused_however_many_others_there_are(tmp_path: Path) -> None:
    captions = ("a dog", "猫", " \x1f", "…", "\u3000")
    table = RecordTable.from_records([CaptionedImage(None, "a", "a", captions)])
    with pytest.raises(ValueError, match=r"2 are not: number 1 is blank: ' \\x1f'"):
        list_caption_items(table, tmp_path)


_MEASURE = """
import resource, sys, tempfile, pathlib
import numpy as np, pyarrow as pa
from modeling_llm2clip.data.captions import distinct_texts
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def add(texts, count):
    for start in range(0, count, 100_000):
        words = [f"caption number {n} of many" for n in range(start, start + 100_000)]
        keys = np.random.default_rng(start).integers(-2**63, 2**63 - 1, len(words))
        texts.add(pa.array(words), keys)
distinct_texts._TEXTS_PER_PARTITION = 2**16
with tempfile.TemporaryDirectory() as folder:
    warm = distinct_texts.TextNumbers(pathlib.Path(folder), 100_000)
    add(warm, 200_000); warm.number(); before = peak()
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as other:
        texts = distinct_texts.TextNumbers(pathlib.Path(other), count)
        add(texts, count); texts.number()
        rows = sum(len(r) for r in texts)
        assert texts.num_distinct == rows == count
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_grows_by_less_than_16_bytes_a_text() -> None:
    """8 bytes a text are the mapped numbers, which the system may take back at any time."""
    count = 3_000_000
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(count)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16 * count
