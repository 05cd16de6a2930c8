"""Laws of the rows: every caption and image once, under an id of its own, in any shards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_llm2clip.data.captions.sentence_views import describe_views, with_views
from modeling_llm2clip.data.records import record_columns, record_table
from modeling_llm2clip.data.records.record_columns import hash_text
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store import store_index
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.extract import index_records, open_rows
from modeling_llm2clip.embedding.input_rows import (
    ImageRows,
    InputRows,
    TextRows,
    require_inputs,
)
from modeling_llm2clip.embedding.store_writer import begin_store


def make_record(number: int, num_short: int, num_long: int, lang: str = "en") -> CaptionedImage:
    return CaptionedImage(
        image=None,
        name=f"{number}.png",
        group_id=f"g{number}",
        captions=tuple(f"{number}, {lang}, short {n}" for n in range(num_short)),
        long_captions=tuple(f"{number}, {lang}, long {n}" for n in range(num_long)),
        lang=lang,
    )


def read_all(rows: InputRows, rows_per_shard: int) -> list[dict[str, Any]]:
    starts = range(0, len(rows), rows_per_shard)
    shards = [range(start, min(start + rows_per_shard, len(rows))) for start in starts]
    return [line for shard in shards for line in rows.read(shard).to_pylist()]


@settings(max_examples=50)
@given(
    counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=12),
    rows_per_shard=st.integers(1, 9),
)
def test_every_caption_is_in_one_shard_in_the_order_of_the_dataset(
    counts: list[tuple[int, int]], rows_per_shard: int
) -> None:
    records = [make_record(number, *pair) for number, pair in enumerate(counts)]
    expected = [
        {"id": f"{record.name}#{number}", "text": text, "group_id": record.group_id}
        for record in records
        for number, text in enumerate((*record.captions, *record.long_captions))
    ]
    if not expected:
        return
    table = RecordTable.from_records(records)
    rows = TextRows(table, rows_per_shard, columns=("text", "group_id"))
    assert read_all(rows, rows_per_shard) == expected
    shards = range(0, len(rows), rows_per_shard)
    texts = [rows.read_inputs(range(s, min(s + rows_per_shard, len(rows)))) for s in shards]
    assert [text for part in texts for text in part] == [line["text"] for line in expected]


@pytest.mark.parametrize(
    ("rows_per_shard", "batch_rows", "num_views"), [(1, 5, 0), (7, 5, 2), (7, 1000, 0), (60, 5, 0)]
)
def test_a_shard_of_a_store_has_its_own_distinct_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    rows_per_shard: int, batch_rows: int, num_views: int,
) -> None:  # fmt: skip
    for module in (record_columns, record_table, store_index):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", batch_rows)
    draw = random.Random(1).randrange
    table = RecordTable.from_records(
        CaptionedImage(
            None,
            f"{n}",
            "g",
            tuple(f"caption {draw(60)}" for _ in range(draw(4))),
            (f"One {draw(9)}. Two {draw(9)}. Three.",) * (n % 3 // 2),
        )
        for n in range(53)
    ).select(np.random.default_rng(0).permutation(53)[:40])
    planned = StoreManifest(
        content="caption_embeds", fingerprint={}, dtype="float32", dim=2,
        rows_per_shard=rows_per_shard, plan=describe_views(num_views),
    )  # fmt: skip
    begin_store(tmp_path, planned, index_records(table, planned))
    manifest = StoreManifest.read(tmp_path)
    rows = open_rows(tmp_path, manifest, table)
    listed = [(*r.captions, *with_views(r.long_captions, num_views)) for r in table]
    texts = [text for of_record in listed for text in of_record]
    expected = [
        [*dict.fromkeys(texts[start : start + rows_per_shard])]
        for start in range(0, len(texts), rows_per_shard)
    ]
    shards = map(manifest.inputs_of_shard, reversed(range(manifest.num_shards)))
    assert [rows.read_inputs(shard) for shard in shards][::-1] == expected
    stored = [text for shard in expected for text in shard]
    assert (manifest.num_inputs, manifest.num_rows) == (len(texts), len(stored))
    index = store_index.StoreIndex(tmp_path, manifest)
    for item, of_record in enumerate(listed):
        of_item = [*index.rows_of(item), *index.rows_of(item, long=True)]
        assert [stored[row] for row in of_item] == [*of_record]
    assert index.read_text_keys(len(stored)).tolist() == [*map(hash_text, stored)]


def test_several_languages_are_part_of_the_id() -> None:
    records = [make_record(0, 2, 0), make_record(0, 1, 1, "de"), make_record(1, 1, 0, "de")]
    rows = TextRows(RecordTable.from_records(records), 10, columns=("lang",))
    assert [(line["id"], line["lang"]) for line in read_all(rows, 10)] == [
        ("0.png#en#0", "en"), ("0.png#en#1", "en"), ("0.png#de#0", "de"), ("0.png#de#1", "de"),
        ("1.png#de#0", "de"),
    ]  # fmt: skip


def test_ambiguous_ids_are_refused() -> None:
    twice = RecordTable.from_records([make_record(0, 1, 0), make_record(0, 2, 0)])
    with pytest.raises(ValueError, match="1 record with the name and language of another"):
        TextRows(twice, 10, columns=())
    odd = RecordTable.from_records([make_record(0, 1, 0, "a#b")])
    with pytest.raises(ValueError, match=r"lang='a#b' contains #"):
        TextRows(odd, 10, columns=())
    with pytest.raises(ValueError, match="the list is empty"):
        require_inputs(RecordTable.from_records([make_record(0, 0, 0)]), "text")


def test_the_sample_is_spread_over_the_records() -> None:
    records = RecordTable.from_records([make_record(number, 2, 0) for number in range(10)])
    rows = TextRows(records, 4, columns=())
    sample = [(0, 0), (3, 1), (6, 0), (9, 1)]
    assert rows.sample(4) == [f"{record}, en, short {number}" for record, number in sample]
    assert len(rows.sample(100)) == 10


def save_image(file: Path, color: tuple[int, int, int]) -> Path:
    Image.new("RGB", (8, 8), color).save(file)
    return file


def test_records_in_several_languages_share_the_row_of_their_image(tmp_path: Path) -> None:
    files = [save_image(tmp_path / f"{n}.png", (n, 0, 0)) for n in range(3)]
    records = [
        CaptionedImage(files[number], f"{number}.png", "g", (f"{lang} {number}",), lang=lang)
        for number in range(3)
        for lang in ("en", "de")
    ]
    rows = ImageRows(RecordTable.from_records(records), ("lang", "captions", "image_file"))
    assert read_all(rows, 2) == [
        {"id": f"{n}.png", "lang": "en", "captions": [f"en {n}"], "image_file": str(files[n])}
        for n in range(3)
    ]
    assert rows.read_inputs(range(1, 3)) == files[1:] and rows.sample(2) == files[::2]


def test_one_name_for_two_images_is_refused(tmp_path: Path) -> None:
    files = [save_image(tmp_path / f"{n}.png", (n, 0, 0)) for n in range(2)]
    records = [CaptionedImage(file, "same.png", "g", ("it",), lang=f"l{n}")
               for n, file in enumerate(files)]  # fmt: skip
    with pytest.raises(ValueError, match=r"1 name shared by several images: same\.png\."):
        ImageRows(RecordTable.from_records(records), ())
    with pytest.raises(ValueError, match="1 record without an image"):
        require_inputs(RecordTable.from_records([make_record(0, 1, 0)]), "image")
