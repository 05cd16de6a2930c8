"""Parquet with columns of a publisher: chosen, renamed, filtered; images are addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from captioned_files import encode, make_image, own_cache  # noqa: F401

from modeling_llm2clip.data.image_sources import ParquetImage, open_image
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
    wanted = [ParquetImage(file, "img", 0), ParquetImage(file, "img", 1), None]
    assert [record.packed for record in found] == wanted
    blue = load_images(open_image(found[1].packed))
    assert np.array_equal(np.asarray(blue), np.asarray(make_image("images/blue.png")))


def test_only_rows_of_a_value_are_read(file: Path) -> None:
    found = read_parquet(
        [file], file.parent, ErrorCollector(), columns=COLUMNS, only={"split": "test"}
    )
    assert [record.fields["file_name"] for record in found] == ["r.png", "n.png"]


def test_a_file_without_a_column_is_an_error_and_the_others_are_read(file: Path) -> None:
    other = file.with_name("other.parquet")
    datasets.Dataset.from_dict({"id": ["x.png"], "split": ["test"]}).to_parquet(str(other))
    errors = ErrorCollector()
    found = list(read_parquet([file, other], file.parent, errors, columns=COLUMNS))
    assert len(found) == 3
    assert errors.counts == {"no column img, raw": 1}


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
