"""Adds published captions to the records of a dataset, matched by URL or key.

    python examples/scripts/join_captions.py cc3m captions.csv joined \
        --url "Image Path" --captions raw_caption shortIB_captions --long-captions longSV_captions

CAPTIONS is CSV with a header, JSON lines (both also as .gz) or Parquet: a file, or a folder of
files. `--url` or `--key` names the column to join by; a key is an image's name without folder and
suffix. A captions column contains a text or a list of texts. New captions are appended to a
record's own, without duplicates. Only the first row per image is used, and only rows and records
in one language.

OUTPUT is a new folder: `captions.jsonl` if the images are files (then pass their folder as
`--image-dir`), otherwise Parquet with the images inside. Rows and records without a match are
counted. Needs `pip install duckdb`, and space in the temporary folder.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from modeling_llm2clip import load_records
from modeling_llm2clip.data.images.image_sources import IMAGE_SUFFIXES
from modeling_llm2clip.data.record_fields import clean_text
from modeling_llm2clip.data.records.record_columns import IMAGE_FILE
from modeling_llm2clip.data.records.record_table import RecordTable

SUFFIXES = (".csv", ".jsonl", ".parquet")
ROWS_PER_GROUP, GROUPS_PER_FILE = 100, 100
TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    {
        "image": pa.binary(), "file_name": pa.string(), "group_id": pa.string(),
        "lang": pa.string(), "url": pa.string(), "captions": TEXTS, "long_captions": TEXTS,
        "keywords": TEXTS,
    }
)  # fmt: skip


def main() -> None:
    """Join the captions and write the records."""
    arguments = parse()
    output: Path = arguments.output
    records = load_records(arguments.data, image_dir=arguments.image_dir, show_progress=True)
    if output.exists():
        raise ValueError(f"{output} exists. Choose a new folder.")
    with TemporaryDirectory() as folder, duckdb.connect(str(Path(folder) / "rows")) as database:
        lang = add_records(database, records, arguments)
        for file in find_files(arguments.captions_file):
            add_rows(database, file, lang, arguments)
        joined = read_joined(database, records, lang, arguments)
        output.mkdir(parents=True)
        if (records.read_numbers("image_kind") == IMAGE_FILE).all():
            write_lines(output / "captions.jsonl", joined)
        else:
            write_shards(output, joined)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", help="any source that llm2clip reads")
    parser.add_argument("captions_file", type=Path, metavar="captions", help="file or folder")
    parser.add_argument("output", type=Path, help="new folder")
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument("--url", metavar="COLUMN", help="column with the URLs of the images")
    by.add_argument("--key", metavar="COLUMN", help="column with the names of the images")
    parser.add_argument("--captions", nargs="+", default=[], metavar="COLUMN")
    parser.add_argument("--long-captions", nargs="+", default=[], metavar="COLUMN")
    parser.add_argument("--lang", help="language of the captions; default: that of all records")
    parser.add_argument("--lang-column", metavar="COLUMN", help="column with each row's language")
    parser.add_argument("--image-dir", help="folder of the images; default: folder of the data")
    arguments = parser.parse_args()
    if not (arguments.captions or arguments.long_captions):
        parser.error("name the caption columns with --captions or --long-captions")
    return arguments


def make_key(column: str, arguments: argparse.Namespace) -> str:
    """Return SQL for the key in a column: the URL, or the file name without its image suffix."""
    text = f"nullif(trim(CAST({column} AS VARCHAR)), '')"
    if arguments.url:
        return text
    suffixes = "|".join(sorted(IMAGE_SUFFIXES))
    return rf"regexp_replace(regexp_replace({text}, '^.*/', ''), '\.({suffixes})$', '', 'i')"


def add_records(
    database: duckdb.DuckDBPyConnection, records: RecordTable, arguments: argparse.Namespace
) -> str:
    """Add the keys of the records, and return the language to join."""
    database.execute(
        "CREATE TABLE records (number BIGINT, name VARCHAR, lang VARCHAR, key VARCHAR)"
    )
    column, start = "url" if arguments.url else "name", 0
    for batch in records.iterate_columns(("name", "lang", "url")):
        database.register("batch", pa.Table.from_batches([batch]))
        database.execute(
            f"INSERT INTO records SELECT {start} + row_number() OVER () - 1, name, lang, "
            f"{make_key(column, arguments)} FROM batch"
        )
        start += len(batch)
    langs = [row[0] for row in database.execute("SELECT DISTINCT lang FROM records").fetchall()]
    lang = arguments.lang or langs[0]
    if lang not in langs or (len(langs) > 1 and not arguments.lang):
        raise ValueError(f"The records are in {', '.join(sorted(langs))}. Choose one with --lang.")
    database.execute("DELETE FROM records WHERE lang != ? OR key IS NULL", [lang])
    repeated = database.execute(
        "SELECT key, min(name), max(name) FROM records GROUP BY key HAVING count(DISTINCT name) > 1"
    ).fetchone()
    if repeated and arguments.key:
        raise ValueError(
            f"{repeated[1]} and {repeated[2]} have the key {repeated[0]!r}. Join by --url, or join "
            "each dataset separately."
        )
    database.execute(
        "CREATE TABLE rows (file VARCHAR, number BIGINT, key VARCHAR, captions VARCHAR[], "
        "long_captions VARCHAR[])"
    )
    database.execute("CREATE TABLE counts (total BIGINT, with_key BIGINT, foreign_lang BIGINT)")
    return str(lang)


def find_files(source: Path) -> list[Path]:
    """Return the caption files, sorted by name."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [file for file in files if find_suffix(file) in SUFFIXES]
    if not files:
        raise ValueError(f"{source}: no captions. Pass {', '.join(SUFFIXES)} or a folder of them.")
    return files


