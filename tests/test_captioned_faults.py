"""Every fault of a source of captioned pictures is told at once; what is no source is refused."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from captioned_files import (
    add_member,
    coco_caption,
    coco_image,
    encode,
    make_picture,
    own_cache,  # noqa: F401
    write_coco,
    write_folder,
    write_lines,
    write_parquet,
    write_pictures,
    write_shard,
    write_shards,
)

from modeling_llm2clip._extras import MissingExtraError
from modeling_llm2clip.data.captioned_sources import read_captioned
from modeling_llm2clip.data.faults import DataFaults
from modeling_llm2clip.data.pictures import load_picture


def faults_of(source: Path | str, **options: Any) -> DataFaults:
    with pytest.raises(DataFaults) as caught:
        read_captioned(source, **options)
    return caught.value


def test_every_fault_of_a_folder_is_told_at_once(tmp_path: Path) -> None:
    write_pictures(tmp_path)
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
        {**good, "lang": "", "key": ["square"]},
        {**good, "lang": "pt", "caption": "um quadrado"},
        {"captions": ["of nothing"]},
        {"image": 5, "captions": ["a number"]},
        b'{"image": "\xff"}',
        {"image": "images/broken.png", "captions": ["half a picture"]},
        {"image": "images/blue.png", "file_name": "images/red.png", "text": "two names"},
        {**good, "lang": "de", "keywords": ["", "rot"]},
    ]
    fault = faults_of(write_lines(tmp_path, lines), check_pictures=True)
    wanted = {
        "picture and language repeated": [2, 17],
        "blank caption": [3],
        "unknown field 'long_caption'": [4],
        "picture missing": [5],
        "not JSON": [6],
        "not an object": [7],
        "no caption": [8],
        "'captions' is not a text or a list of texts": [9],
        "'lang' is not a non-blank text": [10],
        "'key' is not a non-blank text": [10],
        "both 'captions' and 'caption'": [11],
        "no picture": [12],
        "'image' or 'file_name' is not a non-blank text": [13],
        "not UTF-8": [14],
        "'image' and 'file_name' differ": [16],
        "blank keyword": [17],
    }
    unreadable = fault.places.pop("picture unreadable")
    assert fault.counts.pop("picture unreadable") == 1 and "broken.png" in unreadable[0]
    # The unnamed and the wrongly typed line name no picture, and are counted for that alone.
    assert fault.places == {
        kind: [f"captions.jsonl line {number}" for number in numbers]
        for kind, numbers in wanted.items()
    }
    assert fault.counts == {kind: len(numbers) for kind, numbers in wanted.items()}


def test_the_message_counts_all_and_shows_the_first(tmp_path: Path) -> None:
    source = write_lines(tmp_path, [{"image": f"{i}.png", "caption": "a"} for i in range(70)])
    fault = faults_of(source)
    places = ", ".join(f"captions.jsonl line {number}" for number in range(1, 6))
    assert f"picture missing: 70 ({places}, …)" in str(fault)
    assert str(pickle.loads(pickle.dumps(fault))) == str(fault)


def test_a_field_is_no_fault_when_it_is_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path, [{"key": "1", "caption": "a", "coco_id": 4}])
    options = {"require_pictures": False}
    fault = faults_of(source, **options)
    assert fault.counts == {"unknown field 'coco_id'": 1} and "ignored_fields" in str(fault)
    assert len(read_captioned(source, ignored_fields={"coco_id"}, require_pictures=False)) == 1


def test_every_fault_of_shards_is_told_at_once(tmp_path: Path) -> None:
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
    # Cut in the middle of the first picture.
    (tmp_path / "3.tar").write_bytes(whole[: 512 + 20])
    with tarfile.open(tmp_path / "4.tar", "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        archive.addfile(link)
    fault = faults_of(tmp_path, check_pictures=True)
    shards = fault.places.pop("not a tar shard, or compressed, or broken")
    assert [place[:5] for place in shards] == ["1.tar", "2.tar", "3.tar"]
    unreadable = fault.places.pop("picture unreadable")
    assert len(unreadable) == 1 and f"{tmp_path / '0.tar'}: torn.png" in unreadable[0]
    assert fault.places == {
        "no caption": ["0.tar: silent"],
        "no picture": ["0.tar: blind"],
        "several pictures in one sample": ["0.tar: twice"],
        "not JSON": ["0.tar: broken.json"],
        "not UTF-8": ["0.tar: latin.txt"],
        "unknown member .npy": ["0.tar: odd.npy"],
        "member is not a plain file": ["4.tar: link.png"],
    }


@pytest.mark.parametrize("damage", ["a bit", "a cut header", "a cut end", "another shard behind"])
def test_a_shard_that_tarfile_would_end_early_is_a_fault(damage: str, tmp_path: Path) -> None:
    members = {f"{i}.{end}": b for i in range(6) for end, b in (("png", b"-"), ("txt", b"a text"))}
    shard = write_shard(tmp_path / "0.tar", members)
    whole = shard.read_bytes()
    with tarfile.open(shard) as archive:
        header = archive.getmember("3.png").offset
    flipped = bytearray(whole)
    flipped[header + 150] ^= 1  # in the checksum of a header
    damaged = {
        "a bit": bytes(flipped),
        "a cut header": whole[: header + 100],
        "a cut end": whole[:header],
        "another shard behind": whole + whole,
    }
    shard.write_bytes(damaged[damage])
    fault = faults_of(tmp_path, check_pictures=False)
    (place,) = fault.places["not a tar shard, or compressed, or broken"]
    assert place.startswith("0.tar (the archive is cut off or damaged at byte ")
    shard.write_bytes(whole)
    assert len(read_captioned(tmp_path)) == 6


def test_a_field_that_stands_twice_is_a_fault(tmp_path: Path) -> None:
    line = b'{"key": "1", "captions": ["a"], "captions": ["b"]}'
    fault = faults_of(write_lines(tmp_path, [line]), require_pictures=False)
    assert list(fault.places) == ["field 'captions' twice in one object"]


def test_one_name_written_in_two_ways_is_repeated(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    names = ("images/red.png", "./images//red.png")
    lines = [{"image": name, "captions": ["a square"], "lang": "en "} for name in names]
    fault = faults_of(write_lines(tmp_path, lines))
    assert fault.places == {"picture and language repeated": ["captions.jsonl line 2"]}


def test_every_fault_of_parquet_is_told_at_once(tmp_path: Path) -> None:
    red = {"bytes": encode("images/red.png"), "path": None}
    rows = {
        "image": [red, {**red, "bytes": None}, {"bytes": b"text", "path": "t.png"}, red],
        "caption": ["a square", "no picture", "no picture either", None],
        "colour": [None, None, None, "red"],
    }
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "0.parquet"))
    (tmp_path / "1.parquet").write_bytes(b"no Parquet at all")
    fault = faults_of(tmp_path, check_pictures=True)
    assert fault.places.pop("not a Parquet file, or broken")[0].startswith("1.parquet (")
    assert f"{tmp_path / '0.parquet'}: row 2" in fault.places.pop("picture unreadable")[0]
    assert fault.places == {
        "no picture": ["0.parquet row 1"],
        "no caption": ["0.parquet row 3"],
        "unknown field 'colour'": ["0.parquet row 3"],
    }


def test_every_fault_of_coco_is_told_at_once(tmp_path: Path) -> None:
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
    assert faults_of(file, images=tmp_path).places == {
        "annotation without 'id', 'image_id' and 'caption'": ["captions.json annotations[3]"],
        "picture missing": [f"captions.json images[{i}]" for i in (0, 1, 4)],
        "blank caption": ["captions.json images[1]"],
        "image 'id' repeated": ["captions.json images[2]"],
        "image without 'id'": ["captions.json images[3]"],
        "no caption": ["captions.json images[4]"],
        "annotation of an unknown image": ["captions.json image_id 5"],
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"nowhere: no such folder or file"),
        ("*.tar", r"\*\.tar: no such folder or file"),
        ("empty", r"has no captions\.jsonl or metadata\.jsonl, no \*\.parquet and no \*\.tar"),
        ("lines", r"has no records"),
        ("both", r"has several sources: captions\.jsonl, a\.tar"),
        ("both/*", r"found \.jsonl, \.tar"),
        ("both/[bc]*.jsonl", r"2 \.jsonl files\. Give one"),
        ("table.csv", r"found \.csv"),
        ("list.json", r"no 'images' and 'annotations' lists"),
        ("torn.json", r"torn\.json: not JSON"),
    ],
)
def test_a_source_that_is_none_is_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "lines", ["", " "])
    write_lines(tmp_path / "both", [])
    write_lines(tmp_path / "both", [], "blind.jsonl")
    write_shard(tmp_path / "both" / "a.tar", {})
    (tmp_path / "both" / "b.tar").write_bytes((tmp_path / "both" / "a.tar").read_bytes())
    for name, text in (("table.csv", "a,b"), ("list.json", "[]"), ("torn.json", "{")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_captioned(f"{tmp_path}/{source}", require_pictures=False)


def test_a_folder_of_pictures_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images='nowhere' is no folder"):
        read_captioned(write_folder(tmp_path / "data"), images="nowhere")


def test_pictures_cut_in_their_headers_are_faults_like_others(tmp_path: Path) -> None:
    whole: dict[str, bytes] = {}
    for suffix in ("jpeg", "png"):
        buffer = io.BytesIO()
        make_picture("images/red.png").save(buffer, suffix)
        whole[suffix] = buffer.getvalue()
    cuts = {
        f"{length:02}.{suffix}": content[:length]
        for suffix, content in whole.items()
        for length in (2, 8, 10, 17, 21, 28, 40)
    }
    for name, content in cuts.items():
        (tmp_path / name).write_bytes(content)
    lines = [{"image": name, "captions": "cut"} for name in cuts]
    write_lines(tmp_path, lines)
    assert faults_of(tmp_path, check_pictures=True).counts == {"picture unreadable": len(cuts)}
    members = {}
    for number, (name, content) in enumerate(cuts.items()):
        members[f"{number:02}.json"] = b'{"captions": "cut"}'
        members[f"{number:02}.{name[3:]}"] = content
    write_shard(tmp_path / "shards" / "0.tar", members)
    assert faults_of(tmp_path / "shards", check_pictures=True).counts == {
        "picture unreadable": len(cuts)
    }


def test_a_shard_that_changed_after_it_was_read_is_named(tmp_path: Path) -> None:
    record = read_captioned(write_shards(tmp_path / "shards"))[2]
    (tmp_path / "shards" / "00001.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"00001\.tar: 0000\.png: not a picture"):
        load_picture(record.picture)


def test_parquet_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it then fails
    with pytest.raises(MissingExtraError, match=r"datasets .*modeling_llm2clip\[parquet\]"):
        read_captioned(source)
