"""Data read for one modality need not be pairs; anything else that is wrong is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_files import (
    encode,
    errors_of,
    own_cache,  # noqa: F401
    write_images,
    write_lines,
    write_shard,
)

from modeling_llm2clip.data.records import record_index
from modeling_llm2clip.data.records.dataset_objects import records_from_dataset
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.validation_errors import DataValidationError

NAMES = ("images/red.png", "images/blue.png")


def write_lines_of_images(folder: Path) -> Path:
    write_images(folder)
    lines = [json.dumps({"file_name": name}) for name in NAMES]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_parquet_of_images(folder: Path) -> Path:
    folder.mkdir()
    images = [{"bytes": encode(name), "path": name} for name in NAMES]
    pq.write_table(pa.table({"image": images}), folder / "images.parquet")
    return folder


def write_shard_of_images(folder: Path) -> Path:
    folder.mkdir()
    write_shard(folder / "0.tar", {f"{n}.png": encode(name) for n, name in enumerate(NAMES)})
    return folder


def write_coco_of_images(folder: Path) -> Path:
    write_images(folder)
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    file = folder / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": []}), encoding="utf-8")
    return file


WRITERS = (write_lines_of_images, write_parquet_of_images, write_shard_of_images,
           write_coco_of_images)  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_images_without_captions_are_records_of_every_source(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = write(tmp_path / "data")
    options = {"image_dir": source.parent} if source.suffix == ".json" else {}
    assert errors_of(source, **options).counts == {"no caption": 2}
    records = load_records(source, modality="image", check_images=True, **options)  # type: ignore[arg-type]
    assert len(records) == 2
    assert all(record.image is not None and record.captions == () for record in records)


def test_other_errors_of_images_are_reported(tmp_path: Path) -> None:
    write_images(tmp_path)
    source = write_lines(
        tmp_path,
        [
            {"image": "images/red.png"},
            {"image": "images/red.png"},
            {"image": "images/gone.png"},
            {"image": "images/blue.png", "caption": " "},
            {"image": "images/blue.png", "lang": "de", "id": 3},
            {},
        ],
    )
    assert errors_of(source, modality="image").counts == {
        "image and language repeated": 1,
        "image missing": 1,
        "blank caption": 1,
        "unknown field 'id'": 1,
        "no image": 1,
    }


def write_text_lines(folder: Path) -> Path:
    file = folder / "texts.jsonl"
    lines = ('{"id": 7, "text": "a cat"}', "", '{"text": "a dog", "lang": "en"}')
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def write_text_rows(folder: Path) -> Path:
    file = folder / "texts.parquet"
    pq.write_table(pa.table({"id": ["7", None], "text": ["a cat", "a dog"]}), file)
    return file


def write_csv(folder: Path) -> Path:
    file = folder / "texts.csv"
    file.write_text('id,caption\r\n7,"a\ncat"\r\n\r\n,a dog\r\n', encoding="utf-8-sig", newline="")
    return file


@pytest.mark.parametrize(
    ("write", "place"),
    [
        (write_text_lines, "texts.jsonl/3"),  # its line, from 1
        (write_text_rows, "texts.parquet/1"),  # its row, from 0
        (write_csv, "texts.csv/1"),
    ],
)
def test_a_text_without_an_image_is_named_by_its_id_or_location(
    write: Callable[[Path], Path], place: str, tmp_path: Path
) -> None:
    records = load_records(write(tmp_path), modality="text")
    assert [(r.name, r.group_id, r.captions) for r in records] == [
        ("7", "7", ("a cat",)), (place, place, ("a dog",)),
    ]  # fmt: skip
    assert all(record.image is None for record in records)


def test_captions_whose_images_are_absent_keep_the_names_of_the_images(tmp_path: Path) -> None:
    cat = {"image": "gone.png", "caption": "a cat"}
    dog = {"group_id": "g", "caption": "a dog"}
    records = load_records(write_lines(tmp_path, [cat, dog]), modality="text")
    assert [record.name for record in records] == ["gone.png", "captions.jsonl/2"]
    error = errors_of(write_lines(tmp_path, [{**cat, "id": "7"}]), modality="text")
    assert error.counts == {"unknown field 'id'": 1}


def test_other_errors_of_texts_are_reported(tmp_path: Path) -> None:
    lines = [
        {"id": "7", "text": "a cat"},
        {"id": 7, "text": "a dog"},
        {"id": "7", "text": "eine Katze", "lang": "de"},
        {"id": ["8"], "text": "a cow"},
        {"id": "9", "text": " "},
        {"id": "10"},
        {"id": "11", "txt": "a hen"},
        {"text": "a goat", "caption": "a goat"},
    ]
    assert errors_of(write_lines(tmp_path, lines), modality="text").counts == {
        "name or id repeated in one language": 1,
        "'id' is not a non-blank text": 1,
        "blank caption": 1,
        "no caption": 2,
        "unknown field 'txt'": 1,
        "both 'caption' and 'text'": 1,
    }


def test_an_id_that_is_ignored_names_nothing(tmp_path: Path) -> None:
    file = write_text_lines(tmp_path)
    records = load_records(file, modality="text", ignore_fields=("id",))
    assert [record.name for record in records] == ["texts.jsonl/1", "texts.jsonl/3"]


def test_csv_rows_that_do_not_match_the_header_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("id,text\n1,a cat\n2\n3,a,dog\n4,\n", encoding="utf-8")
    error = errors_of(file, modality="text")
    assert error.places == {
        "not as many cells as columns": ["texts.csv row 1", "texts.csv row 2"],
        "no caption": ["texts.csv row 3"],
    }
    for content in (b'text\n"a cat', b"text\na \xff cat\n", b'text\n"a" cat\n'):
        file.write_bytes(content)
        assert errors_of(file, modality="text").counts == {"not CSV, or not UTF-8": 1}
    file.write_text("text,text\na,b\n", encoding="utf-8")
    assert errors_of(file, modality="text").counts == {"two columns of one name": 1}
    file.write_text("text\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no records\. Each text needs one"):
        load_records(file, modality="text")


def test_csv_files_are_a_source_only_of_texts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("text\na cat\n", encoding="utf-8")
    records = load_records(f"{tmp_path}/*.csv", modality="text")
    assert [record.name for record in records] == ["a.csv/0", "b.csv/0"]
    with pytest.raises(ValueError, match=r"found \.csv\. Pass a folder, or files of one format"):
        load_records(tmp_path / "a.csv")
    (tmp_path / "list.txt").write_text("a cat\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"A \.txt file lists shards; put texts into \.csv"):
        load_records(tmp_path / "list.txt", modality="text")


def test_an_index_of_pairs_serves_one_modality_but_not_the_reverse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    folder = write_lines_of_images(tmp_path / "images")
    found = load_records(folder, modality="image")
    assert found.file is not None and load_records(folder, modality="image").file == found.file
    assert errors_of(folder).counts == {"no caption": 2}
    lines = [{"image": name, "captions": ["a square"]} for name in NAMES]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    pairs = load_records(folder)
    assert load_records(folder, modality="image").file == pairs.file != found.file


def test_a_dataset_object_may_hold_only_texts() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"id": ["7", None], "text": ["a cat", "a dog"]})
    records = records_from_dataset(rows, modality="text")
    assert [record.name for record in records] == ["7", "dataset/1"]
    with pytest.raises(DataValidationError, match="unknown field 'id': 1"):
        records_from_dataset(rows, require_images=False)


def test_texts_of_one_group_are_separate_texts_in_every_format(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "group_id": "g"} for n in range(3)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "texts.parquet")
    # Lines count from 1, rows from 0.
    for file, first in ((tmp_path / "texts.jsonl", 1), (tmp_path / "texts.parquet", 0)):
        pairs = load_records(file, require_images=False)
        records = load_records(file, modality="text")
        assert [record.name for record in pairs] == [record.name for record in records]
        assert [record.name for record in records] == [f"{file.name}/{first + n}" for n in range(3)]
        assert {record.group_id for record in records} == {"g"}
