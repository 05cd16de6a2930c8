"""Every source gives the same records and images."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_files import (
    LINES,
    RECORDS,
    add_member,
    coco_caption,
    coco_image,
    encode,
    make_image,
    own_cache,  # noqa: F401
    write_coco,
    write_folder,
    write_image_folder,
    write_images,
    write_lines,
    write_parquet,
    write_parquet_of_bytes,
    write_parquet_of_paths,
    write_shard,
    write_shards,
)

from modeling_llm2clip.data.images.image_sources import open_image
from modeling_llm2clip.data.records.record_loading import collect_records, load_records
from modeling_llm2clip.data.streams.record_streams import stream_records
from modeling_llm2clip.data.validation_errors import DataValidationError
from modeling_llm2clip.image_loading_llm2clip import load_images

WRITERS = (
    write_folder,
    write_image_folder,
    write_parquet,
    write_parquet_of_paths,
    write_parquet_of_bytes,
    write_shards,
)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_records_and_images(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    records = load_records(write(tmp_path / "data"), check_images=True)
    assert [replace(record, image=None) for record in records] == RECORDS
    for record in pickle.loads(pickle.dumps(records[::-1])):  # in any order, after pickling
        loaded = load_images(open_image(record.image))
        assert np.array_equal(np.asarray(loaded), np.asarray(make_image(record.name))), record


def test_files_and_patterns_read_like_their_folder(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    whole = load_records(shards)
    assert load_records(f"{shards}/*.tar") == whole
    assert load_records(f"{tmp_path}/sh*/0000?.tar") == whole
    assert load_records(shards / "00001.tar") == whole[2:]
    (shards / "00002.tar").symlink_to("gone.tar")
    for source in (shards, f"{shards}/*.tar"):
        with pytest.raises(FileNotFoundError, match=r"00002\.tar"):
            load_records(source)
    folder = write_folder(tmp_path / "folder")
    assert load_records(folder / "captions.jsonl") == load_records(folder)


def test_an_index_and_a_stream_accept_the_same_shard_names(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    listed = tmp_path / "list.txt"
    lines = [f"{shards}/00000.tar # the first", "", f"{shards}/0000[1].tar"]
    listed.write_text("\n".join(lines), encoding="utf-8-sig")
    names = ("{00000..00001}.tar", "0000?.tar", "*.tar", "[0]000?.tar")
    for source in (listed, *(f"{shards}/{name}" for name in names)):
        assert load_records(source) == load_records(shards)
        assert {record.name for record in stream_records(source)} == {r.name for r in RECORDS}


def test_a_list_of_shards_is_read_in_their_format(tmp_path: Path) -> None:
    shards = tmp_path / "list.txt"
    folder = write_folder(tmp_path / "folder")
    shards.write_text(f"{folder}/captions.jsonl", encoding="utf-8")
    assert load_records(shards) == load_records(folder)
    shards.write_text("pipe:cat a.tar", encoding="utf-8")
    with pytest.raises(ValueError, match="output of a command can be read only once"):
        load_records(shards)
    write_folder(tmp_path / "other")
    shards.write_text("\n".join(f"{tmp_path}/{n}/captions.jsonl" for n in ("folder", "other")))
    with pytest.raises(ValueError, match=r"list\.txt: 2 \.jsonl files\. Pass one of them"):
        load_records(shards)


def test_images_may_be_in_another_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    source = write_lines(tmp_path / "captions", LINES)
    records = load_records(source, image_dir=tmp_path / "images")
    assert records[0].path == tmp_path / "images" / "images/red.png"
    with pytest.raises(ValueError, match=r"image_dir='nowhere' is not a folder"):
        load_records(source, image_dir="nowhere")


def test_a_packed_image_has_no_path(tmp_path: Path) -> None:
    record = load_records(write_shards(tmp_path / "shards"))[0]
    with pytest.raises(ValueError, match=r"images/red\.png has a packed image, .*0000\.png"):
        _ = record.path


def test_packed_images_without_a_file_name_are_named_by_shard_and_member(tmp_path: Path) -> None:
    members = {"a/1.png": encode("images/red.png"), "a/1.txt": b"a red square\n"}
    write_shard(tmp_path / "one.tar", members)
    write_shard(
        tmp_path / "two.tar", {**members, "a/1.json": b'{"url": "x", "key": "0", "group_id": 7}'}
    )
    records = load_records(tmp_path)
    names = ["one.tar/a/1.png", "two.tar/a/1.png"]
    assert [(r.name, r.group_id) for r in records] == [(names[0], names[0]), (names[1], "7")]
    assert {r.captions for r in records} == {("a red square",)}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_behind_headers_of_any_length(layout: int, tmp_path: Path) -> None:
    # GNU and PAX put a longer name into separate headers before the image.
    name = "f" * 90 + "/" + ("n" if layout == tarfile.USTAR_FORMAT else "é" * 300)
    with tarfile.open(tmp_path / "one.tar", "w", format=layout) as archive:
        add_member(archive, f"{name}.jpg", encode("images/red.png"))
        add_member(archive, f"{name}.txt", b"a red square")
    (record,) = load_records(tmp_path, check_images=True)
    assert record.name == f"one.tar/{name}.jpg" and record.captions == ("a red square",)


@pytest.mark.parametrize("kept", ["bytes", "path"])
def test_packed_images_may_lack_a_field(kept: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    image = {"bytes": encode("images/red.png"), "path": "images/red.png"}
    rows = {"image": [{kept: image[kept]}], "caption": ["a square"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "0.parquet"))
    (record,) = load_records(tmp_path, check_images=True)
    assert record.captions == ("a square",) and record.image is not None


def test_files_of_a_folder_are_found_in_uppercase_too(tmp_path: Path) -> None:
    for number, name in enumerate(("a.parquet", "b.PARQUET")):
        rows = {"file_name": [f"{number}.png"], "caption": ["a square"]}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / name))
    assert len(load_records(tmp_path, require_images=False)) == 2


def test_fields_of_lines_are_normalized(tmp_path: Path) -> None:
    lines = [
        {"image": "1.png", "captions": ["a"], "group_id": "k", "lang": "de"},
        {"image": "2.png", "captions": ["a"], "group_id": " k "},
        {"group_id": "3", "shortSV_captions": ["short"], "longSV_captions": ["a long one"]},
        # JSON allows U+2028 unescaped; Python's splitlines would split the object there.
        '{"group_id": "4", "caption": "one\u2028two"}',
    ]
    records = load_records(write_lines(tmp_path, lines), require_images=False)
    assert [record.group_id for record in records] == ["k", "k", "3", "4"]
    assert [record.lang for record in records] == ["de", "en", "en", "en"]
    assert (records[2].captions, records[2].long_captions) == (("short",), ("a long one",))
    assert records[3].captions == ("one two",)


def test_coco_is_read_as_published(tmp_path: Path) -> None:
    captions = [coco_caption(9, 40 - i, f"caption {40 - i} \n") for i in range(7)]
    captions.insert(3, coco_caption(4, 1, "A man\nwith a red helmet. "))
    file = write_coco(
        tmp_path / "captions_val2017.json",
        images=[coco_image(9), coco_image(4)],
        annotations=captions,
    )
    # Numbers with one and two digits, which would sort differently as texts.
    nine, four = load_records(file, require_images=False)
    assert nine.captions == tuple(f"caption {number}" for number in range(34, 41))
    assert (nine.name, nine.group_id, nine.lang) == ("000000000009.jpg", "000000000009.jpg", "en")
    assert four.captions == ("A man with a red helmet.",) and four.image is None
    with pytest.raises(ValueError, match=r"Pass image_dir=<folder>, or require_images=False"):
        load_records(file)
    images = tmp_path / "val2017"
    images.mkdir()
    for name in (nine.name, four.name):
        make_image("images/red.png").save(images / name)
    found = load_records(file, image_dir=images, check_images=True)
    assert [record.path for record in found] == [images / nine.name, images / four.name]


COLUMNS = {
    "image": [{"bytes": encode("images/red.png"), "path": None}],
    "captions": [["a"]],
    "lang": ["de"],
    "group_id": ["g"],
    "long_captions": [["a long one"]],
    "notes": ["x"],
}


def write_columns(file: Path, *without: str, **others: list[Any]) -> None:
    columns = {name: column for name, column in COLUMNS.items() if name not in without}
    pq.write_table(pa.table({**columns, **others}), file)


def test_a_file_that_lacks_a_column_of_the_others_is_an_error(tmp_path: Path) -> None:
    """Its records would silently be English, each in a group of its own."""
    for number in range(4):
        write_columns(tmp_path / f"{number}.parquet", *(("lang",) if number > 1 else ()))
    write_columns(tmp_path / "4.parquet", "group_id", "long_captions")
    with pytest.raises(DataValidationError, match="with null where a record has no such") as caught:
        load_records(tmp_path)
    assert caught.value.counts == {
        "no column 'group_id', which 0.parquet has": 1,
        "no column 'lang', which 0.parquet has": 2,
        "no column 'long_captions', which 0.parquet has": 1,
    }
    places = caught.value.places["no column 'lang', which 0.parquet has"]
    assert places == ["2.parquet", "3.parquet"]
    stray = collect_records(tmp_path).stray
    assert (stray.counts, stray.places) == (caught.value.counts, caught.value.places)


def test_columns_that_change_no_record_may_differ_between_files(tmp_path: Path) -> None:
    """Notes, other names of captions, files without rows; and columns that no file has."""
    write_columns(tmp_path / "0.parquet", "notes", "group_id", "long_captions")
    write_columns(
        tmp_path / "1.parquet", "captions", "group_id", "long_captions", caption=["another"]
    )
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "2.parquet")
    assert [record.captions for record in load_records(tmp_path)] == [("a",), ("another",)]
