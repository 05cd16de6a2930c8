"""Every error of a source is reported at once; anything that is not a source is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_files import (
    add_member,
    coco_caption,
    coco_image,
    encode,
    errors_of,
    own_cache,  # noqa: F401
    write_coco,
    write_images,
    write_lines,
    write_shard,
)
from PIL import Image

from modeling_llm2clip.data.records import records as records_module
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import RawRecord, RecordRules, check_record
from modeling_llm2clip.data.streams.record_streams import stream_records
from modeling_llm2clip.data.validation_errors import ErrorCollector
from modeling_llm2clip.evaluation.datasets.dataset_registry import load_dataset
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import RetrievalDataset


def test_every_error_of_a_folder_is_reported_at_once(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "images/broken.png").write_bytes(encode("images/red.png")[:45])
    good = {"image": "images/red.png", "captions": ["a square"]}
    lines = [
        good,
        good,
        {**good, "lang": "de", "captions": ["Quadrat", " \n "]},
        {**good, "lang": "fr", "long_caption": "un carré"},
        {"image": "images/green.png", "captions": ["none"]},
        "{",
        "[]",
        {**good, "lang": "it", "captions": []},
        {**good, "lang": "es", "captions": [3]},
        {**good, "lang": "", "group_id": ["square"]},
        {**good, "lang": "pt", "caption": "um quadrado"},
        {"captions": ["of nothing"]},
        {"image": 5, "captions": ["a number"]},
        b'{"image": "\xff"}',
        {"image": "images/broken.png", "captions": ["a part of an image"]},
        {"image": "images/blue.png", "file_name": "images/red.png", "text": "two names"},
        {**good, "lang": "de", "keywords": ["", "rot"]},
        *({**good, "lang": lang} for lang in (0, 5, True, ["en"], " ")),
    ]
    error = errors_of(write_lines(tmp_path, lines), check_images=True)
    expected = {
        "image and language repeated": [2, 17],
        "blank caption": [3],
        "unknown field 'long_caption'": [4],
        "image missing": [5],
        "not JSON": [6],
        "not an object": [7],
        "no caption": [8],
        "'captions' is not a text or a list of texts": [9],
        "'lang' is not a non-blank text": [10, *range(18, 23)],
        "'group_id' is not a non-blank text": [10],
        "both 'captions' and 'caption'": [11],
        "no image": [12],
        "'image' or 'file_name' is not a non-blank text": [13],
        "not UTF-8": [14],
        "'image' and 'file_name' differ": [16],
        "blank keyword": [17],
    }
    unreadable = error.places.pop("image unreadable")
    assert error.counts.pop("image unreadable") == 1 and "broken.png" in unreadable[0]
    # Lines without a valid image name are counted only for that.
    assert error.places == {
        kind: [f"captions.jsonl line {number}" for number in numbers[:5]]
        for kind, numbers in expected.items()
    }
    assert error.counts == {kind: len(numbers) for kind, numbers in expected.items()}


def test_the_message_counts_all_and_shows_the_first(tmp_path: Path) -> None:
    source = write_lines(tmp_path, [{"image": f"{i}.png", "caption": "a"} for i in range(70)])
    error = errors_of(source)
    places = ", ".join(f"captions.jsonl line {number}" for number in range(1, 6))
    assert f"image missing: 70 ({places}, …)" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_ignored_field_is_not_an_error(tmp_path: Path) -> None:
    source = write_lines(tmp_path, [{"group_id": "1", "caption": "a", "coco_id": 4}])
    options = {"require_images": False}
    error = errors_of(source, **options)
    assert error.counts == {"unknown field 'coco_id'": 1} and "ignore_fields" in str(error)
    assert len(load_records(source, ignore_fields={"coco_id"}, require_images=False)) == 1


@pytest.mark.parametrize("field", ["longIB_captions", "text", "keywords", "lang", "group_id"])
def test_data_with_an_ignored_field_reads_like_data_without_it(field: str, tmp_path: Path) -> None:
    """Also a known field, in tables and streams; and only some of the files may have it."""
    row = {"captions": "a", "longIB_captions": "b", "text": "c", "keywords": ["d"], "lang": "de",
           "group_id": "g", "file_name": "red.png", "image": encode("images/red.png")}  # fmt: skip
    if field != "text":  # another name of `captions`
        row.pop("text")
    without = {name: value for name, value in row.items() if name != field}
    for folder, rows in (("with", [row]), ("without", [without]), ("some", [row, without])):
        (tmp_path / folder).mkdir()
        for number, each in enumerate(rows):
            named = {**each, "file_name": f"{number}.png"}
            pq.write_table(pa.Table.from_pylist([named]), tmp_path / folder / f"{number}.parquet")
    for read in (load_records, stream_records):
        expected, ignoring = (
            [replace(record, image=None) for record in records]
            for records in (
                read(tmp_path / "without"), read(tmp_path / "with", ignore_fields=[field])
            )
        )  # fmt: skip
        assert ignoring == expected
    assert len(load_records(tmp_path / "some", ignore_fields=[field])) == 2


def write_dreamlip(folder: Path, **changed: Any) -> Path:
    """Write a shard as img2dataset writes one of upstream's data, with seven captions an image."""
    fields = {f"{kind}{source}_captions": f"{kind} {source}" for kind in ("short", "long")
              for source in ("IB", "SV", "LLA")}  # fmt: skip
    notes = {"caption": "raw", "url": "https://host/1.jpg", "key": "0", "status": "success"}
    members = {"0.png": encode("images/red.png"), "0.txt": b"raw"}
    members["0.json"] = json.dumps({**fields, **notes, **changed}).encode()
    write_shard(folder / "00000.tar", members)
    return folder


