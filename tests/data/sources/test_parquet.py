"""Parquet with columns of a publisher: chosen, renamed, filtered; images are addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_files import encode, make_image, own_cache  # noqa: F401

from modeling_llm2clip.data.images.image_sources import ParquetImage, open_image
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.sources.parquet import iterate_rows, read_parquet
from modeling_llm2clip.data.validation_errors import ErrorCollector
from modeling_llm2clip.processing_llm2clip import load_images

COLUMNS = {"image": "img", "file_name": "id", "captions": "raw"}
RED, BLUE = ({"bytes": encode(f"images/{name}.png"), "path": None} for name in ("red", "blue"))
ROWS: dict[str, list[Any]] = {
    "img": [RED, BLUE, None],
    "id": ["r.png", "b.png", "n.png"],
    "raw": [["a red square"], ["a blue square", "blue"], ["nothing"]],
    "split": ["test", "train", "test"],
    "sentids": [[1], [2, 3], [4]],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    table = datasets.Dataset.from_dict(ROWS)
    table.cast_column("img", datasets.Image(decode=False)).to_parquet(str(tmp_path / "all.parquet"))
    return tmp_path / "all.parquet"


def test_fields_are_read_from_the_columns_that_are_named(file: Path) -> None:
    errors = ErrorCollector()
    found = list(read_parquet([file], file.parent, errors, columns=COLUMNS))
    assert errors.total == 0
    assert [record.place for record in found] == [f"all.parquet row {n}" for n in range(3)]
    assert [dict(record.fields) for record in found] == [
        {"file_name": name, "captions": captions}
        for name, captions in zip(ROWS["id"], ROWS["raw"], strict=True)
    ]
    expected = [ParquetImage(file, "img", 0), ParquetImage(file, "img", 1), None]
    assert [record.packed for record in found] == expected
    blue = load_images(open_image(found[1].packed))
    assert np.array_equal(np.asarray(blue), np.asarray(make_image("images/blue.png")))


def test_a_file_without_a_column_is_an_error_and_the_others_are_read(file: Path) -> None:
    other = file.with_name("other.parquet")
    datasets.Dataset.from_dict({"id": ["x.png"], "split": ["test"]}).to_parquet(str(other))
    errors = ErrorCollector()
    found = list(read_parquet([file, other], file.parent, errors, columns=COLUMNS))
    assert len(found) == 3
    assert errors.counts == {"no column img, raw": 1}


def test_a_path_that_is_a_number_names_no_image(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": encode("images/red.png"), "path": 3}, "caption": "a"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    (record,) = read_parquet([tmp_path / "0.parquet"], tmp_path, ErrorCollector())
    assert record.default_name == "0.parquet/0"


def test_an_image_whose_bytes_are_a_text_is_an_error(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": "text", "path": "a.png"}, "caption": "a"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"(?s)is not a non-blank text.*0\.parquet row 0"):
        load_records(tmp_path)


def test_rows_with_several_images_have_an_address_for_each(tmp_path: Path) -> None:
    rows = {"image_0": [RED, RED], "image_1": [BLUE, None], "caption_0": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "0.parquet"))
    (tmp_path / "1.parquet").write_bytes(b"no Parquet")
    errors = ErrorCollector()
    files = sorted(tmp_path.glob("*.parquet"))
    (first_place, first), (_, second) = iterate_rows(files, tmp_path, errors)
    assert first_place == "0.parquet row 0"
    assert first == {
        "image_0": ParquetImage(files[0], "image_0", 0),
        "image_1": ParquetImage(files[0], "image_1", 0),
        "caption_0": "a",
    }
    assert second["image_1"] is None
    assert errors.counts == {"not a Parquet file, or broken": 1}


@pytest.mark.parametrize("options", [{}, {"row_group_size": 2}])
def test_labels_are_read_without_the_bytes_of_images(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """That part of the file is damaged, which only shows when an image is opened."""
    whole, file = tmp_path / "whole.parquet", tmp_path / "0.parquet"
    rows = {"image": [RED, BLUE, RED], "caption": ["a", "b", "c"]}
    pq.write_table(pa.table(rows), whole, **options)
    content = bytearray(whole.read_bytes())
    footer = pq.read_metadata(whole)
    for number in range(footer.num_row_groups):
        chunk = footer.row_group(number).column(0)
        assert chunk.path_in_schema == "image.bytes"
        start = min(chunk.data_page_offset, chunk.dictionary_page_offset)
        content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(content)
    errors = ErrorCollector()
    found = list(read_parquet([file], tmp_path, errors))
    assert [record.fields["caption"] for record in found] == ["a", "b", "c"]
    assert [record.packed for record in found] == [ParquetImage(file, "image", n) for n in range(3)]
    assert errors.total == 0
    with pytest.raises(ValueError, match=r"0\.parquet: row group 0 (cannot be read|is broken)"):
        open_image(found[0].packed)


@pytest.mark.parametrize("has_statistics", [True, False])
def test_rows_with_and_without_bytes_may_be_mixed(has_statistics: bool, tmp_path: Path) -> None:
    path = {"bytes": None, "path": "b.png"}
    images = [RED, path, None, BLUE, RED, RED, path, path]
    table = pa.table({"image": images, "caption": list("abcdefgh")})
    file = tmp_path / "0.parquet"
    pq.write_table(table, file, row_group_size=2, write_statistics=has_statistics)
    found = list(read_parquet([file], tmp_path, ErrorCollector()))
    assert [record.packed is not None for record in found] == [
        image is not None and image["bytes"] is not None for image in images
    ]
    assert [record.fields.get("image") for record in found] == [
        None if image is None or image["bytes"] is not None else image["path"] for image in images
    ]