def find_suffix(file: Path) -> str:
    """Return the suffix before any `.gz`, in lowercase."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def add_rows(
    database: duckdb.DuckDBPyConnection, file: Path, lang: str, arguments: argparse.Namespace
) -> None:
    """Add the rows of a file that match a record, and count all rows."""
    key, short, long = arguments.url or arguments.key, arguments.captions, arguments.long_captions
    by = make_key(quote(key), arguments)
    used, mark = [*short, *long], "'"
    language = f"CAST({quote(arguments.lang_column)} AS VARCHAR)" if arguments.lang_column else "''"
    is_meant = f"coalesce(trim({language}), '') IN ('', {quote(lang, mark)})"
    compression = "gzip" if file.name.lower().endswith(".gz") else "none"
    name = quote(str(file), mark)
    if find_suffix(file) == ".parquet":
        table = f"read_parquet({name})"
    elif find_suffix(file) == ".csv":
        opened = gzip.open(file, "rt", encoding="utf-8-sig") if compression == "gzip" else None
        with opened or file.open(encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines), [])
        columns = ", ".join(f"{quote(column, mark)}: 'VARCHAR'" for column in header)
        table = (
            f"read_csv({name}, columns={{{columns}}}, auto_detect=false, header=true, delim=',', "
            f"quote='\"', escape='\"', strict_mode=true, compression={compression!r})"
        )
    else:
        named = dict.fromkeys((key, arguments.lang_column), "VARCHAR") | dict.fromkeys(used, "JSON")
        columns = ", ".join(f"{quote(c)}: '{kind}'" for c, kind in named.items() if c is not None)
        table = (
            f"read_json({name}, format='newline_delimited', columns={{{columns}}}, "
            f"compression={compression!r})"
        )
    lists = [", ".join(f"to_json({quote(column)})" for column in side) for side in (short, long)]
    has_text = f"coalesce({', '.join(f'CAST({quote(c)} AS VARCHAR)' for c in used)}) IS NOT NULL"
    database.execute(
        f"INSERT INTO counts SELECT count(*), count({by}), "
        f"count(*) FILTER ({by} IS NOT NULL AND NOT {is_meant}) FROM {table}"
    )
    database.execute(
        f"INSERT INTO rows SELECT {name}, number, key, captions, long_captions FROM "
        f"(SELECT row_number() OVER () AS number, {by} AS key, [{lists[0]}] AS captions, "
        f"[{lists[1]}] AS long_captions, {is_meant} AND {has_text} AS is_meant FROM {table}) "
        "WHERE is_meant AND key IN (SELECT key FROM records)"
    )


def quote(text: str, mark: str = '"') -> str:
    """Quote a column name for SQL, or a text if `mark` is a single quote."""
    return mark + text.replace(mark, 2 * mark) + mark


def read_joined(
    database: duckdb.DuckDBPyConnection,
    records: RecordTable,
    lang: str,
    arguments: argparse.Namespace,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Print what matched, and return each record's image and fields."""
    counts = database.execute("SELECT sum(total), sum(with_key), sum(foreign_lang) FROM counts")
    total, with_key, foreign = counts.fetchone()  # type: ignore[misc]
    counts = database.execute("SELECT count(*), count(DISTINCT key) FROM rows")
    matching, keys = counts.fetchone()  # type: ignore[misc]
    matched = "SELECT count(*) FROM records WHERE key IN (SELECT key FROM rows)"
    [(num_matched,)] = database.execute(matched).fetchall()
    print(
        f"{num_matched:,} of {len(records):,} records matched. Unused rows: {matching - keys:,} "
        f"further ones of an image, {total - with_key:,} without a key, {foreign:,} not in {lang}, "
        f"{with_key - foreign - matching:,} without a record or captions.",
        file=sys.stderr,
    )
    if not num_matched:
        raise ValueError("No record matches a row. Correct the columns, or join by --url or --key.")
    for side in ("captions", "long_captions"):
        for number, column in enumerate(getattr(arguments, side), start=1):
            given = f"SELECT 1 FROM rows WHERE {side}[{number}] NOT IN ('null', '\"\"', '[]')"
            if database.execute(given).fetchone() is None:
                raise ValueError(f"No matching row has a text in {column!r}. Correct its name.")
    rows = database.execute(
        "SELECT records.number, arg_min(captions, (file, rows.number)), "
        "arg_min(long_captions, (file, rows.number)) FROM records JOIN rows USING (key) "
        "GROUP BY records.number ORDER BY records.number"
    )
    return add_captions(records, iter(rows.fetchone, None))  # type: ignore[arg-type]