@pytest.mark.parametrize("read", [load_records, stream_records])
def test_only_chosen_captions_are_read(read: Callable[..., Any], tmp_path: Path) -> None:
    """In tables, streams and own data to evaluate on."""
    source = write_dreamlip(tmp_path / "all")
    [everything] = read(source)
    assert everything.captions == ("raw", "short IB", "short SV", "short LLA")
    chosen = ["shortSV_captions", "longSV_captions"]
    [record] = read(source, caption_fields=chosen)
    assert (record.captions, record.long_captions) == (("short SV",), ("long SV",))
    assert len(everything.long_captions) == 3 and record.url == "https://host/1.jpg"
    [raw] = read(source, caption_fields=["caption"])
    assert (raw.captions, raw.long_captions) == (("raw",), ())
    dataset = load_dataset(f"mine={source}", caption_fields=chosen)
    assert isinstance(dataset, RetrievalDataset) and dataset.captions == ("short SV",)


def test_chosen_captions_are_required(tmp_path: Path) -> None:
    source = write_dreamlip(tmp_path, longSV_captions=None)
    chosen = ["shortSV_captions", "longSV_captions"]
    assert errors_of(source, caption_fields=chosen).counts == {"no 'longSV_captions'": 1}
    assert len(load_records(source, caption_fields=chosen, modality="image")) == 1
    assert list(stream_records(source, caption_fields=chosen, max_lost_share=1)) == []
    # An empty list holds no caption either.
    empty = write_dreamlip(tmp_path / "empty", longSV_captions=[])
    assert errors_of(empty, caption_fields=chosen).counts == {"no 'longSV_captions'": 1}
    assert list(stream_records(empty, caption_fields=chosen, max_lost_share=1)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_fields": ["shortSV_caption"]}, "Did you mean shortSV_captions?"),
        ({"caption_fields": ["text"], "ignore_fields": ["text"]}, "is also in ignore_fields"),
        (
            {"caption_fields": ["longSV_captions"]},
            "short captions, not only ['longSV_captions']. Add",
        ),
        ({"caption_fields": []}, "must hold short captions, not only []. Add one of captions,"),
    ],
)
@pytest.mark.parametrize("read", [load_records, stream_records])
def test_captions_that_cannot_be_chosen_are_refused(
    read: Callable[..., Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(write_dreamlip(tmp_path), **options)


def test_every_error_of_shards_is_reported_at_once(tmp_path: Path) -> None:
    red = encode("images/red.png")
    write_shard(
        tmp_path / "0.tar",
        {
            "good.png": red, "good.txt": b"a square",
            "silent.png": red,
            "blind.txt": b"of nothing",
            "twice.png": red, "twice.jpg": red, "twice.txt": b"two",
            "broken.json": b"{", "broken.png": red,
            "latin.txt": b"\xe9t\xe9", "latin.png": red,
            "odd.npy": b"", "odd.png": red, "odd.txt": b"odd",
            "torn.png": red[:45], "torn.txt": b"torn",
        },
    )  # fmt: skip
    (tmp_path / "1.tar").write_bytes(b"no tar at all")
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "2.tar", "w:gz") as archive:
        add_member(archive, "a.txt", b"a")
    # Truncated in the middle of the first image.
    (tmp_path / "3.tar").write_bytes(whole[: 512 + 20])
    with tarfile.open(tmp_path / "4.tar", "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        archive.addfile(link)
    error = errors_of(tmp_path, check_images=True)
    shards = error.places.pop("not a tar shard, or compressed, or broken")
    assert [place[:5] for place in shards] == ["1.tar", "2.tar", "3.tar"]
    unreadable = error.places.pop("image unreadable")
    assert len(unreadable) == 1 and f"{tmp_path / '0.tar'}: torn.png" in unreadable[0]
    assert error.places == {
        "no caption": ["0.tar: silent"],
        "no image": ["0.tar: blind"],
        "several images in one sample": ["0.tar: twice"],
        "not JSON": ["0.tar: broken.json"],
        "not UTF-8": ["0.tar: latin.txt"],
        "unknown member .npy": ["0.tar: odd.npy"],
        "member is not a plain file": ["4.tar: link.png"],
    }


def test_a_shard_that_tarfile_would_end_early_is_an_error(tmp_path: Path) -> None:
    members = {f"{i}.{end}": b for i in range(6) for end, b in (("png", b"-"), ("txt", b"a text"))}
    shard = write_shard(tmp_path / "0.tar", members)
    whole = shard.read_bytes()
    with tarfile.open(shard) as archive:
        header = archive.getmember("3.png").offset
    flipped = bytearray(whole)
    flipped[header + 150] ^= 1  # in the checksum of a header
    truncated, without_end = whole[: header + 100], whole[:header]
    for damaged in (bytes(flipped), truncated, without_end, whole + whole):
        shard.write_bytes(damaged)
        error = errors_of(tmp_path, check_images=False)
        (place,) = error.places["not a tar shard, or compressed, or broken"]
        assert place.startswith("0.tar (the archive is truncated or damaged at byte ")
    shard.write_bytes(whole)
    assert len(load_records(tmp_path)) == 6


def test_fields_and_names_that_are_written_twice_are_errors(tmp_path: Path) -> None:
    line = b'{"group_id": "1", "captions": ["a"], "captions": ["b"]}'
    error = errors_of(write_lines(tmp_path, [line]), require_images=False)
    assert list(error.places) == ["field 'captions' occurs twice in one object"]
    write_images(tmp_path)
    names = ("images/red.png", "./images//red.png")
    lines = [{"image": name, "captions": ["a square"], "lang": "en "} for name in names]
    error = errors_of(write_lines(tmp_path, lines))
    assert error.places == {"image and language repeated": ["captions.jsonl line 2"]}


def test_every_error_of_parquet_is_reported_at_once(tmp_path: Path) -> None:
    red = {"bytes": encode("images/red.png"), "path": None}
    rows = {
        "image": [red, {**red, "bytes": None}, {"bytes": b"text", "path": "t.png"}, red],
        "caption": ["a square", "no image", "no image either", None],
        "color": [None, None, None, "red"],
    }
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "0.parquet"))
    (tmp_path / "1.parquet").write_bytes(b"no Parquet at all")
    error = errors_of(tmp_path, check_images=True)
    assert error.places.pop("not a Parquet file, or broken")[0].startswith("1.parquet (")
    assert f"{tmp_path / '0.parquet'}: row 2" in error.places.pop("image unreadable")[0]
    assert error.places == {
        "no image": ["0.parquet row 1"],
        "no caption": ["0.parquet row 3"],
        "unknown field 'color'": ["0.parquet row 3"],
    }


