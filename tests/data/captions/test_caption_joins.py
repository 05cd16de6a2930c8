"""Published captions come to the records of their images, whatever the order and the format."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from downloads import CAPTIONS, URLS, write_downloaded_tar
from failing_disk import make_failing_file
from interruptions import largest_file

from modeling_llm2clip.cli.options import read_captioned_images
from modeling_llm2clip.configs.data_config import DataConfig
from modeling_llm2clip.data.atomic_files import temporary_folder
from modeling_llm2clip.data.captions import caption_joins
from modeling_llm2clip.data.captions.caption_joins import join_captions, read_configured_records
from modeling_llm2clip.data.records import record_columns, record_index, record_table
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage

FIELDS = ["Image Path", "raw_caption", "shortIB_captions", "longSV_captions"]


def make_records(count: int) -> RecordTable:
    return RecordTable.from_records(
        CaptionedImage(
            None, f"{n % 9}.tar/{n:06d}.jpg", f"g{n}", (f"own {n}",), url=f"https://x.example/{n}"
        )
        for n in range(count)
    )


def make_rows(numbers: Any) -> list[dict[str, str]]:
    """As published re-captionings of CC3M are: texts with commas, quotes and line breaks."""
    return [
        {
            "Image Path": f"https://x.example/{n}",
            "raw_caption": f"own {n}",
            "shortIB_captions": f'a "short" one, {n}',
            "longSV_captions": f"A long one.\nIts second line is {n}.",
        }
        for n in numbers
    ]


def write_csv(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_packed_csv(file: Path, rows: list[dict[str, str]]) -> Path:
    plain = write_csv(file, rows)
    packed = file.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    return packed


def write_lines(file: Path, rows: list[dict[str, str]]) -> Path:
    file = file.with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[dict[str, str]]) -> Path:
    file.parent.joinpath("parts").mkdir()
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(part), file.parent / "parts" / f"{number}.parquet")
    return file.parent / "parts"


def expect(numbers: Any, has_row: Callable[[int], bool]) -> list[tuple[Any, ...]]:
    return [
        ((f"own {n}", f'a "short" one, {n}'), (f"A long one. Its second line is {n}.",))
        if has_row(n)
        else ((f"own {n}",), ())
        for n in numbers
    ]


def texts(records: RecordTable) -> list[tuple[Any, ...]]:
    return [(record.captions, record.long_captions) for record in records]


@pytest.mark.parametrize("write", [write_csv, write_packed_csv, write_lines, write_parquet])
def test_captions_come_to_their_records_in_every_format(
    write: Callable[[Path, Any], Path], tmp_path: Path
) -> None:
    records = make_records(30)
    numbers = np.random.default_rng(0).permutation(range(20, 50)).tolist()
    joined = join_captions(records, write(tmp_path / "c.csv", make_rows(numbers)), on="url")
    assert texts(joined.records) == expect(range(30), lambda n: n >= 20)
    assert (joined.matched, joined.unmatched_records, joined.unmatched_rows) == (10, 20, 20)
    assert joined.first_unmatched_records == tuple(f"{n}.tar/{n:06d}.jpg" for n in range(5))
    first = [f"https://x.example/{n}" for n in numbers if n >= 30][:5]
    assert joined.first_unmatched_rows == tuple(first)
    assert "10 records matched; without a row: 20 (0.tar/000000.jpg," in str(joined)


def test_batches_and_their_order_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (record_columns, record_index, record_table):
        monkeypatch.setattr(module, "ROWS_PER_BATCH", 7)
    monkeypatch.setattr(caption_joins, "_ROWS_AT_ONCE", 7)
    records = make_records(100).select(np.random.default_rng(1).permutation(100)[:90])
    rows = make_rows(np.random.default_rng(2).permutation(200)[:150])
    joined = join_captions(records, write_csv(tmp_path / "c.csv", rows), on="url").records
    there = {int(row["Image Path"].rpartition("/")[2]) for row in rows}
    numbers = [int(record.group_id[1:]) for record in records]
    assert texts(joined) == expect(numbers, lambda n: n in there)
    assert joined.file is not None
    # Nothing else changes, and the hashes of texts are those of a table that is made anew.
    anew = RecordTable.from_records(list(joined))
    for name in record_columns.SCHEMA.names:
        values, expected = (
            pa.Table.from_batches(list(table.iterate_columns([name]))).column(0).to_pylist()
            for table in (joined, anew)
        )
        assert values == expected, name


def test_a_repeated_row_is_counted_and_the_first_one_used(tmp_path: Path) -> None:
    rows = make_rows([1, 2, 1])
    rows[2]["shortIB_captions"] = "another"
    joined = join_captions(make_records(3), write_csv(tmp_path / "c.csv", rows), on="url")
    assert texts(joined.records) == expect(range(3), lambda n: n > 0)
    assert joined.repeated_rows == 1


def test_a_part_of_a_file_may_have_no_captions(tmp_path: Path) -> None:
    """A file is read 8192 rows at a time, and none of the first ones may have any."""
    rows = [{"url": "https://x.example/1", "caption": ""} for _ in range(8192)]
    rows.append({"url": "https://x.example/2", "caption": "a late one"})
    joined = join_captions(make_records(3), write_csv(tmp_path / "c.csv", rows), on="url")
    assert texts(joined.records)[2] == (("own 2", "a late one"), ())
    assert (joined.matched, joined.unmatched_rows, joined.repeated_rows) == (1, 0, 0)
    with pytest.raises(ValueError, match="No record of 3 matches a row"):
        join_captions(make_records(3), write_csv(tmp_path / "d.csv", rows[:8192]), on="url")


def test_captions_may_replace_the_own_ones_of_their_length(tmp_path: Path) -> None:
    rows = [{"url": "https://x.example/1", "caption": "new"}]
    rows.append({"url": "https://x.example/2", "caption": "", "re_caption": "A long one."})  # type: ignore[dict-item]
    file = write_lines(tmp_path / "c.csv", rows)
    joined = join_captions(make_records(3), file, on="url", replace=True)
    assert texts(joined.records) == [
        (("own 0",), ()), (("new",), ()), (("own 2",), ("A long one.",))
    ]  # fmt: skip


@pytest.mark.parametrize("column", ["key", "Image Path"])
def test_downloads_are_joined_by_url_and_by_key(column: str, tmp_path: Path) -> None:
    records = load_records(write_downloaded_tar(tmp_path / "data"))
    keys = ["000000000", "000000002", "000000001"]
    if column == "Image Path":
        keys = [f"train/0000/{key}.jpg" for key in keys]
    by_key = [{column: key, "caption": f"caption of {key[-5:]}"} for key in keys]
    joined = join_captions(records, write_csv(tmp_path / "k.csv", by_key), on="key")
    assert [record.captions[1][-5:] for record in joined.records] == [k[-5:] for k in keys[:2]]
    assert joined.unmatched_rows == 1
    by_url = [{"url": url, "caption": f"of {url}"} for url in reversed(URLS)]
    joined = join_captions(records, write_csv(tmp_path / "u.csv", by_url), on="url")
    assert [r.captions[1] for r in joined.records] == [f"of {URLS[0]}", f"of {URLS[2]}"]


def test_keys_of_several_images_are_refused(tmp_path: Path) -> None:
    records = RecordTable.from_records(
        CaptionedImage(None, f"{source}/00000.tar/1.jpg", "g", ("a",))
        for source in ("cc3m", "cc12m")
    )
    file = write_csv(tmp_path / "c.csv", [{"key": "1", "caption": "b"}])
    with pytest.raises(ValueError, match="2 images have 1 keys: some are those of several images"):
        join_captions(records, file, on="key")
    languages = RecordTable.from_records(
        CaptionedImage(None, "00000.tar/1.jpg", "g", ("a",), lang=lang) for lang in ("en", "de")
    )
    assert join_captions(languages, file, on="key", lang="de").matched == 1


@pytest.mark.parametrize("on", ["url", "key"])
def test_captions_come_to_the_records_of_their_language_alone(on: Any, tmp_path: Path) -> None:
    records = RecordTable.from_records(
        CaptionedImage(None, f"{n}.jpg", "g", ("own",), lang=lang, url=f"u{n}")
        for n, lang in ((1, "en"), (1, "de"), (2, "de"))
    )
    file = write_csv(tmp_path / "c.csv", [{on: f"u{n}" if on == "url" else f"{n}", "caption": "x"}
                                          for n in (1, 2)])  # fmt: skip
    found = {lang: join_captions(records, file, on=on, lang=lang) for lang in ("en", "de")}
    captions = {lang: [len(r.captions) for r in join.records] for lang, join in found.items()}
    assert captions == {"en": [2, 1, 1], "de": [1, 2, 2]}
    assert [join.unmatched_records for join in found.values()] == [2, 1]
    assert [join.unmatched_rows for join in found.values()] == [1, 0]
    for lang in (None, "fr"):
        with pytest.raises(ValueError, match=r"in 'de', 'en'.*by lang \(--captions-lang\)"):
            join_captions(records, file, on=on, lang=lang)
    german = records.select([1, 2])
    assert join_captions(german, file, on=on).matched == 2  # all are in one language


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"link": "x", "caption": "a"}], "none of the columns url, URL, Image Path, but link"),
        ([{"url": "x", "notes": "a"}], "no column of captions"),
        ([{"url": "nowhere", "caption": "a"}], r"No record of 3 matches a row of .* \(nowhere\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    rows: list[dict[str, str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        join_captions(make_records(3), write_csv(tmp_path / "c.csv", rows), on="url")


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    records = make_records(3)
    contents = {"a.parquet": "no", "a.csv": "url,caption\nx\n", "a.jsonl": "{", "a.txt": "x"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=name):
            join_captions(records, tmp_path / name, on="url")
    pq.write_table(pa.table({"url": ["x"] * 99, "caption": ["y"] * 99}), tmp_path / "d.parquet")
    content = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(
        b"PAR1" + bytes(60) + content[64:]
    )  # a page, not the footer
    with pytest.raises(ValueError, match=r"d\.parquet: broken"):
        join_captions(records, tmp_path / "d.parquet", on="url")
    columns = [pa.array(["https://x.example/1"]), pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(columns, names=["url", "caption", "caption"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="two columns named 'caption'"):
        join_captions(records, tmp_path / "c.parquet", on="url")
    with pytest.raises(ValueError, match="no such file of captions"):
        join_captions(records, tmp_path / "gone.csv", on="url")
    for name in ("e.csv", "e.jsonl"):
        with pytest.raises(OSError, match=r"\[Errno 5\]"):  # of the disk: no download mends it
            join_captions(records, make_failing_file(tmp_path / name), on="url")
    nameless = RecordTable.from_records([CaptionedImage(None, "a", "a", ("a",))])
    file = write_csv(tmp_path / "c.csv", make_rows([1]))
    with pytest.raises(ValueError, match="None of 1 records has a url"):
        join_captions(nameless, file, on="url")


@pytest.mark.parametrize("size", [1, 14_000])
def test_a_full_temporary_folder_is_named_with_a_remedy(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table does not fit, or the joined records do not."""
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    file = write_csv(tmp_path / "captions.csv", make_rows(range(300)))
    with largest_file(size), pytest.raises(OSError, match="No room for the joined") as caught:
        join_captions(make_records(300), file, on="url")
    folder = temporary_folder()
    assert re.search(rf"Free some space.*TMPDIR: '{folder}", str(caught.value))
    assert not list(folder.glob("*.sqlite"))


