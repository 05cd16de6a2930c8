"""The seam to a database: an index in SQLite, through `VectorTable`, finds what LanceDB finds."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from indexes import QUIET, save_images, save_model

from modeling_llm2clip.search import index_database
from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.search.vector_table import ABOUT, COLUMNS, IMAGES, AnnIndex, make_schema

pytestmark = pytest.mark.usefixtures("own_cache")
_TIMES = ("modified", "taken")


class SqliteTable:
    """A `VectorTable` that compares with every image."""

    def __init__(self, location: str) -> None:
        file = location.removeprefix("sqlite://")
        self._connection = sqlite3.connect(file, check_same_thread=False)

    def _fetch(self, query: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(query).fetchall()

    def _schema(self) -> pa.Schema:
        return make_schema(json.loads(self._fetch(f"SELECT content FROM {ABOUT}")[0][0])["width"])

    def list_tables(self) -> Sequence[str]:
        return [name for (name,) in self._fetch("SELECT name FROM sqlite_master")]

    def read_about(self) -> pa.Table:
        names = ["format_version", "content"]
        values = zip(*self._fetch(f"SELECT {', '.join(names)} FROM {ABOUT}"), strict=True)
        return pa.table(dict(zip(names, map(list, values), strict=True)))

    def write_about(self, rows: pa.Table) -> None:
        (row,) = rows.to_pylist()
        with self._connection as connection:
            connection.execute(f"DROP TABLE IF EXISTS {ABOUT}")
            connection.execute(f"CREATE TABLE {ABOUT} (format_version INTEGER, content TEXT)")
            connection.execute(f"INSERT INTO {ABOUT} VALUES (?, ?)", tuple(row.values()))

    def create(self, width: int) -> None:
        others = ", ".join(name for name in make_schema(width).names if name != "path")
        with self._connection as connection:
            connection.execute(f"CREATE TABLE {IMAGES} (path TEXT PRIMARY KEY, {others})")

    def reopen(self) -> None:
        pass

    def count(self, where: str | None = None) -> int:
        return int(self._fetch(f"SELECT COUNT(*) FROM {IMAGES} WHERE {where or 1}")[0][0])

    def read(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([self._schema().field(name) for name in columns])
        for row in self._fetch(f"SELECT {', '.join(columns)} FROM {IMAGES} WHERE {where or 1}"):
            values = dict(zip(columns, row, strict=True))
            if "embedding" in values:
                values["embedding"] = np.frombuffer(values["embedding"], np.float32)
            for name in _TIMES:
                if values.get(name):
                    values[name] = datetime.fromisoformat(values[name])
            yield pa.RecordBatch.from_pylist([values], schema)

    def write(self, rows: Mapping[str, Any], *, adds: bool) -> None:
        for row in pa.table(dict(rows)).to_pylist():
            if "embedding" in row:
                row["embedding"] = np.array(row["embedding"], np.float32).tobytes()
            row |= {name: row[name].isoformat() for name in _TIMES if row.get(name)}
            names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
            change = f"UPDATE {IMAGES} SET ({names}) = ({marks}) WHERE path = :path"
            if adds:
                change = f"INSERT OR REPLACE INTO {IMAGES} ({names}) VALUES ({marks})"
            with self._connection as connection:
                connection.execute(change, row)

    def delete(self, where: str) -> None:
        with self._connection as connection:
            connection.execute(f"DELETE FROM {IMAGES} WHERE {where}")

    def optimize(self) -> None:
        pass

    def build_ann(self, num_partitions: int) -> None:
        raise NotImplementedError

    def drop_ann(self) -> None:
        pass

    def search(
        self, embedding: np.ndarray, *, top_k: int, where: str | None, ann: AnnIndex | None
    ) -> list[dict[str, Any]]:
        assert ann is None
        rows = [
            row for part in self.read([*COLUMNS, "embedding"], where) for row in part.to_pylist()
        ]
        for row in rows:
            row["cosine"] = float(np.float32(row.pop("embedding")) @ embedding)
        return sorted(rows, key=lambda row: -row["cosine"])[:top_k]


@pytest.mark.slow
def test_another_database_behind_the_protocol_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = save_model(tmp_path / "model"), save_images(tmp_path / "images", count=6)
    (images / "copy.png").write_bytes((images / "1.png").read_bytes())
    reports: list[list[str]] = []
    found: list[list[Any]] = []
    for location in (str(tmp_path / "lance"), f"sqlite://{tmp_path}/index.sqlite"):
        with monkeypatch.context() as patch:
            if location.startswith("sqlite"):
                patch.setattr(index_database, "open_table", SqliteTable)
            lines: list[str] = []
            ImageIndex.build(model, images, location, QUIET, report=lines.append)
            (images / "1.png").rename(images / "moved.png")
            os.utime(images / "3.png", (1e9, 1e9))
            ImageIndex.build(model, images, location, QUIET, report=lines.append)
            index = ImageIndex.open(location)
            assert len(index) == index.count_readable() == 7
            found.append([index.count("width > 42 AND path LIKE '%.JPG'"), index.columns])
            for where in (None, "width > 42", "path = 'moved.png'"):
                queries = ["a dog", images / "5.png"]
                result = index.search(queries, top_k=7, where=where, exact=True)
                found[-1] += [[path for path, _ in one.hits] for one in result]
                found[-1] += [one.columns for one in result]
            reports.append(lines)
        (images / "moved.png").rename(images / "1.png")
    assert reports[0] == reports[1]
    assert any("1 new, 0 changed, 6 unchanged; 1 removed. Encoded 0." in one for one in reports[0])
    assert found[0] == found[1]