def test_every_error_of_coco_is_reported_at_once(tmp_path: Path) -> None:
    file = write_coco(
        tmp_path / "captions.json",
        images=[coco_image(1), coco_image(2), coco_image(1), {"file_name": "x.jpg"}, coco_image(3)],
        annotations=[
            coco_caption(1, 1, "good"),
            coco_caption(2, 2, " "),
            coco_caption(5, 3, "of nothing"),
            coco_caption(1, 4, None),
        ],
    )
    assert errors_of(file, image_dir=tmp_path).places == {
        "annotation without 'id', 'image_id' and 'caption'": ["captions.json annotations[3]"],
        "image missing": [f"captions.json images[{i}]" for i in (0, 1, 4)],
        "blank caption": ["captions.json images[1]"],
        "image 'id' repeated": ["captions.json images[2]"],
        "image without 'id'": ["captions.json images[3]"],
        "no caption": ["captions.json images[4]"],
        "annotation of an unknown image": ["captions.json image_id 5"],
    }


@pytest.mark.parametrize("is_empty", [False, True])
def test_the_error_of_a_folder_without_captions_shows_how_to_write_one(
    tmp_path: Path, is_empty: bool
) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "a" / "b.png")
    if is_empty:
        (tmp_path / "photos" / "captions.jsonl").touch()
    with pytest.raises(ValueError, match=r"docs/data-formats\.md") as caught:
        load_records(tmp_path / "photos")
    (line,) = re.findall(r"\{.*\}", str(caught.value))
    (tmp_path / "photos" / "captions.jsonl").write_text(line, encoding="utf-8")
    (record,) = load_records(tmp_path / "photos")
    assert record.name == "a/b.png"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"nowhere: no such folder or file"),
        ("*.tar", r"\*\.tar: no such folder or file"),
        ("empty", r"has no captions\.jsonl or metadata\.jsonl, no \*\.parquet and no \*\.tar"),
        ("lines", r"has no records"),
        ("both", r"has several sources: captions\.jsonl, a\.tar"),
        ("both/*", r"found \.jsonl, \.tar"),
        ("both/[bc]*.jsonl", r"2 \.jsonl files\. Pass one"),
        ("table.csv", r"found \.csv"),
        ("list.json", r"no 'images' and 'annotations' lists"),
        ("torn.json", r"torn\.json: not JSON"),
    ],
)
def test_anything_that_is_not_a_source_is_refused(
    source: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "lines", ["", " "])
    write_lines(tmp_path / "both", [])
    write_lines(tmp_path / "both", [], "blind.jsonl")
    write_shard(tmp_path / "both" / "a.tar", {})
    (tmp_path / "both" / "b.tar").write_bytes((tmp_path / "both" / "a.tar").read_bytes())
    for name, text in (("table.csv", "a,b"), ("list.json", "[]"), ("torn.json", "{")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_records(f"{tmp_path}/{source}", require_images=False)


def test_a_failing_disk_does_not_mean_a_missing_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = RawRecord("line 1", {"image": "0.png", "caption": "x"})
    errors = ErrorCollector()
    check_record(raw, errors, RecordRules(tmp_path))
    assert errors.counts == {"image missing": 1}
    for number in (errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT):

        def fail(path: str, number: int = number) -> None:
            raise OSError(number, os.strerror(number), path)

        with monkeypatch.context() as patch:
            patch.setattr(records_module.os, "stat", fail)
            with pytest.raises(OSError, match=os.strerror(number)):
                check_record(raw, errors, RecordRules(tmp_path))


def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(tmp_path: Path) -> None:
    for name in ("x1", "x[1]"):
        (tmp_path / name).mkdir()
        rows = [{"group_id": name, "caption": name}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "0.parquet")
    for pattern, names in (("x[1]/*.parquet", {"x[1]"}), ("x[0-9]/*.parquet", {"x1"})):
        records = load_records(f"{tmp_path}/{pattern}", require_images=False)
        assert {record.group_id for record in records} == names
        streamed = stream_records(f"{tmp_path}/{pattern}", require_images=False)
        assert {record.group_id for record in streamed} == names