QUOTED = ['"Go," she said', 'an "unquoted" one', '"', 'said "so"', "plain", '"a" and "b"']


def test_quotes_are_part_of_a_cell_unless_they_enclose_all_of_it(tmp_path: Path) -> None:
    """As published files have it; a quote that began a cell would take the next rows in."""
    rows = [{"caption": text, "url": f"https://x.example/{n}"} for n, text in enumerate(QUOTED)]
    lines = [f"{row['caption']}\t{row['url']}" for row in rows]
    content = ("\ufeffcaption\turl\r\n" + "\r\n".join(lines)).encode()
    files = [tmp_path / name for name in ("plain.tsv", "packed.tsv.gz", "all.tsv", "all.csv")]
    files[0].write_bytes(content)
    files[1].write_bytes(gzip.compress(content))
    for file, delimiter in ((files[2], "\t"), (files[3], ",")):
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.writer(opened, delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writerows([("caption", "url"), *(row.values() for row in rows)])
    for file in files:
        joined = join_captions(make_records(len(QUOTED)), file, on="url")
        assert [record.captions[1] for record in joined.records] == QUOTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", 'caption,url\n"Go," she said,https://x.example/1\n', "line 2.*into quotes"),
        ("c.csv", "caption,url\na\n", "line 2: 1 cell for 2 columns"),
        ("c.tsv", 'caption\turl\n"two\nlines"\thttps://x.example/1\n', "line 2: 1 cell for 2"),
        ("c.tsv", "caption\turl\na\rb\thttps://x.example/1\n", "line 2: a carriage return"),
        ("c.tsv", "caption\turl\ra\thttps://x.example/1\r", "line 1: a carriage return"),
        ("c.tsv", 'caption\turl\n"a\tb"\thttps://x.example/1\n', "line 2: 3 cells for 2"),
        ("c.csv", "url,caption,caption\nhttps://x.example/1,a,b\n", "two columns named 'caption'"),
        ("c.tsv", "url\tcaption\tcaption\nhttps://x.example/1\ta\tb\n", "two columns named"),
    ],
)
def test_cells_that_are_ambiguous_are_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        join_captions(make_records(3), tmp_path / name, on="url")


