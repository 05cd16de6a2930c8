"""Every format gives the same records and pictures; every fault of a source is told at once.

The formats' fixtures are written by the formats' own tools: json, tarfile, `datasets`.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

from modeling_llm2clip.data.captioned_images import CaptionedImage, read_captioned_folder
from modeling_llm2clip.data.captioned_sources import read_captioned
from modeling_llm2clip.data.faults import DataFaults
from modeling_llm2clip.data.pictures import ParquetPicture, TarPicture, load_picture
from modeling_llm2clip.encoding.pictures import encode_pictures
from modeling_llm2clip.processing_llm2clip import load_pictures

# What is written, and what must come back whatever the format.
LINES: list[dict[str, Any]] = [
    {"file_name": "images/red.png", "captions": ["a red square", "a square  of red"],
     "long_captions": ["A red square, and nothing beside it."], "keywords": ["red"],
     "key": "square", "lang": "en"},
    {"file_name": "images/red.png", "captions": ["ein rotes Quadrat"], "key": "square",
     "lang": "de"},
    {"file_name": "images/blue.png", "captions": [" a blue\nsquare \n"], "license": "CC0 1.0"},
]  # fmt: skip
RECORDS = [
    CaptionedImage(
        None, "images/red.png", "square", ("a red square", "a square  of red"),
        ("A red square, and nothing beside it.",), ("red",), "en",
    ),
    CaptionedImage(None, "images/red.png", "square", ("ein rotes Quadrat",), (), (), "de"),
    CaptionedImage(None, "images/blue.png", "images/blue.png", ("a blue square",), (), (), "en"),
]  # fmt: skip
COLOURS = {"images/red.png": (250, 5, 40), "images/blue.png": (0, 30, 200)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_picture(name: str) -> Image.Image:
    """A picture whose every row differs, so that a wrong byte shows."""
    pixels = np.zeros((6, 9, 3), dtype=np.uint8) + np.array(COLOURS[name], dtype=np.uint8)
    pixels[:, :, 1] = np.arange(6)[:, None] * 20
    return Image.fromarray(pixels)


def encode(name: str) -> bytes:
    stream = io.BytesIO()
    make_picture(name).save(stream, "PNG")
    return stream.getvalue()


def write_pictures(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for name in COLOURS:
        (folder / name).write_bytes(encode(name))


def write_lines(folder: Path, lines: list[Any], name: str = "captions.jsonl") -> Path:
    """Write each line as JSON; a line that is text or bytes already as it is."""
    folder.mkdir(exist_ok=True)
    raw = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    (folder / name).write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in raw)
    )
    return folder


def write_folder(folder: Path) -> Path:
    write_pictures(folder)
    return write_lines(folder, LINES)


def write_image_folder(folder: Path) -> Path:
    write_pictures(folder)
    return write_lines(folder, LINES, "metadata.jsonl")


def write_parquet(folder: Path, *, image: Callable[[str], Any] | None = None) -> Path:
    """Two files; pictures as `datasets` packs them, or as `image` has it."""
    folder.mkdir()
    for number, lines in enumerate((LINES[:2], LINES[2:])):
        columns: dict[str, list[Any]] = {
            name: [line.get(name) for line in lines]
            for name in sorted({field for line in LINES for field in line})
        }
        if image is None:
            columns["image"] = [
                {"bytes": encode(line["file_name"]), "path": "any.png"} for line in lines
            ]
        else:
            columns["image"] = [image(line["file_name"]) for line in lines]
        table = datasets.Dataset.from_dict(columns)
        if image is None:
            table = table.cast_column("image", datasets.Image(decode=False))
        table.to_parquet(str(folder / f"part-{number}.parquet"))
    return folder


def write_parquet_of_paths(folder: Path) -> Path:
    write_pictures(folder)
    for file in write_parquet(folder.parent / "paths", image=str).iterdir():
        file.rename(folder / file.name)
    return folder


def write_parquet_of_bytes(folder: Path) -> Path:
    return write_parquet(folder, image=encode)


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            add_member(archive, name, content)
    return file


def write_shards(folder: Path) -> Path:
    for number, lines in enumerate((LINES[:2], LINES[2:])):
        members = {}
        for row, line in enumerate(lines):
            members[f"{row:04d}.png"] = encode(line["file_name"])
            members[f"{row:04d}.json"] = json.dumps(line).encode()
        write_shard(folder / f"{number:05d}.tar", members)
    return folder


WRITERS = (
    write_folder,
    write_image_folder,
    write_parquet,
    write_parquet_of_paths,
    write_parquet_of_bytes,
    write_shards,
)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_records(write: Callable[[Path], Path], tmp_path: Path) -> None:
    records = read_captioned(write(tmp_path / "data"), check_pictures=True)
    assert [replace(record, picture=None) for record in records] == RECORDS


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_pictures_are_read_in_any_order_and_after_pickling(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    records = read_captioned(write(tmp_path / "data"))
    for record in pickle.loads(pickle.dumps(records[::-1])):
        loaded = load_pictures(load_picture(record.picture))
        wanted = np.asarray(make_picture(record.name))
        assert np.array_equal(np.asarray(loaded), wanted), record


def test_all_kinds_of_pictures_have_the_same_vectors(tmp_path: Path) -> None:
    model, processor = tiny_model()
    kinds = [write_folder, write_parquet, write_shards]
    pictures = [read_captioned(w(tmp_path / w.__name__))[2].picture for w in kinds]
    assert [type(picture) for picture in pictures[1:]] == [ParquetPicture, TarPicture]
    pictures.append(make_picture("images/blue.png"))
    vectors = encode_pictures(model, processor, pictures, batch_size=1)
    assert all(vector.equal(vectors[0]) for vector in vectors)


def test_files_and_patterns_give_what_their_folder_gives(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    whole = read_captioned(shards)
    assert read_captioned(f"{shards}/*.tar") == whole
    assert read_captioned(f"{tmp_path}/sh*/0000?.tar") == whole
    assert read_captioned(shards / "00001.tar") == whole[2:]
    folder = write_folder(tmp_path / "folder")
    assert read_captioned(folder / "captions.jsonl") == read_captioned(folder)
    assert read_captioned_folder(folder) == read_captioned(folder)


def test_pictures_may_lie_in_another_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    source = write_lines(tmp_path / "captions", LINES)
    records = read_captioned(source, images=tmp_path / "pictures")
    assert records[0].path == tmp_path / "pictures" / "images/red.png"


def test_a_packed_picture_has_no_path(tmp_path: Path) -> None:
    record = read_captioned(write_shards(tmp_path / "shards"))[0]
    with pytest.raises(ValueError, match=r"images/red\.png has a packed picture, .*0000\.png"):
        _ = record.path


def test_packed_pictures_without_a_file_name_are_named_by_shard_and_member(tmp_path: Path) -> None:
    members = {"a/1.png": encode("images/red.png"), "a/1.txt": b"a red square\n"}
    write_shard(tmp_path / "one.tar", members)
    write_shard(tmp_path / "two.tar", {**members, "a/1.json": b'{"url": "x", "key": 7}'})
    records = read_captioned(tmp_path)
    assert [(r.name, r.key) for r in records] == [
        ("one.tar/a/1.png", "one.tar/a/1.png"),
        ("two.tar/a/1.png", "7"),
    ]
    assert {r.captions for r in records} == {("a red square",)}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_behind_headers_of_any_length(layout: int, tmp_path: Path) -> None:
    # GNU and PAX put a longer name into headers of its own before the picture.
    name = "f" * 90 + "/" + ("n" if layout == tarfile.USTAR_FORMAT else "é" * 300)
    with tarfile.open(tmp_path / "one.tar", "w", format=layout) as archive:
        add_member(archive, f"{name}.jpg", encode("images/red.png"))
        add_member(archive, f"{name}.txt", b"a red square")
    (record,) = read_captioned(tmp_path, check_pictures=True)
    assert record.name == f"one.tar/{name}.jpg" and record.captions == ("a red square",)


def test_a_parquet_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    for caption in ("first", "second"):
        rows = {"file_name": ["a.png"], "caption": [caption]}
        datasets.Dataset.from_dict(rows).to_parquet(str(file))
        assert read_captioned(file, require_pictures=False)[0].captions == (caption,)


def test_published_recaptionings_are_short_and_long_captions(tmp_path: Path) -> None:
    line = {"key": "1", "shortSV_captions": ["short"], "longSV_captions": ["a long one"]}
    (record,) = read_captioned(write_lines(tmp_path, [line]), require_pictures=False)
    assert (record.captions, record.long_captions) == (("short",), ("a long one",))


def test_line_separators_inside_a_text_do_not_end_its_line(tmp_path: Path) -> None:
    # JSON allows U+2028 unescaped; Python's splitlines would cut the object there.
    line = '{"key": "1", "caption": "one\u2028two"}'
    (record,) = read_captioned(write_lines(tmp_path, [line]), require_pictures=False)
    assert record.captions == ("one two",)


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


def write_coco(file: Path, *, images: list[Any], annotations: list[Any]) -> Path:
    content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def coco_image(number: int) -> dict[str, Any]:
    """An image as COCO publishes it, with the fields that nobody needs."""
    return {"license": 4, "file_name": f"{number:012d}.jpg", "coco_url": "x", "height": 6,
            "width": 9, "date_captured": "2013-11-14 17:02:52", "flickr_url": "x",
            "id": number}  # fmt: skip


def coco_caption(image: int, number: int, caption: Any) -> dict[str, Any]:
    return {"image_id": image, "id": number, "caption": caption}


def test_coco_is_read_as_published(tmp_path: Path) -> None:
    captions = [coco_caption(9, 40 - i, f"caption {40 - i} \n") for i in range(7)]
    captions.insert(3, coco_caption(4, 1, "A man\nwith a red helmet. "))
    file = write_coco(
        tmp_path / "captions_val2017.json",
        images=[coco_image(9), coco_image(4)],
        annotations=captions,
    )
    # Numbers of one and two digits, so that an order of texts would differ from theirs.
    nine, four = read_captioned(file, require_pictures=False)
    assert nine.captions == tuple(f"caption {number}" for number in range(34, 41))
    assert (nine.name, nine.key, nine.lang) == ("000000000009.jpg", "000000000009.jpg", "en")
    assert four.captions == ("A man with a red helmet.",) and four.picture is None
    with pytest.raises(ValueError, match=r"Give images=<folder>, or require_pictures=False"):
        read_captioned(file)
    pictures = tmp_path / "val2017"
    pictures.mkdir()
    for name in (nine.name, four.name):
        make_picture("images/red.png").save(pictures / name)
    found = read_captioned(file, images=pictures, check_pictures=True)
    assert [record.path for record in found] == [pictures / nine.name, pictures / four.name]


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
    with pytest.raises(ValueError, match=r"pip install datasets"):
        read_captioned(source)
