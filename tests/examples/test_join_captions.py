"""The script that joins published captions to records, whatever their order and format."""

from __future__ import annotations

import csv
import gzip
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from downloads import CAPTIONS, IMAGES, URLS, write_downloaded_parquet, write_downloaded_tar
from PIL import Image

from modeling_llm2clip import load_records
from modeling_llm2clip.data.records.record_table import RecordTable

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "scripts" / "join_captions.py"
BY_URL = ("--url", "Image Path", "--captions", "short", "--long-captions", "long")
Join: TypeAlias = Callable[..., tuple[RecordTable, str]]


@pytest.fixture
def join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Join:
    """Runs the script in this process; returns the joined records and what was printed."""

    def run(data: Path, captions: Path, *options: str) -> tuple[RecordTable, str]:
        output = tmp_path / f"joined-{len(list(tmp_path.iterdir()))}"
        arguments = [str(data), str(captions), str(output), *options]
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            raise ValueError(ended.code) from ended
        images = data if (output / "captions.jsonl").is_file() else None
        return load_records(output, image_dir=images), capsys.readouterr().err

    return run


def write_data(folder: Path, names: list[str], langs: tuple[str, ...] = ("en",)) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4), (number, 0, 9)).save(folder / name)
    lines = [
        {"image": name, "captions": ["own"], "url": f"https://x.example/{n}", "lang": lang}
        for n, name in enumerate(names)
        for lang in langs
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return folder


def make_rows(numbers: Any) -> list[dict[str, str]]:
    """As published re-captionings of CC3M are: texts with commas, quotes and line breaks."""
    return [
        {"Image Path": f"https://x.example/{n}", "short": f'a "short" one, {n}',
         "long": f"A long one.\nIts second line is {n}."}
        for n in numbers
    ]  # fmt: skip


def write_csv(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file = file.with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def pack(write: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
    def write_packed(file: Path, rows: Any) -> Path:
        plain = write(file, rows)
        packed = plain.with_name(f"{plain.name}.GZ")
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        return packed

    return write_packed


def write_parquet(file: Path, rows: list[dict[str, str]]) -> Path:
    """Two files, one of which has its suffix in upper case."""
    folder = file.parent / "parts"
    folder.mkdir()
    half = len(rows) // 2
    pq.write_table(pa.Table.from_pylist(rows[:half]), folder / "0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[half:]), folder / "1.PARQUET")
    return folder


def texts(records: RecordTable) -> list[tuple[Any, ...]]:
    return [(record.captions, record.long_captions) for record in records]


@pytest.mark.parametrize(
    "write", [write_csv, pack(write_csv), write_lines, pack(write_lines), write_parquet]
)
def test_captions_come_to_their_records_in_every_format(
    write: Callable[[Path, Any], Path], join: Join, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", [f"{n}.png" for n in range(12)])
    numbers = np.random.default_rng(0).permutation(range(5, 20)).tolist()
    joined, printed = join(data, write(tmp_path / "c.csv", make_rows(numbers)), *BY_URL)
    assert texts(joined) == [
        (("own", f'a "short" one, {n}'), (f"A long one. Its second line is {n}.",))
        if n >= 5
        else (("own",), ())
        for n in range(12)
    ]
    assert "7 of 12 records matched" in printed
    assert "8 without a record" in printed
    before, after = load_records(data), joined
    for name in ("image", "name", "group_id", "lang", "url", "keywords"):
        assert [getattr(r, name) for r in after] == [getattr(r, name) for r in before]


@pytest.mark.parametrize("write", [write_downloaded_tar, write_downloaded_parquet])
def test_packed_images_come_along(
    write: Callable[[Path], Path], join: Join, tmp_path: Path
) -> None:
    data = write(tmp_path / "data")
    rows = [{"url": url, "caption": f"of {url}"} for url in reversed(URLS)]
    file = write_csv(tmp_path / "c.csv", rows)
    joined, _ = join(data, file, "--url", "url", "--captions", "caption")
    expected = [(text, f"of {url}") for text, url in zip(CAPTIONS, URLS, strict=True)]
    assert [record.captions for record in joined] == [expected[0], expected[2]]
    assert [image.read_bytes() for image in joined.iterate_images() if image] == [
        image for image in IMAGES if image
    ]
    assert [record.name for record in joined] == [record.name for record in load_records(data)]
    keys = ["000000000", "train/0000/000000002.jpg", "000000001"]
    by_key = write_csv(tmp_path / "k.csv", [{"k": key, "caption": key[-5:]} for key in keys])
    joined, _ = join(data, by_key, "--key", "k", "--captions", "caption")
    assert [record.captions[1] for record in joined] == ["00000", "02.jpg"[-5:]]


def test_a_key_ends_at_the_suffix_of_the_image(join: Join, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", ["photo.1.png", "photo.2.png"])
    rows = [{"key": "photo.2", "text": "two"}, {"key": "a/photo.1.png", "text": "one"}]
    joined, _ = join(
        data, write_csv(tmp_path / "c.csv", rows), "--key", "key", "--captions", "text"
    )
    assert [record.captions for record in joined] == [("own", "one"), ("own", "two")]


def test_every_row_that_is_not_used_is_counted(join: Join, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", ["0.png", "1.png", "2.png"])
    rows: list[dict[str, Any]] = [
        {"key": None, "text": "no key"},
        {"file_name": "0.png", "text": "its key has another name"},
        {"key": "1", "text": "ein Haus", "lang": "de"},
        {"key": "1", "text": "the first", "lang": "en"},
        {"key": "1", "text": "another"},
        {"key": "9", "text": "elsewhere"},
        {"key": "2", "text": None},
        {"key": "2", "text": ["late", "and more"]},
    ]
    file = write_lines(tmp_path / "c.jsonl", rows)
    options = ("--key", "key", "--captions", "text", "--lang-column", "lang")
    joined, printed = join(data, file, *options)
    assert [r.captions[1:] for r in joined] == [(), ("the first",), ("late", "and more")]
    assert (
        "2 of 3 records matched. Unused rows: 1 further ones of an image, 2 without a key, "
        "1 not in en, 2 without a record or captions." in printed
    )


def test_captions_come_to_the_records_of_their_language_alone(join: Join, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", ["0.png", "1.png"], langs=("en", "de"))
    file = write_csv(tmp_path / "c.csv", [{"key": "1", "text": "ein Haus"}])
    options = ("--key", "key", "--captions", "text")
    with pytest.raises(ValueError, match=r"The records are in de, en\. Choose one with --lang"):
        join(data, file, *options)
    joined, _ = join(data, file, *options, "--lang", "de")
    captions = {(record.name, record.lang): record.captions[1:] for record in joined}
    assert captions.pop(("1.png", "de")) == ("ein Haus",)
    assert set(captions.values()) == {()}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "key,text\n0,a\n", r"a/0\.png and b/0\.png have the key '0'"),
        ("c.csv", "key,text\n7,a\n", "No record matches a row"),
        ("c.csv", "key,other\n1,a\n", "text"),
        ("c.csv", "key,text\n1,a,b\n", "c.csv"),
        ("c.csv", 'key,text\n1,"a" b\n', "c.csv"),
        ("c.jsonl", '{"key": "1", "text": {"en": "a"}}', r"'1\.png'|1\.png: .* is not a text"),
        ("c.jsonl", '{"key": "1", "text": 3}', "is not a text"),
        ("c.jsonl", '{"key": "1", "txt": "a"}', "No record matches a row"),
        ("c.jsonl", '{"key": "1", "text": "a"', "c.jsonl"),
        ("c.parquet", "no", "c.parquet"),
        ("c.tsv", "key\ttext\n1\ta\n", "no captions. Pass .csv, .jsonl, .parquet"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    name: str, content: str, message: str, join: Join, tmp_path: Path
) -> None:
    names = ["0.png", "1.png"]
    data = write_data(tmp_path / "data", names)
    if "have the key" in message:
        for folder in ("a", "b"):
            (data / folder).mkdir()
            Image.new("RGB", (4, 4)).save(data / folder / "0.png")
        names = ["a/0.png", "b/0.png"]
        lines = [{"image": name, "captions": ["own"]} for name in names]
        (data / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        join(data, tmp_path / name, "--key", "key", "--captions", "text")