def test_columns_that_are_not_read_may_be_repeated_and_large(tmp_path: Path) -> None:
    """Spreadsheets write empty columns at the end, and some datasets images in base64."""
    file = tmp_path / "c.csv"
    file.write_text(f"url,caption,image,,\nhttps://x.example/1,a,{'A' * 200_000},,\n", "utf-8")
    joined = join_captions(make_records(3), file, on="url")
    assert [record.captions[1:] for record in joined.records] == [(), ("a",), ()]


@pytest.mark.parametrize("write", [write_csv, write_lines, write_parquet])
def test_rows_in_another_language_are_counted_and_not_used(
    write: Callable[[Path, Any], Path], tmp_path: Path
) -> None:
    langs = ["de", "en", "", "de"]
    rows = [{**row, "lang": lang} for row, lang in zip(make_rows(range(4)), langs, strict=True)]
    joined = join_captions(make_records(4), write(tmp_path / "c.csv", rows), on="url")
    assert texts(joined.records) == expect(range(4), lambda n: n in (1, 2))  # a blank cell: none
    assert (joined.matched, joined.unmatched_rows, joined.other_language_rows) == (2, 0, 2)
    assert "2 rows in another language" in str(joined)
    for row in rows:
        row["lang"] = "de"
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match="4 rows in another language than 'en'"):
        join_captions(make_records(4), write(tmp_path / "again" / "c.csv", rows), on="url")


