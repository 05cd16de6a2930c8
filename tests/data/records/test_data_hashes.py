"""Hashes of a dataset: equal for equal texts and images, in any storage format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_files import (
    RECORDS,
    encode,
    own_cache,  # noqa: F401
    write_folder,
    write_parquet,
    write_shards,
)
from hypothesis import given
from hypothesis import strategies as st

from modeling_llm2clip.data import key_arrays
from modeling_llm2clip.data.images.image_sources import ParquetImage, TarImage, count_bytes
from modeling_llm2clip.data.records import data_hashes, record_columns, record_table
from modeling_llm2clip.data.records.data_hashes import (
    describe_images,
    hash_columns,
    hash_images,
    hash_own_texts,
    hash_records,
)
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage


def test_images_have_the_same_sizes_in_files_and_shards(tmp_path: Path) -> None:
    sources = [write(tmp_path / write.__name__) for write in (write_folder, write_shards)]
    hashes = {hash_images(load_records(source)) for source in sources}
    assert len(hashes) == 1


def test_parquet_images_are_identified_by_the_size_of_their_row_group(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "parquet")
    records = load_records(source)
    footer = pq.read_metadata(source / "part-0.parquet")
    paths = [footer.schema.column(number).path for number in range(footer.num_columns)]
    size = footer.row_group(0).column(paths.index("image.bytes")).total_compressed_size
    assert count_bytes(records[0].image) == count_bytes(records[1].image) == size
    # An address without a size reads it from the footer.
    assert count_bytes(ParquetImage(source / "part-0.parquet", "image", 1)) == size
    assert hash_images(records) == hash_images(load_records(source))
    shorter = write_parquet(tmp_path / "other", image=lambda name: encode(name)[:-1])
    assert hash_images(load_records(shorter)) != hash_images(records)


@pytest.fixture
def equal_sizes(tmp_path: Path) -> list[CaptionedImage]:
    """Forty images of one size, one in two languages."""
    files = [tmp_path / f"{number}.bmp" for number in range(40)]
    for file in files:
        file.write_bytes(file.name.encode().ljust(8))
    records = [CaptionedImage(file, file.name, file.name, ("a",)) for file in files]
    return [*records, replace(records[7], lang="de")]


def test_another_image_of_the_same_size_has_another_hash(equal_sizes: list[CaptionedImage]) -> None:
    before = hash_images(equal_sizes)
    for record in equal_sizes[:40:13]:
        file = Path(str(record.image))
        content = file.read_bytes()
        file.write_bytes(content[::-1])
        assert hash_images(equal_sizes) != before
        file.write_bytes(content)
        assert hash_images(equal_sizes) == before


def test_an_image_without_content_does_not_stop_the_hash(tmp_path: Path) -> None:
    """A run that skips invalid images continues; a lost file is named."""
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [b"an image", None]}), file)
    records = [
        CaptionedImage(ParquetImage(file, "image", row), f"{row}", "", ("a",)) for row in range(2)
    ]
    assert hash_images(records) != hash_images(records[:1])
    file.rename(tmp_path / "elsewhere")
    table = RecordTable.from_records(
        [CaptionedImage(ParquetImage(file, "image", 0, 9), "0", "", ("a",))]
    )
    with pytest.raises(OSError, match=r"rows\.parquet: row 0: cannot be read .*Run the same"):
        hash_images(table)


@pytest.mark.parametrize(("num_read", "few"), [(5, 3), (1000, 3), (5, 2**17)])
def test_neither_order_nor_languages_nor_ranges_change_the_hash_of_images(
    equal_sizes: list[CaptionedImage], num_read: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_hashes, "_IMAGES_READ", num_read)
    expected = hash_images(equal_sizes)
    monkeypatch.setattr(key_arrays, "_FEW_KEYS", few)
    for others in (equal_sizes[::-1], equal_sizes[:40], equal_sizes[7:] + equal_sizes[:9]):
        assert hash_images(others) == expected
        assert hash_images(RecordTable.from_records(others).select(range(len(others)))) == expected


def test_only_names_groups_languages_and_texts_change_the_hash() -> None:
    # Stores and runs record this hash, so any other value would refuse all of them.
    assert hash_records(RECORDS) == (
        "1f27908c9b426e9075603aaac79ce4b1e2081ffcc09342d3274863659e1815b5"
    )
    first = RECORDS[0]
    changes = [{"name": "x"}, {"group_id": "x"}, {"lang": "fr"}, {"captions": ("x",)},
               {"long_captions": ()}]  # fmt: skip
    hashes = {hash_records([replace(first, **change)]) for change in changes}  # type: ignore[arg-type]
    assert len({hash_records([first]), *hashes}) == 6
    same = replace(first, image=Path("a.png"), keywords=(), place="line 3")
    assert hash_records([same]) == hash_records([first])


def test_images_at_a_newly_signed_url_are_the_same() -> None:
    def describe(query: str) -> dict[str, str]:
        shard = f"https://x.example/0.tar?v=1{query}"
        image = TarImage(shard, "0.png", 512, 10)
        return describe_images([CaptionedImage(image, "0.png", "0", ("a",))])

    signed = describe("&X-Amz-Date=1&X-Amz-Signature=a:b")
    assert signed == describe("&X-Amz-Date=2&X-Amz-Signature=c") == describe("")
    assert signed["first"] == "https://x.example/0.tar?v=1: 0.png"
    assert signed != describe("2")


def test_a_hash_of_columns_depends_only_on_their_values_and_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [
        CaptionedImage(
            None, f"{number}", f"{number}", ("a",), keywords=("k", "l")[:number], url=url
        )
        for number, url in enumerate((None, "", "u", "v"))
    ]
    names = ("url", "keywords")
    found = hash_columns(records, names)
    changed = [
        [records[1], records[0], *records[2:]],  # None and "" are two values
        [*records[:3], replace(records[3], keywords=("kl",))],
        [*records[:2], replace(records[2], url="uv"), replace(records[3], url="")],
        records[:3],
    ]
    assert len({found, *(hash_columns(other, names) for other in changed)}) == 5
    others = [replace(record, group_id="g", captions=("b",)) for record in records]
    assert hash_columns(others, names) == found
    for module in (record_columns, record_table):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", 3)
    assert hash_columns(records, names) == found


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=4), min_size=1, max_size=5), st.data())
def test_items_share_a_hash_only_if_they_have_the_same_texts_in_the_same_order(
    texts: list[list[str]], data: st.DataObject
) -> None:
    short = np.array([data.draw(st.integers(0, len(of_item))) for of_item in texts])
    keys = record_columns.make_text_keys(texts)
    hashes = hash_own_texts(keys, short)
    first = data.draw(st.integers(0, len(texts) - 1))
    assert np.array_equal(hash_own_texts(keys[first:], short[first:]), hashes[first:])
    items = list(zip(map(tuple, texts), short.tolist(), strict=True))
    same = np.array([[one == other for other in items] for one in items])
    assert np.array_equal(hashes[:, None] == hashes, same)