def add_captions(
    records: RecordTable, rows: Iterator[tuple[int, list[str], list[str]]]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each record's image and fields, with the captions of its row."""
    row = next(rows, None)
    for number, record in enumerate(tqdm(records, unit=" records", disable=None)):
        added: tuple[list[str], list[str]] = [], []
        if row is not None and row[0] == number:
            added = list_texts(row[1], record.name), list_texts(row[2], record.name)
            row = next(rows, None)
        yield (
            record.image,
            {
                "file_name": record.name,
                "group_id": record.group_id,
                "lang": record.lang,
                "url": record.url,
                "captions": list(dict.fromkeys([*record.captions, *added[0]])),
                "long_captions": list(dict.fromkeys([*record.long_captions, *added[1]])),
                "keywords": list(record.keywords),
            },
        )


def list_texts(columns: Sequence[str | None], name: str) -> list[str]:
    """Return the texts in columns of JSON, without blank ones."""
    texts = []
    for column in columns:
        value = json.loads(column or "null")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str | None) for text in values):
            raise ValueError(f"{name}: {column} is not a text or a list of texts. Correct the row.")
        texts += [cleaned for text in values if text and (cleaned := clean_text(text))]
    return texts


def write_lines(file: Path, joined: Iterator[tuple[Any, dict[str, Any]]]) -> None:
    """Write a line per record; images stay where they are."""
    with file.open("w", encoding="utf-8") as opened:
        for _, fields in joined:
            opened.write(json.dumps(fields, ensure_ascii=False) + "\n")


def write_shards(output: Path, joined: Iterator[tuple[Any, dict[str, Any]]]) -> None:
    """Write Parquet with the images inside, in small row groups."""
    for number in count():
        groups = (list(islice(joined, ROWS_PER_GROUP)) for _ in range(GROUPS_PER_FILE))
        if not (first := next(groups)):
            return
        with pq.ParquetWriter(output / f"{number:05d}.parquet", SCHEMA) as writer:
            for group in chain([first], takewhile(bool, groups)):
                rows = [{"image": image.read_bytes(), **fields} for image, fields in group]
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, duckdb.Error) as error:
        sys.exit(f"error: {error}")