def test_values_that_are_no_texts_are_named(tmp_path: Path) -> None:
    values: list[tuple[dict[str, Any], str]] = [
        ({"captions": {"en": "a cat"}}, "'captions' is a dict, not a text or a list"),
        ({"captions": ["a cat", 3]}, "'captions' is a list, not a text or a list"),
        ({"long_captions": 3}, "'long_captions' is a int"),
        ({"captions": "a cat", "lang": 3}, "'lang' is 3, not a text"),
    ]
    for fields, message in values:
        lines = [{"url": "https://x.example/0", "captions": "a"}, {"url": "x", **fields}]
        file = write_lines(tmp_path / "c.jsonl", lines)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"c\.jsonl row 1: {message}"):
            join_captions(make_records(2), file, on="url")


@pytest.mark.usefixtures("own_cache")
def test_a_command_reads_records_as_its_flags_say_and_counts_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_downloaded_tar(tmp_path / "data")
    lines = [{"url": URLS[0], "caption": "published"}, {"url": "https://x.example", "caption": "?"}]
    file = write_lines(tmp_path / "captions", lines)
    config = DataConfig(captions_from=file)
    tables = [
        read_configured_records(data, config, require_images=True, check_images=True)
        for _ in range(2)
    ]
    for records in tables:  # the second reading has left the first one's file alone
        captions = [record.captions for record in records]
        assert captions == [(CAPTIONS[0], "published"), (CAPTIONS[2],)]
    shown = capsys.readouterr().err
    assert "1 record matched; without a row: 1" in shown
    assert "1 row without a record (https://x.example)" in shown
    for show_progress in (True, False):
        records = read_captioned_images(
            str(data), DataConfig(), require_images=True, trains_on_images=True,
            show_progress=show_progress,
        )  # fmt: skip
        assert [record.captions for record in records] == [(CAPTIONS[0],), (CAPTIONS[2],)]
        shown = capsys.readouterr().err
        assert ("decode:" in shown) is show_progress and "matched" not in shown
